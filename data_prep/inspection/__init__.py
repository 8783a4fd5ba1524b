"""Reads finished datasets: verification, statistics, pictures."""
