"""What lies in a run's folder, for people: in one process."""
