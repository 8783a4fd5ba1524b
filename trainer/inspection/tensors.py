"""Statistics of stored tensors and of their differences, read in pieces to bound memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainer.engine.state.tensor_files import TensorReader

_PIECE = 1 << 20  # elements; 4 MiB in float32


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of a tensor's elements, in float64: `norm` is Euclidean; NaN are excluded from all but `nans`.

    `minimum` and `maximum` are NaN where no element is left.
    """

    norm: float
    minimum: float
    maximum: float
    nans: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Differences of two tensors of the same shape. `equal`: bit for bit. `largest`: max |a - b|, NaN where only one of
    two elements is NaN; `relative`: the same divided by max(max |a|, max |b|).
    """

    equal: bool
    largest: float
    relative: float


def statistics(reader: TensorReader, name: str) -> Statistics:
    """Statistics of one tensor, read in pieces."""
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
    """Whether all elements of a tensor are finite as float32; stops reading at the first that is not."""
    return all(bool(piece.float().isfinite().all()) for piece in _pieces(reader, name))


def difference(one: TensorReader, other: TensorReader, name: str) -> Difference:
    """Difference of a tensor that two checkpoints both have, in the same shape."""
    equal, largest, scale = True, 0.0, 0.0
    for a, b in zip(_pieces(one, name), _pieces(other, name), strict=True):
        if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            scale = max(scale, _largest(a))
            continue
        equal = False
        a, b = a.double(), b.double()
        scale = max(scale, _largest(a), _largest(b))
        # Equal infinities, and NaN in both places, are no difference.
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
    return values.contiguous().view(torch.uint8)  # compared as bytes, since NaN is not equal to itself
