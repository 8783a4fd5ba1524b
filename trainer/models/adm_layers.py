"""The parts of the ADM networks (Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 3
and appendix A), with PyTorch's own initialisation.

Images are (B, C, H, W) in contiguous or channels_last memory; the embedding of time and class, `temb`, is (B, D).
"""

import math
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trainer.config.backbones import AttentionOrder
from trainer.models.group_norm import GroupNorm
from trainer.models.layers import MAX_PERIOD

GROUP_NORM_EPS = 1e-5  # PyTorch's default, unlike the DDPM network's
Resampling = Literal["none", "down", "up"]
_ROWS_OF_QKV: dict[AttentionOrder, str] = {
    "legacy": "b n (heads three d) -> three b heads n d",
    "new": "b n (three heads d) -> three b heads n d",
}
L = TypeVar("L", nn.Conv2d, nn.Linear)


def zeroed(layer: L) -> L:
    """The layer with weight and bias 0: what ends a residual branch or the network starts as nothing."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(groups: int, channels: int) -> GroupNorm:
    """Group normalisation with ADM's epsilon."""
    return GroupNorm(groups, channels, eps=GROUP_NORM_EPS)


def resample(h: Tensor, how: Resampling) -> Tensor:
    """(B, C, H, W) -> half the side by averages of 2 x 2 pixels, or twice the side by nearest neighbours."""
    if how == "down":
        return F.avg_pool2d(h, 2)
    return F.interpolate(h, scale_factor=2.0, mode="nearest") if how == "up" else h


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep: cos(t f_i), then sin(t f_i), with f_i = exp(-i ln(10^4) / (dim/2)).

    t: (B,) integers or floats; dim: even. Returns (B, dim), float32 also under autocast.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    phase = t.to(torch.float32)[:, None] * torch.exp(-math.log(MAX_PERIOD) * i / half)[None, :]
    return torch.cat((phase.cos(), phase.sin()), dim=1)


class TimeEmbedding(nn.Module):
    """Timestep (B,) -> (B, 4 channels): sinusoids, dense, swish, dense."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.dense_in = nn.Linear(channels, 4 * channels)
        self.dense_out = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """`dtype` is that of the images, so that a network cast to bfloat16 as a whole also runs."""
        temb = timestep_embedding(t, self.channels).to(dtype)
        return self.dense_out(F.silu(self.dense_in(temb)))


class ResidualBlock(nn.Module):
    """(B, in_channels, H, W), (B, temb_channels) -> (B, out_channels, H', W'), the side changed by `resampling`.

    Adaptive group normalisation (section 3): scale and shift of the second norm are linear in temb. A block that
    resamples does so without weights, before its first convolution and in the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        *,
        groups: int,
        dropout: float,
        resampling: Resampling = "none",
    ) -> None:
        super().__init__()
        self.resampling: Resampling = resampling
        self.norm_in = group_norm(groups, in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.dense_temb = nn.Linear(temb_channels, 2 * out_channels)
        self.norm_out = group_norm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Norm, swish, resample, conv, norm, scale and shift, swish, dropout, conv, + shortcut of the resampled x."""
        h = self.conv_in(resample(F.silu(self.norm_in(x)), self.resampling))
        scale, shift = self.dense_temb(F.silu(temb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(h) * (1 + scale) + shift
        h = self.conv_out(self.dropout(F.silu(h)))
        return self.shortcut(resample(x, self.resampling)) + h


def attend(qkv: Tensor, heads: int, order: AttentionOrder) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of every head, d its channels.

    qkv: (B, N, 3 C), whose last dimension is ordered [head][q, k, v][d] ("legacy") or [q, k, v][head][d] ("new").
    Returns (B, N, C), ordered [head][d].
    """
    q, k, v = rearrange(qkv, _ROWS_OF_QKV[order], three=3, heads=heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")


class SelfAttention(nn.Module):
    """Self-attention of several heads over the H W positions: (B, C, H, W) -> the same."""

    def __init__(self, channels: int, *, groups: int, heads: int, order: AttentionOrder) -> None:
        super().__init__()
        self.heads = heads
        self.order: AttentionOrder = order
        self.norm = group_norm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x + out(attend(qkv(norm(x))))."""
        height, width = x.shape[2:]
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")  # a view in channels_last memory
        h = self.out(attend(self.qkv(h), self.heads, self.order))
        return x + rearrange(h, "b (h w) c -> b c h w", h=height, w=width)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2) by a convolution of stride 2 that pads every side by one pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """conv3x3 of stride 2."""
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Every pixel becomes 2 x 2, then conv3x3."""
        return self.conv(resample(x, "up"))
