"""Orders of samples: pure functions of seed and position."""
