"""The family "classifier": p(y | x_t), the class of a noisy image (Dhariwal and Nichol 2021, section 4)."""

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from trainer.config.families import ClassifierConfig
from trainer.diffusion.contract import Batch, Conditioning, Losses, Network, Objective
from trainer.diffusion.ddpm.family import ddpm_diffusion
from trainer.diffusion.ddpm.timesteps import UniformTimesteps
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.diffusion.time_distribution import TimeDistribution

ACCURACY = "accuracy"


class ClassifierObjective(Objective):
    """Cross-entropy, in nats, of the class of x_t, which is drawn from q(x_t | x_0) at uniform t."""

    def __init__(self, section: ClassifierConfig, device: torch.device) -> None:
        self.diffusion = ddpm_diffusion(section, device)
        self.times: TimeDistribution = UniformTimesteps(section.timesteps)
        self.validation_times: TimeDistribution = self.times
        self.bound_terms: int | None = None

    @override
    def training_losses(
        self, network: Network, batch: Batch, noise: KeyedNoise, *, times: TimeDistribution | None = None
    ) -> Losses:
        """-log softmax(network(x_t, t))[label] of each image, and whether the label has the largest logit: 1 or 0.

        network: gives logits (B, K) at x_t (B, C, H, W) float32 and t (B,) int64; batch: `cond` has "label", (B,) int64
        below K; noise: has "t" and "eps".
        """
        t, weight = (self.times if times is None else times).draw(noise)
        x_t = self.diffusion.q_sample(batch.x, t, noise.normal("eps", tuple(batch.x.shape[1:])))
        logits: Tensor = network(x_t, t).float()
        label = batch.cond["label"]
        return Losses(
            t=t,
            level=t.float() / self.diffusion.timesteps,
            loss=F.cross_entropy(logits, label, reduction="none"),
            weight=weight,
            bound=None,
            figures={ACCURACY: (logits.argmax(dim=1) == label).float()},
        )

    @override
    def denoiser(self, network: Network, cond: Conditioning | None = None, *, respacing: str = "all") -> NoReturn:
        """TypeError: a classifier predicts no x_0. Callers refuse its runs by `ModelConfig.classifies`."""
        raise TypeError("a classifier predicts no x_0")
