"""Weights in and out: other programs' files, and folders that other programs load."""
