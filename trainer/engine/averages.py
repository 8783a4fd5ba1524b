"""Exponential moving averages of the weights, each rank averaging the slices that it owns, for any strategy.

Nothing is communicated: the average of a slice needs that slice only. With R ranks it costs 1/R of the memory and the
time, under data parallelism too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma

from trainer.config import TrainConfig
from trainer.engine.slices import ParameterSlice

MAIN = "ema"
Decay = Callable[[int], float]  # of the n-th update, counted from 1


def constant(decay: float) -> Decay:
    """The paper's: always the same."""
    return lambda _: decay


def warm_up(decay: float) -> Decay:
    """Grows with the updates until it is `decay`: 1 - (1 + n)^(-2/3), ema-pytorch's schedule with its defaults."""
    return lambda n: min(decay, 1 - (1 + n) ** (-2 / 3))


def power_function(sigma_rel: float) -> Decay:
    """The profile of Karras et al. 2024 (EDM2, equation 127): (1 - 1/n)^(gamma + 1), for a width of sigma_rel.

    The width is relative to the run so far, however long it is: the average remembers that fraction of it.
    """
    exponent = sigma_rel_to_gamma(sigma_rel) + 1
    return lambda n: (1 - 1 / n) ** exponent


def profiles(config: TrainConfig) -> dict[str, Decay]:
    """The averages that a configuration asks for, by name: "ema", and "ema-0.1" for a sigma_rel of 0.1."""
    main = warm_up(config.ema_decay) if config.ema_warmup else constant(config.ema_decay)
    return {MAIN: main, **{power_name(sigma): power_function(sigma) for sigma in config.ema_sigma_rel}}


def power_name(sigma_rel: float) -> str:
    """Of the average with that profile."""
    return f"{MAIN}-{sigma_rel:g}"


@dataclass
class Average:
    """One average: a tensor, float32, for each owned slice, in the layout of its weights."""

    decay: Decay
    values: list[torch.Tensor]


class Averages:
    """All averages of a run, over the slices that this rank owns; they start as the initial weights."""

    def __init__(self, owned: Sequence[ParameterSlice], decays: dict[str, Decay]) -> None:
        self.owned = list(owned)
        self.by_name = {
            name: Average(decay, [piece.weight.clone() for piece in self.owned]) for name, decay in decays.items()
        }

    @torch.no_grad()
    def squared_distance(self) -> torch.Tensor:
        """Of the main average, over the slices that this rank owns: ||weights - average||^2 and ||weights||^2.

        Returns (2,) float64, where the slices are. Sums over the ranks are those of the whole network.
        """
        if not self.owned:
            return torch.zeros(2, dtype=torch.float64)
        weights = [piece.weight for piece in self.owned]
        pairs = zip(weights, self.by_name[MAIN].values, strict=True)
        # One difference at a time: all of them would be another copy of the weights.
        distances = [torch.linalg.vector_norm(weight - value) for weight, value in pairs]
        norms = torch.stack([torch.stack(distances), torch.stack(torch._foreach_norm(weights))])
        return norms.double().square().sum(dim=1)

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move every average towards the weights: ema <- decay ema + (1 - decay) weights.

        `updates`: how many steps have been applied, this one included.
        """
        weights = [piece.weight for piece in self.owned]
        if not weights:
            return
        for average in self.by_name.values():
            torch._foreach_lerp_(average.values, weights, 1 - average.decay(updates))
