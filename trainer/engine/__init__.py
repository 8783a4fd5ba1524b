"""The training loop: state, checkpoints, processes."""
