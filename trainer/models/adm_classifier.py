"""ADM's classifier of noisy images, p(y | x_t) (Dhariwal and Nichol 2021, section 4): the encoder and a pool."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trainer.config.backbones import ADMClassifierConfig
from trainer.models.adm_layers import attend, group_norm, zeroed
from trainer.models.adm_unet import ADMEncoder

_SPATIAL_UNITS = 2048


class AttentionPool(nn.Module):
    """Attention over the pixels and their mean; the class is read from the mean's token."""

    def __init__(self, section: ADMClassifierConfig) -> None:
        super().__init__()
        channels, pixels = section.level_channels[-1], section.level_resolutions[-1] ** 2
        self.heads = section.heads_of(channels)
        self.norm = group_norm(section.norm_groups, channels)
        self.positional_embedding = nn.Parameter(torch.randn(channels, pixels + 1) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, section.classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Outputs of the encoder's stages, the last (B, C, H, W) -> logits (B, classes)."""
        pixels = rearrange(F.silu(self.norm(features[-1])), "b c h w -> b (h w) c")
        tokens = torch.cat((pixels.mean(dim=1, keepdim=True), pixels), dim=1) + self.positional_embedding.T
        return self.out(attend(self.qkv(tokens), self.heads, "new")[:, 0])


class AdaptivePool(nn.Module):
    """The mean over the pixels and a linear layer, which is 0 at first: every class is then equally likely."""

    def __init__(self, section: ADMClassifierConfig) -> None:
        super().__init__()
        channels = section.level_channels[-1]
        self.norm = group_norm(section.norm_groups, channels)
        self.out = zeroed(nn.Linear(channels, section.classes))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Outputs of the encoder's stages, the last (B, C, H, W) -> logits (B, classes)."""
        return self.out(F.silu(self.norm(features[-1])).mean(dim=(2, 3)))


class SpatialPool(nn.Module):
    """The means over the pixels of every stage's output, and two linear layers."""

    def __init__(self, section: ADMClassifierConfig, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, _SPATIAL_UNITS)
        self.out = nn.Linear(_SPATIAL_UNITS, section.classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Outputs (B, C_i, H_i, W_i) of the encoder's stages -> logits (B, classes)."""
        means = torch.cat([h.mean(dim=(2, 3)) for h in features], dim=1)
        return self.out(F.relu(self.hidden(means)))


class ADMClassifier(ADMEncoder):
    """Logits of the class of x_t. One `torch.manual_seed` always gives the same initial weights."""

    def __init__(self, section: ADMClassifierConfig) -> None:
        super().__init__(section, section.channels)
        self.pool: AttentionPool | AdaptivePool | SpatialPool
        if section.pool == "spatial":
            self.pool = SpatialPool(section, sum(self.feature_channels) + section.level_channels[-1])
        else:
            self.pool = (AttentionPool if section.pool == "attention" else AdaptivePool)(section)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, channels, H, W) floating point; t: (B,) in 0..T-1. Returns logits (B, classes).

        With the pool "attention" H and W must be the section's image_size.
        """
        return self.pool(self.features(x, self.temb(t, x.dtype)))
