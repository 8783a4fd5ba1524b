"""Adam with gradient clipping by global norm, which skips a non-finite step on all ranks, without a host sync."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from typing_extensions import override

MOMENTS = ("exp_avg", "exp_avg_sq")


class GuardedAdam(torch.optim.Adam):
    """Fused Adam, or AdamW with a weight decay, over the parameters, or parts of them, that this rank holds.

    `sharded`: ranks hold different parts, so the gradient norm is reduced over them.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        clip_norm: float,
        weight_decay: float = 0.0,
    ) -> None:
        groups = [{"params": list(parameters)}]  # torch takes an empty group, of a frozen network, but no empty list
        super().__init__(
            groups,
            lr=learning_rate,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=weight_decay > 0,
            fused=True,
        )
        self.clip_norm = clip_norm
        self._keeps_gradients = False
        self.sharded: dist.ProcessGroup | None = None
        self._loss = torch.tensor(0.0)
        self.grad_norm = torch.tensor(torch.nan)
        self.skipped = torch.tensor(0.0)

    def prepare_step(self, *, learning_rate: float, loss: torch.Tensor) -> None:
        """Set the inputs of the next `step`: its learning rate, and the loss averaged over the ranks, a scalar.

        Until `step` returns, `grad_norm` and `skipped` read as those of a skipped step.
        """
        for group in self.param_groups:
            group["lr"] = learning_rate
        self._loss = loss
        self.grad_norm = torch.full_like(loss, torch.nan)
        self.skipped = torch.ones_like(loss)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Clip and step; change nothing where the loss or the norm is not finite on any rank.

        Sets `grad_norm` (before clipping) and `skipped` (1 or 0), scalars on the loss's device.
        """
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = self._global_norm(gradients)
        self.skipped = 1 - (self._loss + self.grad_norm).isfinite().float()
        if gradients:
            device = gradients[0].device  # the CPU where the optimizer is offloaded
            torch._foreach_mul_(gradients, (self.clip_norm / (self.grad_norm + 1e-6)).clamp(max=1.0).to(device))
            self.found_inf = self.skipped.to(device)  # fused optimizers skip the update where this is 1
            super().step()

    def _global_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        squares = torch.zeros_like(self._loss)
        if gradients:
            squares += torch.stack(torch._foreach_norm(gradients)).square().sum().to(squares.device)
        if self.sharded is not None:
            dist.all_reduce(squares, group=self.sharded)
        return squares.sqrt()

    def keep_gradients(self) -> None:
        """From now on accumulate gradients into tensors owned by the optimizer, zeroed after a step instead of set to
        None.

        By default autograd stores the first output of a backward pass as the gradient itself. Where that tensor lies in
        the memory pool of a CUDA graph, the next micro-batch overwrites it, and the accumulated gradient is silently
        lost.
        """
        self._keeps_gradients = True
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=set_to_none and not self._keeps_gradients)

    def make_state(self, parameters: Iterable[torch.Tensor]) -> None:
        """Initialise zero moments for tensors that this optimizer will step, laid out like them."""
        for parameter in parameters:
            moments = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
            count = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {"step": count, **moments}

    def set_updates(self, updates: int) -> None:
        """Set the number of steps applied so far, which Adam's bias correction depends on."""
        for state in self.state.values():
            state["step"].fill_(updates)
