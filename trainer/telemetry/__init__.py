"""Telemetry of a run: scalars, pictures, progress, heartbeat, goodput, profiles."""
