"""Async save of this rank's part of the state: copied at once, then written to disk by a thread."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trainer.engine.checkpointing import sealed
from trainer.engine.processes.background import BackgroundTask
from trainer.engine.state.tensor_files import SavedSlice, row_by_row_copy
from trainer.errors import CheckpointError


class Saving:
    """A sealed folder being written: this rank's part, and the content of its manifest."""

    def __init__(
        self, staging: Path, final: Path, content: Mapping[str, Any], part: Path, slices: Iterable[SavedSlice]
    ) -> None:
        self.staging = staging
        self.final = final
        self.content = dict(content)
        tensors = row_by_row_copy(slices)
        self._task = BackgroundTask(lambda: _write_part(part, tensors), name=f"save {final.name}", phase="save")

    @property
    def is_written(self) -> bool:
        """Whether the write of this rank's part has ended, successfully or not."""
        return not self._task.is_running

    def record(self) -> sealed.FileRecord:
        """Wait for this rank's part; returns its size and hash. Raises the error of the write."""
        return self._task.result()


def _write_part(path: Path, tensors: Mapping[str, torch.Tensor]) -> sealed.FileRecord:
    """Write, then read back from the disk and compare: the hash is that of verified bytes."""
    save_file(dict(tensors), path)
    sealed.fsync(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read from the disk
    finally:
        os.close(descriptor)
    record = sealed.record_file(path)
    for key, found in load_file(path).items():
        if not torch.equal(_bytes(found), _bytes(tensors[key])):
            raise CheckpointError(f"{path}: {key} was read back differently than it was written; is the disk sound?")
    return record


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # compared as bytes, since NaN is not equal to itself
