"""The UNet of ADM (Dhariwal and Nichol 2021, section 3 and table 4): eps_theta(x_t, t), perhaps given a class, or an
image of lower resolution to upsample.

Its published sizes: ImageNet 64 x 64 295.9 M parameters, 128 421.5 M, 256 553.8 M, 512 559.0 M; LSUN 552.8 M.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from trainer.config.backbones import ADMConfig, ADMUNetConfig
from trainer.models.adm_layers import (
    Downsample,
    Resampling,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
    group_norm,
    zeroed,
)
from trainer.models.stages import Stage

_LEVELS = 1000  # a level of noise in [0, 1] is embedded as a timestep of 0 to 1000


class ADMStage(Stage):
    """Residual blocks, attention and resampling, one after another."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @override
    def compute(self, h: Tensor, temb: Tensor) -> Tensor:  # type: ignore[override]
        """(B, in_channels, H, W), (B, 4 base_channels) -> (B, out_channels, H', W')."""
        for part in self.parts:
            h = part(h, temb) if isinstance(part, ResidualBlock) else part(h)
        return h


class ADMEncoder(nn.Module):
    """The half of the UNet that goes down, and its middle: also the body of the classifier."""

    def __init__(self, section: ADMConfig, in_channels: int) -> None:
        super().__init__()
        self.section = section
        levels = list(zip(section.level_channels, section.level_resolutions, strict=True))
        self.temb = TimeEmbedding(section.base_channels)
        self.conv_in = nn.Conv2d(in_channels, section.level_channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.feature_channels = [section.level_channels[0]]  # of conv_in and of every stage on the way down
        for level, (width, side) in enumerate(levels):
            for _ in range(section.blocks_per_level):
                self.down.append(ADMStage(self.blocks(self.feature_channels[-1], width, side)))
                self.feature_channels.append(width)
            if level < len(levels) - 1:
                self.down.append(ADMStage([self.resampling(width, "down")]))
                self.feature_channels.append(width)
        width = section.level_channels[-1]
        self.middle = ADMStage([self.residual(width, width), self.attention(width), self.residual(width, width)])

    def features(self, x: Tensor, temb: Tensor) -> list[Tensor]:
        """The outputs of conv_in, of every stage on the way down, and of the middle.

        x: (B, in_channels, H, W); temb: (B, 4 base_channels).
        """
        features = [self.conv_in(x)]
        for stage in [*self.down, self.middle]:
            features.append(stage(features[-1], temb))
        return features

    def residual(self, in_channels: int, out_channels: int, resampling: Resampling = "none") -> ResidualBlock:
        """A residual block of this network."""
        return ResidualBlock(
            in_channels,
            out_channels,
            4 * self.section.base_channels,
            groups=self.section.norm_groups,
            dropout=self.section.dropout,
            resampling=resampling,
        )

    def attention(self, channels: int) -> SelfAttention:
        """Attention of this network."""
        section = self.section
        heads = section.heads_of(channels)
        return SelfAttention(channels, groups=section.norm_groups, heads=heads, order=section.attention_order)

    def blocks(self, in_channels: int, out_channels: int, side: int) -> list[nn.Module]:
        """A residual block and, on levels with attention, attention behind it."""
        residual = self.residual(in_channels, out_channels)
        return [residual, self.attention(out_channels)] if side in self.section.attention_resolutions else [residual]

    def resampling(self, channels: int, how: Resampling) -> nn.Module:
        """What leads from one level to the next."""
        if self.section.resblock_updown:
            return self.residual(channels, channels, how)
        return Downsample(channels) if how == "down" else Upsample(channels)


class ADMUNet(ADMEncoder):
    """Predicts the noise in x_t and, with twice the channels, a learned variance.

    One `torch.manual_seed` always gives the same initial weights.
    """

    def __init__(self, section: ADMUNetConfig, out_channels: int) -> None:
        upsamples = section.low_res_size is not None
        super().__init__(section, 2 * section.channels if upsamples else section.channels)
        self.label_embedding: nn.Embedding | None = None
        if section.classes is not None:
            self.label_embedding = nn.Embedding(section.label_rows, 4 * section.base_channels)
        self.upsamples = upsamples
        self.low_res_temb = TimeEmbedding(section.base_channels) if section.low_res_noise else None

        skip_channels = list(self.feature_channels)
        levels = list(zip(section.level_channels, section.level_resolutions, strict=True))
        self.up = nn.ModuleList()
        h_channels = section.level_channels[-1]
        for level, (width, side) in reversed(list(enumerate(levels))):
            for block in range(section.blocks_per_level + 1):
                parts = self.blocks(h_channels + skip_channels.pop(), width, side)
                if level > 0 and block == section.blocks_per_level:
                    parts.append(self.resampling(width, "up"))
                self.up.append(ADMStage(parts))
                h_channels = width

        self.norm_out = group_norm(section.norm_groups, h_channels)
        self.conv_out = zeroed(nn.Conv2d(h_channels, out_channels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        low_res: Tensor | None = None,
        low_res_level: Tensor | None = None,
    ) -> Tensor:
        """x: (B, channels, H, W) floating point; t: (B,) in 0..T-1. Returns (B, out_channels, H, W), as x.

        label: (B,) int64, classes from 0, and `ADMUNetConfig.null_label` for none, where the section has classes;
        low_res: (B, channels, h, w) in [-1, 1] where it has low_res_size; low_res_level: (B,) in [0, 1], the level of
        noise in it, where it has low_res_noise. ValueError where one is missing or unasked.
        """
        for name, given, takes in (
            ("label", label, self.label_embedding is not None),
            ("low_res", low_res, self.upsamples),
            ("low_res_level", low_res_level, self.low_res_temb is not None),
        ):
            if (given is not None) != takes:
                raise ValueError(f"{name}: this network {'needs it' if takes else 'takes none'}")
        temb = self.temb(t, x.dtype)
        if self.label_embedding is not None:
            temb = temb + self.label_embedding(label).to(temb.dtype)
        if self.low_res_temb is not None and low_res_level is not None:
            temb = temb + self.low_res_temb(_LEVELS * low_res_level, x.dtype)
        if low_res is not None:
            x = torch.cat((x, F.interpolate(low_res, size=x.shape[2:], mode="bilinear")), dim=1)
        *skips, h = self.features(x, temb)
        for stage in self.up:
            h = stage(torch.cat((h, skips.pop()), dim=1), temb)
        return self.conv_out(F.silu(self.norm_out(h)))
