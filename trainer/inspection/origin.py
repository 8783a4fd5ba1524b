"""Finds the module of a network where the first NaN or infinity occurs, in the forward and in the backward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A module, by its name and class, and the positions of the samples that are not finite there.

    In the forward pass it is the first module whose output is not finite. In the backward pass it is the first module
    that receives a gradient that is not finite, so the cause is a module that uses its output.
    """

    module: str
    kind: str
    positions: list[int]


class Watch:
    """A context that watches a forward pass of a network and the following backward pass. It synchronises with the
    device, so it is not used in training.

    positions: of the samples in the micro-batch, in order.
    """

    def __init__(self, network: nn.Module, positions: Sequence[int]) -> None:
        self.forward: Origin | None = None
        self.backward: Origin | None = None
        self._network = network
        self._positions = positions
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._network.named_modules():
            self._handles.append(module.register_forward_hook(self._on_output(name or "the network")))
        return self

    def __exit__(self, *_: object) -> None:
        """End of the forward pass: recomputation by activation checkpointing in the backward pass is not watched."""
        for handle in self._handles:
            handle.remove()

    def _on_output(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Submodules complete before their parent, so the innermost module is recorded first."""

        def look(module: nn.Module, _: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            self.forward = self.forward or self._look(name, module, output)
            if output.requires_grad:
                output.register_hook(lambda gradient: self._on_gradient(name, module, gradient))

        return look

    def _on_gradient(self, name: str, module: nn.Module, gradient: Tensor) -> None:
        self.backward = self.backward or self._look(name, module, gradient)

    def _look(self, name: str, module: nn.Module, tensor: Tensor) -> Origin | None:
        finite = tensor.detach().isfinite()
        if finite.all():
            return None
        if len(finite) != len(self._positions):  # not one row per sample
            return Origin(module=name, kind=type(module).__name__, positions=list(self._positions))
        rows = (~finite).flatten(1).any(dim=1).tolist()
        positions = [position for position, bad in zip(self._positions, rows, strict=True) if bad]
        return Origin(module=name, kind=type(module).__name__, positions=positions)


@dataclass(frozen=True, kw_only=True)
class GradientNorm:
    """Norm of the gradient of a module's parameters, and the number of its elements that are not finite."""

    module: str
    norm: float
    nonfinite: int


def gradient_norms(network: nn.Module, *, divided_by: float = 1.0) -> list[GradientNorm]:
    """Gradient norms of the network's modules at the first two levels ("conv_in", "down.0", ...), in order.

    divided_by: the loss scale. Parameters without a gradient count as zero.
    """
    squares: dict[str, float] = {}
    nonfinite: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        module = ".".join(name.split(".")[:-1][:2])
        gradient = (parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)) / divided_by
        squares[module] = squares.get(module, 0.0) + gradient.double().square().sum().item()
        nonfinite[module] = nonfinite.get(module, 0) + int((~gradient.isfinite()).sum())
    return [
        GradientNorm(module=module, norm=square**0.5, nonfinite=nonfinite[module]) for module, square in squares.items()
    ]
