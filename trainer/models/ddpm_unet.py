"""The UNet of Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020, appendix B): eps_theta(x_t, t).

Where it takes labels, their embedding is added to that of the timestep (Dhariwal and Nichol 2021, section 3.1).
Its sizes in the paper: CIFAR-10 35.7 M parameters, 256 x 256 113.7 M, LSUN bedroom "large" 255.7 M.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from trainer.config.backbones import DDPMUNetConfig
from trainer.errors import ConfigError
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


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a UNet. The defaults are the paper's CIFAR-10 network but for `image_size` and `dropout`.

    Level i works at `image_size / 2^i` pixels with `base_channels * channel_multipliers[i]` channels. It has
    `blocks_per_level` residual blocks on the way down and one more on the way up; behind each of them there is
    self-attention where the level's side in pixels is one of `attention_resolutions`.

    Raises ValueError where no such network exists.
    """

    image_size: int
    channels: int = 3  # of the image: 3 for RGB, 1 for grey
    out_channels: int | None = None  # of the output; None: as many as the image has
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    norm_groups: int = 32
    labels: int = 0  # that have an embedding, the null class included; 0: it takes none

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "base_channels", "blocks_per_level", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers={self.channel_multipliers}: must be whole numbers from 1, one a level"
            )
        if self.base_channels < 4 or self.base_channels % 2:
            raise ValueError(f"base_channels={self.base_channels}: must be even and at least 4, for sines and cosines")
        for width in self.level_channels:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups={self.norm_groups}: must divide every level's channels, here {width}")
        coarsest = 2 ** (len(self.channel_multipliers) - 1)
        if self.image_size % coarsest:
            raise ValueError(
                f"image_size={self.image_size}: must be a multiple of {coarsest}, "
                f"since {len(self.channel_multipliers)} levels halve it {len(self.channel_multipliers) - 1} times"
            )
        for resolution in self.attention_resolutions:
            if resolution not in self.level_resolutions:
                raise ValueError(
                    f"attention_resolutions={self.attention_resolutions}: {resolution} is no level's side, "
                    f"must be among {self.level_resolutions}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        """Side in pixels of each level, finest first."""
        return tuple(self.image_size // 2**level for level in range(len(self.channel_multipliers)))


class UNetStage(Stage):
    """A residual block and, where `attention` is set, self-attention behind it."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, *, attention: bool) -> None:
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
    """Predicts, in the paper, the noise in x_t. One `torch.manual_seed` always gives the same initial weights."""

    def __init__(self, config: UNetConfig) -> None:
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
        self.conv_out = conv(h_channels, config.out_channels or config.channels, 3, padding=1, scale=NEAR_ZERO)
        self.label_embedding = nn.Embedding(config.labels, 4 * config.base_channels) if config.labels else None

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor | None = None) -> Tensor:
        """x: (B, channels, H, W) floating point; t: (B,) int64 in 0..T-1; label: (B,) int64 in 0..labels-1, where the
        network takes labels. Returns (B, out_channels, H, W), as x.
        """
        temb = self.temb(t, x.dtype)
        if self.label_embedding is not None:
            assert label is not None
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


def unet_config(model: DDPMUNetConfig, out_channels: int) -> UNetConfig:
    """The shape that a section [model] describes. Raises ConfigError where no such network exists."""
    fields = model.model_dump(exclude={"kind", "classes", "label_drop"})
    fields["channel_multipliers"] = tuple(model.channel_multipliers)
    fields["attention_resolutions"] = tuple(model.attention_resolutions)
    try:
        return UNetConfig(**fields, labels=model.label_rows, out_channels=out_channels)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def build_ddpm_unet(model: DDPMUNetConfig, out_channels: int) -> UNet:
    """The network that a section [model] describes; errors as `unet_config`."""
    return UNet(unet_config(model, out_channels))
