"""Adam with the two things that every strategy needs of it: the gradient clipped by its global norm, and a step that
is not finite skipped everywhere, both decided on the device.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")


class GuardedAdam(torch.optim.Adam):
    """Adam (fused) over whatever part of the parameters this rank holds.

    `sharded`: ranks hold different parts, so that the gradient's norm is summed over them.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        clip_norm: float,
    ) -> None:
        super().__init__(parameters, lr=learning_rate, betas=betas, eps=eps, fused=True)
        self.clip_norm = clip_norm
        self._keeps_gradients = False
        self.sharded: dist.ProcessGroup | None = None
        self._loss = torch.tensor(0.0)
        self.grad_norm = torch.tensor(torch.nan)
        self.skipped = torch.tensor(0.0)

    def prepare_step(self, *, learning_rate: float, loss: torch.Tensor) -> None:
        """Say what the next `step` needs to know: its learning rate, and the loss of all ranks, a scalar.

        `grad_norm` and `skipped` are of a step that never was until `step` has been called.
        """
        for group in self.param_groups:
            group["lr"] = learning_rate
        self._loss = loss
        self.grad_norm = torch.full_like(loss, torch.nan)
        self.skipped = torch.ones_like(loss)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Clip and step, or change nothing where the loss or the norm is not finite on any rank.

        Leaves `grad_norm` (before clipping) and `skipped` (1 or 0), scalars on the loss's device.
        """
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = self._global_norm(gradients)
        self.skipped = 1 - (self._loss + self.grad_norm).isfinite().float()
        if gradients:
            device = gradients[0].device  # the host's, where the optimizer is offloaded
            torch._foreach_mul_(gradients, (self.clip_norm / (self.grad_norm + 1e-6)).clamp(max=1.0).to(device))
            self.found_inf = self.skipped.to(device)  # what a fused optimizer asks before it touches anything
            super().step()

    def _global_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        squares = torch.zeros_like(self._loss)
        if gradients:
            squares += torch.stack(torch._foreach_norm(gradients)).square().sum().to(squares.device)
        if self.sharded is not None:
            dist.all_reduce(squares, group=self.sharded)
        return squares.sqrt()

    def keep_gradients(self) -> None:
        """Have gradients in memory of their own from now on, zero instead of None after a step.

        Otherwise autograd takes what a backward pass puts out first for the gradient, and adds to it. Where that is the
        memory of a CUDA graph, the next micro-batch writes over it, and what was accumulated is lost without a word.
        """
        self._keeps_gradients = True
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none=set_to_none and not self._keeps_gradients)

    def make_state(self, parameters: Iterable[torch.Tensor]) -> None:
        """Zero moments for tensors that this optimizer will step, laid out like them."""
        for parameter in parameters:
            moments = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
            count = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {"step": count, **moments}

    def set_updates(self, updates: int) -> None:
        """The number of steps that were applied, which Adam's bias correction needs."""
        for state in self.state.values():
            state["step"].fill_(updates)
