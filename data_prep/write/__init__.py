"""Writes datasets: plan, conversion, shards."""
