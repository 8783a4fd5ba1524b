"""Arithmetic of the network: autocast around its forward pass, the same whatever wraps the network."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from trainer.errors import ConfigError

MixedPrecision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: MixedPrecision, device: torch.device) -> AbstractContextManager[None]:
    """Run what is inside in `precision`; weights stay float32.

    Each weight is used once in a pass, so nothing is gained by keeping the copies that were cast, but memory lost.
    """
    return torch.autocast(device.type, dtype=_DTYPES.get(precision), enabled=precision in _DTYPES, cache_enabled=False)


def run_in(precision: MixedPrecision, network: nn.Module, device: torch.device) -> None:
    """Make the network's forward pass run under `autocast` and return float32, in place.

    Raises ConfigError where the device cannot.
    """
    if precision == "fp32":
        return
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision = 'fp16': needs a GPU; on a CPU take 'fp32' or 'bf16'")
    forward = network.forward

    def autocast_forward(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with autocast(precision, device):
            return forward(x, t).float()

    network.forward = autocast_forward
