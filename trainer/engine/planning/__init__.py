"""What a configuration costs, before it is trained."""
