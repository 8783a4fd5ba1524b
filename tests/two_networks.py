"""A family of two networks: DDPM's, which also learns to please a critic, and the critic."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.config import DDPMConfig
from trainer.config.families import FAMILY_SECTIONS
from trainer.diffusion.contract import Batch, Losses, Network, Phase
from trainer.diffusion.ddpm.family import ddpm_objective, ddpm_output_channels
from trainer.diffusion.ddpm.objective import GaussianObjective
from trainer.diffusion.families import FAMILIES, Family, register_family
from trainer.diffusion.keyed_noise import KeyedNoise


class AdversarialConfig(DDPMConfig):
    """DDPM with a critic."""

    kind: Literal["adversarial"] = "adversarial"  # type: ignore[assignment]
    """The family."""
    critic_channels: int = 8
    """Width of the critic."""


class Critic(nn.Module):
    """Images (B, 3, H, W) to a score each, (B,): near 1 for real ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.dense = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.dense(torch.tanh(self.conv(x)).mean(dim=(2, 3))).flatten()
        return score


def critic_of(section: AdversarialConfig, _: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    return {"critic": Critic(section.critic_channels)}


def phases(objective: GaussianObjective) -> list[Phase]:
    def please_the_critic(networks: Mapping[str, Network], batch: Batch, noise: KeyedNoise) -> Losses:
        losses = objective.training_losses(networks["model"], batch, noise)
        score = networks["critic"](networks["model"](batch.x, losses.t))
        return replace(losses, loss=losses.loss + 0.1 * (score - 1).square())

    def tell_apart(networks: Mapping[str, Network], batch: Batch, noise: KeyedNoise) -> Losses:
        t, _ = objective.times.draw(noise)
        with torch.no_grad():
            made = networks["model"](batch.x, t)
        loss = (networks["critic"](batch.x) - 1).square() + networks["critic"](made).square()
        return Losses(t=t, level=torch.zeros_like(loss), loss=loss, weight=None, bound=None)

    return [Phase(trains="model", losses=please_the_critic), Phase(trains="critic", losses=tell_apart)]


def register() -> None:
    """Make the family known in this process, as `kind = "adversarial"`."""
    register_family(
        AdversarialConfig,
        Family(objective=ddpm_objective, output_channels=ddpm_output_channels, networks=critic_of, phases=phases),
    )


@contextmanager
def registered() -> Iterator[None]:
    """The family is known within, and to no other test of this process."""
    register()
    try:
        yield
    finally:
        del FAMILIES["adversarial"], FAMILY_SECTIONS._sections["adversarial"]
