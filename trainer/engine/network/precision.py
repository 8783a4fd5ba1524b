"""Precision of the network's arithmetic: autocast around its forward pass, however the network is wrapped."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from trainer.errors import ConfigError

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Run what is inside in `precision`; weights stay float32.

    The cache of cast weights is off: each weight is used once in a pass, so caching would only cost memory.
    """
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def run_in(precision: Precision, network: nn.Module, device: torch.device) -> None:
    """Wrap the network's forward pass in `autocast` and return its output in float32, in place.

    Raises ConfigError where the device does not support the precision.
    """
    if precision in ("tf32", "fp16") and device.type == "cpu":
        raise ConfigError(f"train.precision = '{precision}': needs a GPU; on a CPU take 'fp32' or 'bf16'")
    multiply_float32("tf32" if precision == "tf32" else "ieee")
    if precision not in _AUTOCAST:
        return
    forward = network.forward

    def autocast_forward(*inputs: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        with autocast(precision, device):
            return forward(*inputs, **cond).float()

    network.forward = autocast_forward


def multiply_float32(how: Literal["ieee", "tf32"]) -> None:
    """Set how GPUs multiply float32 matrices in this process: in float32, or rounded to TF32 (10 bits of mantissa).

    Set for convolutions too, for which PyTorch uses TF32 by default.
    """
    torch.backends.cuda.matmul.fp32_precision = how
    torch.backends.cudnn.conv.fp32_precision = how  # type: ignore[attr-defined]  # missing from torch's stubs


def cpu_lacks_bf16() -> bool:
    """Whether this CPU emulates bfloat16 by float32 (it has neither AVX512-BF16 nor AMX), which is slower."""
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
