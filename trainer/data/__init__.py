"""The stream of samples: order, index, decoding."""
