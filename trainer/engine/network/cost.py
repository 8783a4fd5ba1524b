"""FLOPs and peak memory of a network, measured on fake tensors: they have shapes and lifetimes, but no data."""

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Inputs = Callable[[int], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""For a number of samples, inputs of a network: x, t and conditioning; made by functions of torch."""


class Cost(NamedTuple):
    """Of a network: FLOPs for one image, a multiply-add being two, and its number of parameters."""

    forward_flops: int
    training_flops: int
    parameters: int


def cost_of(build: Callable[[], nn.Module], inputs: Inputs) -> Cost:
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
    flops = forward.get_total_flops()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(flops, flops + backward.get_total_flops(), parameters)


def estimated_peak(build: Callable[[], nn.Module], inputs: Inputs, *, batch: int, bf16: bool) -> int:
    """An estimate of the bytes of weights, gradients and activations for `batch` samples; allocates no tensor data."""
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
