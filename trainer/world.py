"""This process's place among those of a run, from the variables that a launcher sets; alone without them."""

import os


def rank() -> int:
    """Number of this process among all of the run."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int | None:
    """Number of processes on this host; None where the launcher does not say it."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return 1 if world_size() == 1 else None
