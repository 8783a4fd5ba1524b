"""The state of a run, its averages of the weights, and the files that hold its tensors."""
