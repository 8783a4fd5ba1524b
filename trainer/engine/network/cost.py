"""FLOPs and peak memory of a network, measured on fake tensors: they have shapes and lifetimes, but no data."""

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs count a multiply-add as two. `peak_bytes`: weights, gradients and activations of one micro-batch."""

    parameters: int
    forward_flops_per_image: int
    training_flops_per_image: int
    peak_bytes: int


Inputs = Callable[[int], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""For a number of samples, inputs of a network: x, t and conditioning; made by functions of torch."""


class Flops(NamedTuple):
    """FLOPs for one image; a multiply-add is two."""

    forward: int
    training: int


def training_flops(build: Callable[[], nn.Module], inputs: Inputs) -> Flops:
    """FLOPs of one forward, and of a forward and backward pass, over one sample.

    Counted on fake tensors, without autocast and activation checkpointing: recomputation is not included.
    """
    with torch.device("meta"):
        network = build().eval()
        x, t, cond = inputs(1)
    with sdpa_kernel(SDPBackend.MATH):  # FlopCounterMode does not count fused attention on CPUs
        with FlopCounterMode(display=False) as forward:
            prediction = network(x, t, **cond)
        with FlopCounterMode(display=False) as backward:
            prediction.square().mean().backward()
    return Flops(forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops())


def measure(build: Callable[[], nn.Module], inputs: Inputs, *, batch: int, bf16: bool) -> Cost:
    """Cost of a forward and backward pass over `batch` samples; allocates no tensor data."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    flops = training_flops(build, inputs)
    return Cost(
        parameters=parameters,
        forward_flops_per_image=flops.forward,
        training_flops_per_image=flops.training,
        peak_bytes=foretold_peak(build, inputs, batch=batch, bf16=bf16),
    )


def foretold_peak(build: Callable[[], nn.Module], inputs: Inputs, *, batch: int, bf16: bool) -> int:
    """An estimate of `Cost.peak_bytes` alone."""
    with FakeTensorMode():
        network = build()
        precision = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
        with _PeakMemory() as memory:
            x, t, cond = inputs(batch)
            with precision:
                loss = network(x, t, **cond).float().square().mean()
            loss.backward()
    return 4 * sum(parameter.numel() for parameter in network.parameters()) + memory.peak


class _PeakMemory(TorchDispatchMode):
    """Tracks the peak of the bytes held by tensors that are created inside this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.held -= size
