"""The UNet of Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, appendix B): eps_theta(x_t, t).

Where it takes labels, their embedding is added to that of the timestep (Dhariwal and Nichol 2021, section 3.1).
Its sizes in the paper: CIFAR-10 35.7 M parameters, 256 x 256 113.7 M, LSUN bedroom "large" 255.7 M.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from trainer.config.backbones import DDPMUNetConfig
from trainer.models.layers import (
    NEAR_ZERO,
    AttentionBlock,
    Downsample,
    ResidualBlock,
    TimeEmbedding,
    Upsample,
    conv,
    group_norm,
)
from trainer.models.stages import Stage


class UNetStage(Stage):
    """A residual block and, where `attention` is set, self-attention behind it."""

    def __init__(self, config: DDPMUNetConfig, in_channels: int, out_channels: int, *, attention: bool) -> None:
        super().__init__()
        groups = config.norm_groups
        self.residual = ResidualBlock(
            in_channels, out_channels, 4 * config.base_channels, groups=groups, dropout=config.dropout
        )
        self.attention = AttentionBlock(out_channels, groups=groups) if attention else nn.Identity()

    @override
    def compute(self, h: Tensor, temb: Tensor) -> Tensor:  # type: ignore[override]
        """(B, in_channels, H, W), (B, 4 base_channels) -> (B, out_channels, H, W)."""
        return self.attention(self.residual(h, temb))


class UNet(nn.Module):
    """Predicts, in the paper, the noise in x_t. One `torch.manual_seed` always gives the same initial weights.

    Level i works at `image_size / 2^i` pixels with `base_channels * channel_multipliers[i]` channels. It has
    `blocks_per_level` residual blocks on the way down and one more on the way up; behind each of them there is
    self-attention where the level's side in pixels is one of `attention_resolutions`.
    """

    def __init__(self, config: DDPMUNetConfig, out_channels: int) -> None:
        super().__init__()
        self.config = config
        levels = list(zip(config.level_channels, config.level_resolutions, strict=True))

        self.temb = TimeEmbedding(config.base_channels)
        self.conv_in = conv(config.channels, config.base_channels, 3, padding=1)

        # Every layer on the way down leaves its output for one stage on the way up, conv_in included.
        skip_channels = [config.base_channels]
        self.down = nn.ModuleList()
        for level, (width, resolution) in enumerate(levels):
            for _ in range(config.blocks_per_level):
                attention = resolution in config.attention_resolutions
                self.down.append(UNetStage(config, skip_channels[-1], width, attention=attention))
                skip_channels.append(width)
            if level < len(levels) - 1:
                self.down.append(Downsample(width))
                skip_channels.append(width)

        width = config.level_channels[-1]
        self.middle = nn.ModuleList(UNetStage(config, width, width, attention=attention) for attention in (True, False))

        self.up = nn.ModuleList()
        h_channels = width
        for level, (width, resolution) in reversed(list(enumerate(levels))):
            for _ in range(config.blocks_per_level + 1):
                attention = resolution in config.attention_resolutions
                self.up.append(UNetStage(config, h_channels + skip_channels.pop(), width, attention=attention))
                h_channels = width
            if level > 0:
                self.up.append(Upsample(width))

        self.norm_out = group_norm(config.norm_groups, h_channels)
        self.conv_out = conv(h_channels, out_channels, 3, padding=1, scale=NEAR_ZERO)
        self.label_embedding: nn.Embedding | None = None
        if config.classes is not None:
            self.label_embedding = nn.Embedding(config.label_rows, 4 * config.base_channels)

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor | None = None) -> Tensor:
        """x: (B, channels, H, W) floating point; t: (B,) int64 in 0..T-1. Returns (B, out_channels, H, W), as x.

        label: (B,) int64, classes from 0, and `DDPMUNetConfig.null_label` for none, where the section has classes.
        ValueError where it is missing or unasked.
        """
        if (label is None) != (self.label_embedding is None):
            raise ValueError(f"label: this network {'takes none' if self.label_embedding is None else 'needs it'}")
        temb = self.temb(t, x.dtype)
        if self.label_embedding is not None:
            temb = temb + self.label_embedding(label).to(temb.dtype)
        skips = [self.conv_in(x)]
        for layer in self.down:
            skips.append(_run(layer, skips[-1], temb))
        h = skips[-1]
        for layer in self.middle:
            h = _run(layer, h, temb)
        for layer in self.up:
            if not isinstance(layer, Upsample):
                h = torch.cat((h, skips.pop()), dim=1)
            h = _run(layer, h, temb)
        return self.conv_out(F.silu(self.norm_out(h)))


def _run(layer: nn.Module, h: Tensor, temb: Tensor) -> Tensor:
    return layer(h) if isinstance(layer, Downsample | Upsample) else layer(h, temb)
