"""How the times to train on are drawn: the interface, and times that were drawn before."""

from abc import ABC, abstractmethod

from torch import Tensor
from typing_extensions import override

from trainer.diffusion.keyed_noise import KeyedNoise


class TimeDistribution(ABC):
    """How t is drawn, and what is recorded of the losses: nothing, unless overridden."""

    @abstractmethod
    def draw(self, noise: KeyedNoise) -> tuple[Tensor, Tensor | None]:
        """t, (B,), from what `noise` has for "t"; and the weight of its loss, (B,) float32, None for 1."""

    def record(self, t: Tensor, losses: Tensor) -> None:  # noqa: B027  # most ways to draw t learn nothing
        """Record the unweighted losses of a global batch: t (B,), losses (B,) float32."""

    def tensors(self) -> dict[str, Tensor]:
        """What was recorded."""
        return {}


class GivenTimes(TimeDistribution):
    """Times and weights that were drawn before: t (B,), weight (B,) float32 or None for 1."""

    def __init__(self, t: Tensor, weight: Tensor | None = None) -> None:
        self.t = t
        self.weight = weight

    @override
    def draw(self, noise: KeyedNoise) -> tuple[Tensor, Tensor | None]:
        return self.t, self.weight
