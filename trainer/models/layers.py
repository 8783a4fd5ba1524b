"""The parts of the DDPM network (Ho et al. 2020, appendix B), with the authors' initialisation.

Images are (B, C, H, W) in contiguous or channels_last memory; the time embedding `temb` is (B, D).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trainer.models.group_norm import GroupNorm

GROUP_NORM_EPS = 1e-6  # TensorFlow's; PyTorch's default of 1e-5 is another network
MAX_PERIOD = 10_000  # of the sinusoids, as in the Transformer
NEAR_ZERO = 1e-10  # initial scale of the layers that end a residual branch or the network: it starts as an identity


def initialise(layer: nn.Conv2d | nn.Linear, scale: float) -> None:
    """Variance scaling (fan_avg, uniform) of the weight, in place; the bias becomes 0.

    Var(w) = scale / ((fan_in + fan_out) / 2), which is Xavier uniform for scale 1.
    """
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def conv(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0, scale: float = 1.0
) -> nn.Conv2d:
    """A square convolution, initialised by `initialise`."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding)
    initialise(layer, scale)
    return layer


def dense(in_features: int, out_features: int, *, scale: float = 1.0) -> nn.Linear:
    """A fully connected layer, initialised by `initialise`."""
    layer = nn.Linear(in_features, out_features)
    initialise(layer, scale)
    return layer


def group_norm(groups: int, channels: int) -> GroupNorm:
    """Group normalisation with the authors' epsilon."""
    return GroupNorm(groups, channels, eps=GROUP_NORM_EPS)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep: sin(t f_i), then cos(t f_i), with f_i = exp(-i ln(10^4) / (dim/2 - 1)).

    t: (B,) integers; dim: even, at least 4. Returns (B, dim), float32 also under autocast: in bfloat16 the
    phases of neighbouring timesteps could not be told apart.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * i / (half - 1))
    phase = t.to(torch.float32)[:, None] * frequencies[None, :]
    return torch.cat((phase.sin(), phase.cos()), dim=1)


class TimeEmbedding(nn.Module):
    """Timestep (B,) -> (B, 4 channels): sinusoids, dense, swish, dense."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.dense_in = dense(channels, 4 * channels)
        self.dense_out = dense(4 * channels, 4 * channels)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """`dtype` is that of the images, so that a network cast to bfloat16 as a whole also runs."""
        temb = timestep_embedding(t, self.channels).to(dtype)
        return self.dense_out(F.silu(self.dense_in(temb)))


class ResidualBlock(nn.Module):
    """(B, in_channels, H, W), (B, temb_channels) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, *, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = group_norm(groups, in_channels)
        self.conv_in = conv(in_channels, out_channels, 3, padding=1)
        self.dense_temb = dense(temb_channels, out_channels)
        self.norm_out = group_norm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = conv(out_channels, out_channels, 3, padding=1, scale=NEAR_ZERO)
        self.shortcut = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Norm, swish, conv, + temb, norm, swish, dropout, conv, + shortcut."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.dense_temb(F.silu(temb))[:, :, None, None]
        h = self.conv_out(self.dropout(F.silu(self.norm_out(h))))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over the H W positions with one head as wide as the channels: (B, C, H, W) -> the same."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.query = dense(channels, channels)
        self.key = dense(channels, channels)
        self.value = dense(channels, channels)
        self.out = dense(channels, channels, scale=NEAR_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """x + out(softmax(q k^T / sqrt(C)) v)."""
        height, width = x.shape[2:]
        # A view in channels_last memory. The 1 is the head.
        h = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        h = rearrange(self.out(h), "b 1 (h w) c -> b c h w", h=height, w=width)
        return x + h


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2) by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Pads right and bottom only, as TensorFlow's SAME does for an even side: (left, right, top, bottom)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Every pixel becomes 2 x 2, then conv3x3."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
