"""Memory for batches, used again and again.

New memory would be zeroed by the kernel page by page, and where loader processes share it with the trainer, mapped page
by page on both sides: that can take longer than decoding the JPEGs that go into it. So a stream has slots, each for one
batch. A loader takes one of its own; it is free again when the last tensor that shows it is gone, whoever kept one and
for how long. Where a user keeps more than there are slots, the loaders make new memory, as torch's own would.
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
    """A filled slot on its way from a loader to the trainer's process, where alone it becomes a tensor again."""

    memory: int
    loader: int
    number: int

    def tensor(self) -> torch.Tensor:
        """The batch, of the memory's shape; the slot is free when nothing shows it any more. To be called once."""
        return _memories[self.memory].lend(self)

    def pin_memory(self) -> torch.Tensor:
        """What torch's pinning thread asks for: a copy from which a device reads by itself; the slot is free again."""
        return self.tensor().pin_memory()


class BatchMemory:
    """See the module. Made in the trainer's process, and inherited by its loaders or sent to them when they start.

    shape: of a batch of uint8; loaders: processes, or 0 where the trainer's process fills the slots itself; slots: for
    each of them. Raises DataError where the memory that they share cannot be had.
    """

    def __init__(self, shape: tuple[int, ...], *, loaders: int, slots: int) -> None:
        owners = max(1, loaders)
        self.shape = shape
        try:
            self._pixels = _bytes((owners, slots, *shape), shared=loaders > 0)
            # Each byte is set by its loader alone and cleared by the trainer alone, so no lock is needed.
            self._taken = _bytes((owners, slots), shared=loaders > 0).zero_()
        except (OSError, RuntimeError) as error:  # the latter is torch's word for a full /dev/shm
            needed = owners * slots * math.prod(shape)
            raise DataError(
                f"/dev/shm: no room for the {needed} bytes that {loaders} loader processes share with the trainer; "
                "take fewer data.workers or a smaller data.prefetch"
            ) from error
        self._key = next(_keys)
        _memories[self._key] = self

    def take(self) -> tuple[Slot, npt.NDArray[np.uint8]] | None:
        """A free slot of this loader, and its pixels to be written; None where the trainer's process keeps all."""
        worker = get_worker_info()
        loader = worker.id if worker else 0
        free = np.flatnonzero(self._taken[loader].numpy() == 0)
        if not len(free):
            return None
        number = int(free[0])  # the one that was used last, so that few pages are ever touched
        self._taken[loader, number] = 1
        return Slot(self._key, loader, number), self._pixels[loader, number].numpy()

    def lend(self, slot: Slot) -> torch.Tensor:
        """See `Slot.tensor`."""
        shown = self._pixels[slot.loader, slot.number].numpy()
        weakref.finalize(shown, self._free, slot).atexit = False
        return torch.from_numpy(shown)  # it and all its views keep `shown`

    def _free(self, slot: Slot) -> None:
        self._taken[slot.loader, slot.number] = 0


def own_memory(shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialised uint8; in a loader process shared, so that it need not be copied on its way to the trainer."""
    return _bytes(shape, shared=get_worker_info() is not None)


def _bytes(shape: tuple[int, ...], *, shared: bool) -> torch.Tensor:
    if not shared:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))  # NumPy asks for huge pages
    size = math.prod(shape)
    _check_room(size)
    before = _own_files()
    try:
        storage = torch.UntypedStorage._new_shared(size, device="cpu")  # as torch's own collate does
    except RuntimeError:
        for path in _own_files() - before:  # torch leaves what it could not fill, as long as it should have been
            path.unlink(missing_ok=True)
        raise
    return torch.empty(0, dtype=torch.uint8).set_(storage).reshape(shape)


def _check_room(size: int) -> None:
    """Raise OSError where there is less; where there is more, others may still be faster."""
    with contextlib.suppress(FileNotFoundError):
        found = os.statvfs(_SHARED)
        if size > found.f_bavail * found.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(_SHARED))


def _own_files() -> set[Path]:
    """Shared memory of this process that still has a name: torch takes it away at once, but for files by name."""
    return set(_SHARED.glob(f"torch_{os.getpid()}_*"))
