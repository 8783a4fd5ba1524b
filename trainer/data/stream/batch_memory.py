"""Reusable memory for batches: new memory is mapped page by page, which can take longer than decoding the JPEGs.

A stream has slots, each for one batch. A loader takes one of its own slots; it is free again once the last tensor that
views it is deleted. Where more batches are kept than there are slots, the loaders allocate new memory, as torch's do.
"""

import contextlib
import errno
import itertools
import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

from trainer.errors import DataError

_SHARED = Path("/dev/shm")
_keys = itertools.count()
_memories: "weakref.WeakValueDictionary[int, BatchMemory]" = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Slot:
    """A filled slot, sent from a loader to the trainer's process, where `tensor` makes a tensor of it."""

    memory: int
    loader: int
    number: int

    def tensor(self) -> torch.Tensor:
        """The batch, of the memory's shape; the slot is freed when no view of it is left. Call it once."""
        return _memories[self.memory].lend(self)

    def pin_memory(self) -> torch.Tensor:
        """Called by torch's pinning thread: a copy in pinned memory; the slot is freed at once."""
        return self.tensor().pin_memory()


class BatchMemory:
    """Slots for batches, see the module. Created in the trainer's process; loader processes inherit or receive it.

    shape: of a batch of uint8; loaders: number of processes, or 0 where the trainer's process fills the slots itself;
    slots: per loader. Raises DataError where the shared memory cannot be allocated.
    """

    def __init__(self, shape: tuple[int, ...], *, loaders: int, slots: int) -> None:
        owners = max(1, loaders)
        self.shape = shape
        try:
            self._pixels = _bytes((owners, slots, *shape), shared=loaders > 0)
            # One byte per slot, set only by its loader and cleared only by the trainer, so no lock is needed.
            self._taken = _bytes((owners, slots), shared=loaders > 0).zero_()
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full /dev/shm
            needed = owners * slots * math.prod(shape)
            raise DataError(
                f"/dev/shm: no room for the {needed} bytes that {loaders} loader processes share with the trainer; "
                "take fewer data.workers or a smaller data.prefetch"
            ) from error
        self._key = next(_keys)
        _memories[self._key] = self

    def take(self) -> tuple[Slot, npt.NDArray[np.uint8]] | None:
        """A free slot of this loader, and its pixels to be written; None where all slots are in use."""
        worker = get_worker_info()
        loader = worker.id if worker else 0
        free = np.flatnonzero(self._taken[loader].numpy() == 0)
        if not len(free):
            return None
        number = int(free[0])  # always the first free one, so that few pages are touched
        self._taken[loader, number] = 1
        return Slot(self._key, loader, number), self._pixels[loader, number].numpy()

    def lend(self, slot: Slot) -> torch.Tensor:
        """Implements `Slot.tensor`."""
        shown = self._pixels[slot.loader, slot.number].numpy()
        weakref.finalize(shown, self._free, slot).atexit = False
        return torch.from_numpy(shown)  # the tensor and its views keep a reference to `shown`

    def _free(self, slot: Slot) -> None:
        self._taken[slot.loader, slot.number] = 0


def own_memory(shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialised uint8 memory; in a loader process shared, so that it reaches the trainer without a copy."""
    return _bytes(shape, shared=get_worker_info() is not None)


def _bytes(shape: tuple[int, ...], *, shared: bool) -> torch.Tensor:
    if not shared:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))  # NumPy uses huge pages
    size = math.prod(shape)
    _check_room(size)
    before = _own_files()
    try:
        storage = torch.UntypedStorage._new_shared(size, device="cpu")  # as in torch's default collate
    except RuntimeError:
        for path in _own_files() - before:  # torch leaves the file of a failed allocation in /dev/shm
            path.unlink(missing_ok=True)
        raise
    return torch.empty(0, dtype=torch.uint8).set_(storage).reshape(shape)


def _check_room(size: int) -> None:
    """Raise OSError where less is free; where more is, other processes may still allocate it first."""
    with contextlib.suppress(FileNotFoundError):
        found = os.statvfs(_SHARED)
        if size > found.f_bavail * found.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(_SHARED))


def _own_files() -> set[Path]:
    """Files of this process in shared memory: torch unlinks those shared by descriptor at once."""
    return set(_SHARED.glob(f"torch_{os.getpid()}_*"))
