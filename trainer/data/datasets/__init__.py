"""Datasets that can be read at any sample."""
