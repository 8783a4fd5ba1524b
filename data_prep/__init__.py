"""From images as they lie on disk to tar shards."""
