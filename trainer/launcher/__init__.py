"""What the launcher that started this process was told, as fields of a run's configuration."""
