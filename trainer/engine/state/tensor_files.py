"""Tensors in safetensors files, whole or in slices: written by some number of ranks, read by any other.

A tensor that a rank holds whole is stored under its name, readable by any program. A slice is stored flat under
"name[start:stop]", with indices in row-major order. Which file holds a tensor is recorded only in the files' headers.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from trainer.errors import CheckpointError

_SLICE = re.compile(r"(.+)\[(\d{1,18}):(\d{1,18})\]")
_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_MOST_HEADER_BYTES = 1 << 24  # for a hundred thousand tensors; parsing a larger one takes too long


class SavedSlice(NamedTuple):
    """Elements of a tensor from `start` on: `values` in any memory format, `shape` of the whole tensor."""

    name: str
    shape: torch.Size
    start: int
    values: torch.Tensor

    @property
    def key(self) -> str:
        """Key of the slice in the file."""
        if self.values.numel() == self.shape.numel():
            return self.name
        return f"{self.name}[{self.start}:{self.start + self.values.numel()}]"


@dataclass(frozen=True)
class _Stored:
    start: int
    stop: int
    file: Any
    key: str
    is_whole: bool


class TensorReader:
    """Reads tensors, or slices of them, from a set of files on demand.

    `shapes`: the expected tensors. Raises CheckpointError where a file is no safetensors file, or a tensor has another
    shape, a dtype that no state has, a gap or an overlap.
    """

    def __init__(self, paths: Sequence[Path], shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self._stored: dict[str, list[_Stored]] = {name: [] for name in shapes}
        for path in paths:
            check_header(path)
            try:
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118  # safe_open is no mapping
                    self._add(key, file, path)
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{path.name}: no tensors that can be read ({error})") from error
        for name, parts in self._stored.items():
            parts.sort(key=lambda part: part.start)
            ends = [0, *(part.stop for part in parts)]
            if [part.start for part in parts] != ends[:-1] or ends[-1] != self.shapes[name].numel():
                have = ", ".join(f"{part.start}:{part.stop}" for part in parts) or "nothing"
                raise CheckpointError(f"{name}: {have} of {self.shapes[name].numel()} elements are there")

    def _add(self, key: str, file: Any, path: Path) -> None:
        match = _SLICE.fullmatch(key)
        name = match[1] if match else key
        if name not in self.shapes:
            raise CheckpointError(f"{path.name}: holds {name}, which the manifest does not know")
        start, stop = (int(match[2]), int(match[3])) if match else (0, self.shapes[name].numel())
        stored = file.get_slice(key)
        if stored.get_dtype() not in _TYPES:
            raise CheckpointError(f"{path.name}: {key}: of type {stored.get_dtype()}, which no state has")
        shape = list(stored.get_shape())
        if shape != ([stop - start] if match else list(self.shapes[name])):
            raise CheckpointError(f"{path.name}: {key}: shape {shape}, the manifest says {list(self.shapes[name])}")
        if start < stop or not self.shapes[name].numel():
            self._stored[name].append(_Stored(start, stop, file, key, match is None))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of a tensor, flattened."""
        parts = [
            _read_part(part, self.shapes[name], max(start, part.start), min(stop, part.stop))
            for part in self._stored[name]
            if part.start < stop and start < part.stop
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def whole(self, name: str) -> torch.Tensor:
        """A whole tensor in its shape."""
        return self.read(name, 0, self.shapes[name].numel()).view(self.shapes[name])


def check_header(path: Path) -> None:
    """Raise CheckpointError where a file's header is not valid safetensors; called before the library parses it."""
    try:
        with path.open("rb") as stream:
            size, start = os.fstat(stream.fileno()).st_size, stream.read(8)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error})") from error
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise CheckpointError(f"{path.name}: no safetensors file: {size} bytes, its header would take {length}")
    if length > _MOST_HEADER_BYTES:
        raise CheckpointError(f"{path.name}: a header of {length} bytes; of a network's tensors it is far smaller")


def _read_part(part: _Stored, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    if not part.is_whole:
        return part.file.get_slice(part.key)[start - part.start : stop - part.start]
    if len(shape) == 0 or (start, stop) == (part.start, part.stop):
        return part.file.get_tensor(part.key).view(-1)
    row = shape.numel() // shape[0]
    first = start // row
    rows = part.file.get_slice(part.key)[first : -(-stop // row)]
    return rows.reshape(-1)[start - first * row : stop - first * row]


def row_by_row_copy(slices: Iterable[SavedSlice]) -> dict[str, torch.Tensor]:
    """Copies of slices in the host's memory by key, row-major as stored."""
    copies = {}
    for piece in slices:
        values = piece.values.detach()
        on_device = values.device.type != "cpu"
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_device)
        copy.copy_(values, non_blocking=on_device)
        copies[piece.key] = copy.view(piece.shape) if piece.key == piece.name else copy.view(-1)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies
