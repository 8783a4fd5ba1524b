"""What lies in a run's folder, for people: in one process, without a device."""
