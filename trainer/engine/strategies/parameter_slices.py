"""Slices: the parameters as this rank holds them, whole or in part; each element is owned by exactly one rank.

Every strategy is described by a list of slices. Averages and checkpoints are written in terms of slices, so they are
independent of the strategy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from trainer.engine.processes.collectives import gather


@dataclass(frozen=True, kw_only=True)
class ParameterSlice:
    """The part of one parameter that this rank holds: elements `start` to `stop`, in row-major order.

    `storage` is the float32 tensor that the optimizer steps unless the parameter is frozen: the parameter itself, its
    local shard, or a flat partition that holds slices of many parameters, this one from `offset` on.
    """

    name: str
    shape: torch.Size
    start: int
    stop: int
    storage: torch.Tensor
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements in the slice."""
        return self.stop - self.start

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """View of the slice's elements in a tensor that is laid out like `storage`, for example a moment."""
        if tensor.numel() == self.numel:
            return tensor
        return tensor.view(-1).narrow(0, self.offset, self.numel)

    @property
    def weight(self) -> torch.Tensor:
        """View of the master weights, float32."""
        return self.of(self.storage.detach())


def whole_slices(model: nn.Module) -> list[ParameterSlice]:
    """A slice for each parameter, of all its elements."""
    return [
        ParameterSlice(name=name, shape=p.shape, start=0, stop=p.numel(), storage=p)
        for name, p in model.named_parameters()
    ]


def fill(values: torch.Tensor, elements: torch.Tensor) -> None:
    """Set a slice's values, in any memory format, from (numel,) elements in row-major order."""
    values.copy_(elements.view(values.shape))


def owned(slices: Sequence[ParameterSlice]) -> list[ParameterSlice]:
    """The slices that this rank owns: among the ranks that hold a slice, the one with the fewest owned elements owns
    it.

    Collective. Slices of different ranks must be equal or disjoint.
    """
    holders: dict[tuple[str, int, int], list[int]] = {}
    everyone = gather([(piece.name, piece.start, piece.stop) for piece in slices])
    for rank, keys in enumerate(everyone):
        for key in keys:
            holders.setdefault(key, []).append(rank)
    load = [0] * len(everyone)
    owner: dict[tuple[str, int, int], int] = {}
    for key in sorted(holders, key=lambda key: (key[1] - key[2], key)):  # the largest first
        owner[key] = min(holders[key], key=lambda rank: load[rank])
        load[owner[key]] += key[2] - key[1]
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [piece for piece in slices if owner[piece.name, piece.start, piece.stop] == rank]


def assemble(
    shapes: dict[str, torch.Size], parts: Iterable[tuple[ParameterSlice, torch.Tensor]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Whole float32 tensors on every rank, from the slices that each rank owns. Collective.

    Owned slices of different ranks are disjoint, so an all-reduce by sum over zero-filled tensors assembles them.
    """
    whole = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    for piece, values in parts:
        whole[piece.name].view(-1)[piece.start : piece.stop] = values.reshape(-1)
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in whole.values():
            dist.all_reduce(tensor)
    return whole
