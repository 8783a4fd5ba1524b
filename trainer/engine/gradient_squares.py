"""The squared norm of the gradient of a part of the global batch, for the gradient noise scale.

It is taken where a rank holds such a gradient anyway, before that is averaged over the ranks:

  ddp, accumulating    after the first micro-batch: of `micro_batch` images
  ddp, several ranks   in DistributedDataParallel's communication hook: of global_batch / world_size images
  ddp, neither         there is one gradient, of the whole batch: nothing to compare
  zero*, fsdp2, hsdp   gradients are averaged inside the backward pass, in parts: no rank sees its own
"""

import torch

from trainer.data.stream import BatchLayout
from trainer.engine.strategies import Strategy

_EVERY = 4  # steps: a norm of every small tensor costs more than it tells, when the scale is a mean over hundreds


class GradientSquare:
    """Made once a run; `batch` is the number of images that the gradient is of, None where this step has none."""

    def __init__(self, strategy: Strategy, layout: BatchLayout) -> None:
        self._strategy = strategy
        self._squares: list[torch.Tensor] = []
        self._factor = 1.0
        self._measures = False  # in this step
        self._of_first_micro_batch = layout.accumulation > 1 and strategy.keeps_own_gradients
        self._batch: int | None = None
        if self._of_first_micro_batch:
            self._batch = layout.micro_batch
            self._factor = float(layout.accumulation**2)  # the loss of a micro-batch is divided by their number
        elif layout.world_size > 1 and strategy.before_exchange(lambda gradient: self._add([gradient])):
            self._batch = layout.global_batch // layout.world_size

    @property
    def batch(self) -> int | None:
        """See the class; alike on all ranks."""
        return self._batch if self._measures else None

    def begin_step(self, step: int) -> None:
        """Forget the step before; measure in 0, 4, 8, ..., so that a restart changes nothing."""
        self._squares = []
        self._measures = step % _EVERY == 0

    def after_micro_batch(self, micro_step: int) -> None:
        """To be called when the gradients of micro-batch 0, 1, ... of a step have been added."""
        if self._measures and self._of_first_micro_batch and micro_step == 0:
            self._add([p.grad for p in self._strategy.network.parameters() if p.grad is not None])

    @torch.no_grad()
    def _add(self, gradients: list[torch.Tensor]) -> None:
        if self._measures:
            self._squares.append(torch.stack(torch._foreach_norm(gradients)).square().sum())

    def read(self) -> torch.Tensor:
        """|g|^2 on this rank in this step, a float32 scalar on its device; 0 where `batch` is None."""
        device, scaler = self._strategy.device, self._strategy.scaler
        if not self._squares:
            return torch.zeros((), device=device)
        square = self._factor * torch.stack(self._squares).sum()
        # The scaler multiplies whatever it is given: the only way to its scale that does not wait for it.
        return square if scaler is None else square / scaler.scale(torch.ones((), device=device)).square()
