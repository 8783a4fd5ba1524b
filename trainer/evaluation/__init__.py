"""Judging a trained network: samples, likelihood, the figures of the paper. Stands on the engine."""
