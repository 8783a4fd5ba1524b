"""Activation checkpointing of each stage: which keep their activations for the backward pass, which recompute them.

`train.activation_checkpointing` applies to all stages; with "budget", as few stages are checkpointed as make a
micro-batch fit into `train.memory_budget`, first those that save most memory per recomputation time.
"""

import bisect
from functools import partial

import torch
from torch import nn

from trainer.config import Config
from trainer.engine.network.build import build_network
from trainer.engine.network.cost import estimated_peak
from trainer.errors import ConfigError
from trainer.models.backbones import example_inputs
from trainer.models.stages import ActivationCheckpointing, Stage, stages
from trainer.units import as_size


def recompute(network: nn.Module, kinds: list[ActivationCheckpointing]) -> None:
    """Set each stage's activation checkpointing in a network, which may be wrapped; in the order of `stage_kinds`."""
    for stage, kind in zip(stages(network), kinds, strict=True):
        stage.activation_checkpointing = kind


def peak_bytes(config: Config, kinds: list[ActivationCheckpointing], micro_batch: int) -> int:
    """An estimate of weights, gradients and activations of a micro-batch, in bytes; see `estimated_peak`."""

    def build() -> nn.Module:
        network = build_network(config)
        recompute(network, kinds)
        return network

    inputs, is_half = partial(example_inputs, config.model), config.train.precision in ("bf16", "fp16")
    return estimated_peak(build, inputs, batch=micro_batch, bf16=is_half)


def stage_kinds(config: Config, micro_batch: int) -> list[ActivationCheckpointing]:
    """Kind of activation checkpointing of each stage for micro-batches of that size, in the order of the network's
    modules.

    Within a budget, stages become "selective" one by one, then "full", until `peak_bytes` fits. A stage's activations
    grow with its width and its time with the square of it, so the narrow ones come first. Raises ConfigError where the
    budget is too small for that micro-batch.
    """
    with torch.device("meta"):
        parts = stages(build_network(config))
    chosen = config.train.activation_checkpointing
    if chosen != "budget":
        return [chosen] * len(parts)
    budget = config.train.memory_budget
    assert budget is not None
    narrow_first = sorted(range(len(parts)), key=lambda place: _weights(parts[place]))
    moves: list[tuple[int, ActivationCheckpointing]] = [
        *((place, "selective") for place in narrow_first),
        *((place, "full") for place in narrow_first),
    ]

    def after(count: int) -> list[ActivationCheckpointing]:
        kinds: list[ActivationCheckpointing] = ["none"] * len(parts)
        for place, kind in moves[:count]:
            kinds[place] = kind
        return kinds

    def peak(count: int) -> int:
        return peak_bytes(config, after(count), micro_batch)

    count = bisect.bisect_left(range(len(moves) + 1), True, key=lambda count: peak(count) <= budget)
    if count > len(moves):
        raise ConfigError(
            f"train.memory_budget: is {as_size(budget)}, but a micro-batch of {micro_batch} takes "
            f"{as_size(peak(len(moves)))} even if all is recomputed; take a smaller train.micro_batch or a strategy "
            "that shards"
        )
    return after(count)


def _weights(stage: Stage) -> int:
    return sum(parameter.numel() for parameter in stage.parameters())
