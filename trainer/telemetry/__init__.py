"""What a run tells: scalars, pictures, progress."""
