"""Python's cyclic garbage collected when all ranks do: a rank that collects alone makes the others wait for it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_STEPS = 500


@contextmanager
def collected_when_told() -> Iterator[None]:
    """Inside, nothing is collected but by `gc.collect`; what is there already is not looked at again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect_after(step: int) -> None:
    """Collect where this step says so, which is the same for all ranks."""
    if step % _STEPS == 0:
        gc.collect()
