"""Inspection of a run's folder from the command line, in a single process."""
