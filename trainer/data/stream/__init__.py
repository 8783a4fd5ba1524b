"""From positions to micro-batches of pixels."""
