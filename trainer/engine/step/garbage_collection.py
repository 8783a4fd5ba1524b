"""Python's cyclic garbage collection in the same step on all ranks: a rank that collects alone delays the others."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_STEPS = 500


@contextmanager
def manual_collection() -> Iterator[None]:
    """A context in which only explicit `gc.collect` collects; objects that exist already are frozen (`gc.freeze`)."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect_after(step: int) -> None:
    """Collect in every n-th step; called on all ranks with the same step."""
    if step % _STEPS == 0:
        gc.collect()
