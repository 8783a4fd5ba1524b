"""Mirrors of checkpoints on other disks, servers and buckets."""
