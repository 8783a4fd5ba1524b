"""Prepares image datasets: from common formats to tar shards with an index."""
