"""Squared gradient norm of a part of the global batch, for the gradient noise scale.

It is computed where a rank holds such a gradient without extra work, before it is averaged over the ranks:

  ddp, accumulating    after the first micro-batch: of `micro_batch` images
  ddp, several ranks   in DistributedDataParallel's communication hook: of global_batch / world_size images
  ddp, neither         not measured: the only gradient is that of the whole batch
  zero*, fsdp2, hsdp   not measured: gradients are reduced during the backward pass
"""

import torch

from trainer.data.stream.stream import BatchLayout
from trainer.engine.strategies import DistributedNetwork

_EVERY = 4  # steps between measurements: norms of many small tensors are slow, and the scale is averaged over hundreds


class GradientSquare:
    """Made once a network; `batch` is the number of images that contribute to the gradient, None where none is
    measured.
    """

    def __init__(self, network: DistributedNetwork, layout: BatchLayout) -> None:
        self._network = network
        self._squares: list[torch.Tensor] = []
        self._factor = 1.0
        self._measures = False  # whether this step is measured
        self._of_first_micro_batch = layout.accumulation > 1 and network.keeps_own_gradients
        self._batch: int | None = None
        if self._of_first_micro_batch:
            self._batch = layout.micro_batch
            self._factor = float(layout.accumulation**2)  # undoes the loss's division by the number of micro-batches
        elif layout.world_size > 1 and network.before_exchange(lambda gradient: self._add([gradient])):
            self._batch = layout.global_batch // layout.world_size

    @property
    def batch(self) -> int | None:
        """Images in the measured gradient, None where this step is not measured; the same on all ranks."""
        return self._batch if self._measures else None

    def begin_step(self, step: int) -> None:
        """Reset for the next step. Steps 0, 4, 8, ... are measured, independent of restarts."""
        self._squares = []
        self._measures = step % _EVERY == 0

    def after_micro_batch(self, micro_step: int) -> None:
        """Call after the gradients of micro-batch 0, 1, ... of a step have been accumulated."""
        if self._measures and self._of_first_micro_batch and micro_step == 0:
            self._add([p.grad for p in self._network.module.parameters() if p.grad is not None])

    @torch.no_grad()
    def _add(self, gradients: list[torch.Tensor]) -> None:
        if self._measures:
            self._squares.append(torch.stack(torch._foreach_norm(gradients)).square().sum())

    def read(self, device: torch.device) -> torch.Tensor:
        """|g|^2 on this rank in this step, a float32 scalar on its device; 0 where `batch` is None."""
        scaler = self._network.scaler
        if not self._squares:
            return torch.zeros((), device=device)
        square = self._factor * torch.stack(self._squares).sum()
        # Scaling a constant is the only way to read the GradScaler's factor without synchronising with the device.
        return square if scaler is None else square / scaler.scale(torch.ones((), device=device)).square()
