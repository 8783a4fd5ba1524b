"""Checkpoints: written, verified, kept, resumed from."""
