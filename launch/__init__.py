"""Launching of trainer/'s entry points: launcher, SLURM submission, status, demo."""
