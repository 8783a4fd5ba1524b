"""Statistics of stored tensors and of their differences, read a piece at a time: memory stays small."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainer.engine.tensor_files import TensorReader

_PIECE = 1 << 20  # elements; of float32 4 MiB


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of one tensor's elements, in float64: `norm` is Euclidean; NaN count in none but `nans`.

    `minimum` and `maximum` are NaN where there is no element to take them of.
    """

    norm: float
    minimum: float
    maximum: float
    nans: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two tensors of one shape. `equal`: bit for bit. `largest`: max |a - b|, NaN where only one of two elements is
    NaN; `relative`: the same over max(max |a|, max |b|).
    """

    equal: bool
    largest: float
    relative: float


def statistics(reader: TensorReader, name: str) -> Statistics:
    """Read one tensor through."""
    squares, minimum, maximum, nans = 0.0, math.inf, -math.inf, 0
    for piece in _pieces(reader, name):
        values = piece[~piece.isnan()].double()
        nans += piece.numel() - values.numel()
        if values.numel():
            squares += values.square().sum().item()
            minimum, maximum = min(minimum, values.min().item()), max(maximum, values.max().item())
    if minimum > maximum:
        minimum = maximum = math.nan
    return Statistics(norm=math.sqrt(squares), minimum=minimum, maximum=maximum, nans=nans)


def is_finite(reader: TensorReader, name: str) -> bool:
    """Whether all elements of one tensor are, as float32; read through until one is not."""
    return all(bool(piece.float().isfinite().all()) for piece in _pieces(reader, name))


def difference(one: TensorReader, other: TensorReader, name: str) -> Difference:
    """Read a tensor of two checkpoints side by side; both have it, in one shape."""
    equal, largest, scale = True, 0.0, 0.0
    for a, b in zip(_pieces(one, name), _pieces(other, name), strict=True):
        if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            scale = max(scale, _largest(a))
            continue
        equal = False
        a, b = a.double(), b.double()
        scale = max(scale, _largest(a), _largest(b))
        # Infinities of one sign and NaN in both places are no difference.
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).abs().max().item()
        largest = apart if math.isnan(apart) or apart > largest else largest
        if math.isnan(largest):
            break
    return Difference(equal=equal, largest=largest, relative=largest / scale if scale else largest)


def _pieces(reader: TensorReader, name: str) -> Iterator[torch.Tensor]:
    count = reader.shapes[name].numel()
    for start in range(0, count, _PIECE):
        yield reader.read(name, start, min(start + _PIECE, count))


def _largest(values: torch.Tensor) -> float:
    finite = values[~values.isnan()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)  # NaN is not equal to itself
