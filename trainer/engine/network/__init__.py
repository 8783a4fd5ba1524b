"""What the engine does to a network: precision, compilation, activation checkpointing, its cost."""
