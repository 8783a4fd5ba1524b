"""Scripts that start the entry points of trainer/."""
