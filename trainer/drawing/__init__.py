"""A trained run: opened, and drawn from by all ranks, resumably."""
