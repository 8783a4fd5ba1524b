"""Exponential moving averages (EMA) of the weights, sharded over the ranks: each averages the slices that it owns.

Works with every strategy and communicates nothing, since the average of a slice depends on that slice alone. With R
ranks each spends 1/R of the memory and time, under data parallelism too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma

from trainer.config import TrainConfig
from trainer.engine.strategies.parameter_slices import ParameterSlice

MAIN = "ema"
Decay = Callable[[int], float]  # decay at the n-th update, counted from 1


def constant(decay: float) -> Decay:
    """A constant decay, as in the paper (Ho et al. 2020)."""
    return lambda _: decay


def warm_up(decay: float) -> Decay:
    """1 - (1 + n)^(-2/3), bounded above by `decay`: ema-pytorch's warm-up with its default parameters."""
    return lambda n: min(decay, 1 - (1 + n) ** (-2 / 3))


def power_function(sigma_rel: float) -> Decay:
    """The profile of Karras et al. 2024 (EDM2, equation 127): (1 - 1/n)^(gamma + 1), with gamma chosen so that the
    profile's relative width is sigma_rel.

    The width is a fraction of the updates so far, so it grows in proportion to the run.
    """
    exponent = sigma_rel_to_gamma(sigma_rel) + 1
    return lambda n: (1 - 1 / n) ** exponent


def profiles(config: TrainConfig) -> dict[str, Decay]:
    """The configured averages by name: "ema", and for example "ema-0.1" for a sigma_rel of 0.1."""
    main = warm_up(config.ema_decay) if config.ema_warmup else constant(config.ema_decay)
    return {MAIN: main, **{power_name(sigma): power_function(sigma) for sigma in config.ema_sigma_rel}}


def power_name(sigma_rel: float) -> str:
    """Name of the average with a power-function profile of width `sigma_rel`."""
    return f"{MAIN}-{sigma_rel:g}"


@dataclass
class Average:
    """One average: a float32 tensor for each owned slice, laid out like the slice's weights."""

    decay: Decay
    values: list[torch.Tensor]


class Averages:
    """All averages of a run, over the slices that this rank owns; initialised with the initial weights."""

    def __init__(self, owned: Sequence[ParameterSlice], decays: dict[str, Decay]) -> None:
        self.owned = list(owned)
        self.by_name = {
            name: Average(decay, [piece.weight.clone() for piece in self.owned]) for name, decay in decays.items()
        }

    @torch.no_grad()
    def squared_distance(self) -> torch.Tensor:
        """||weights - average||^2 and ||weights||^2 of the main average, over the slices that this rank owns.

        Returns (2,) float64, on the device of the slices. Summed over the ranks, they are the values of the whole
        network.
        """
        if not self.owned:
            return torch.zeros(2, dtype=torch.float64)
        weights = [piece.weight for piece in self.owned]
        pairs = zip(weights, self.by_name[MAIN].values, strict=True)
        # One difference at a time: all at once would need memory for a second copy of the weights.
        distances = [torch.linalg.vector_norm(weight - value) for weight, value in pairs]
        norms = torch.stack([torch.stack(distances), torch.stack(torch._foreach_norm(weights))])
        return norms.double().square().sum(dim=1)

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move every average towards the weights: ema <- decay ema + (1 - decay) weights.

        `updates`: number of optimizer steps applied so far, this one included.
        """
        weights = [piece.weight for piece in self.owned]
        if not weights:
            return
        for average in self.by_name.values():
            torch._foreach_lerp_(average.values, weights, 1 - average.decay(updates))
