"""Training data: datasets of shards, order of samples, decoding, and the stream of micro-batches."""
