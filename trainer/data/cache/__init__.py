"""Files from servers and buckets, on a node's local disk."""
