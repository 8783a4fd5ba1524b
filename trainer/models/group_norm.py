"""Group normalisation that is fast on CPUs, too, in channels_last memory.

PyTorch's kernels there go through a group's channels of a pixel, which lie side by side, in whole vector registers and
the rest one by one: with 128 channels in 32 groups, everything one by one. Here all channels of a pixel are summed and
multiplied at once, and only then the channels of a group.
"""

from typing import Any

import torch
from torch import Tensor, nn

VECTOR_BYTES = 32  # of the registers that PyTorch's kernels count in
LARGE_MAP = 1024  # from so many pixels on PyTorch's forward pass, not its backward pass, is vectorised for any group
WORTH_IT = 2**15  # numbers; for fewer, the calls take longer than the work


class GroupNorm(nn.GroupNorm):
    """As torch.nn.GroupNorm, to rounding, for images (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, in x's type and memory layout; statistics are at least float32."""
        group_bytes = self.num_channels // self.num_groups * x.element_size()
        if (
            x.device.type != "cpu"
            or x.is_contiguous()
            or not x.is_contiguous(memory_format=torch.channels_last)
            or group_bytes % VECTOR_BYTES == 0
            or x.numel() < WORTH_IT
            or torch.compiler.is_compiling()  # which writes kernels of its own
        ):
            return super().forward(x)
        if not torch.is_grad_enabled():  # leaves out what the graph costs, a sixth of a small image's time
            return _normalise(x, self.weight, self.bias, self.num_groups, self.eps)[0]
        out: Tensor = ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return out


class ChannelsLastGroupNorm(torch.autograd.Function):
    """y = w r (x - m) + b, m and r the mean and the reciprocal standard deviation of a group of n = D H W numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """x: (B, C, H, W) in channels_last memory; weight, bias: (C,)."""
        y, mean, rstd = _normalise(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """dx = w r dy + r / n (r^2 (x - m) (m sum(w dy) - sum(w dy x)) - sum(w dy)), sums over the group."""
        x, weight, mean, rstd = ctx.saved_tensors
        groups, exact = mean.shape[1], _exact(x)
        x_rows, dy_rows = (_rows(image).to(exact) for image in (x, dy))
        mean, rstd = (statistic.to(exact)[:, :, None] for statistic in (mean, rstd))
        scale = _grouped(weight.to(exact), groups)

        sum_dy_x = _grouped((dy_rows * x_rows).sum(dim=1), groups)
        sum_dy = _grouped(dy_rows.sum(dim=1), groups)
        d_weight = ((sum_dy_x - sum_dy * mean) * rstd).sum(dim=0).flatten()
        d_bias = sum_dy.sum(dim=0).flatten()

        group_dy_x = (scale * sum_dy_x).sum(dim=2, keepdim=True)  # (B, G, 1)
        group_dy = (scale * sum_dy).sum(dim=2, keepdim=True)
        numbers = x[0].numel() // groups
        of_x = rstd**3 * (mean * group_dy - group_dy_x) / numbers
        constant = -mean * of_x - rstd * group_dy / numbers
        of_dy, of_x, constant = (
            factor.expand_as(sum_dy).flatten(1).unsqueeze(1) for factor in (rstd * scale, of_x, constant)
        )
        dx = torch.addcmul(constant, x_rows, of_x).addcmul_(dy_rows, of_dy)
        return _image(dx, x), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, C, H, W), and mean and reciprocal standard deviation (B, G)."""
    batch, channels, height, width = x.shape
    if height * width >= LARGE_MAP:
        return torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
    rows, numbers = _rows(x).to(_exact(x)), x[0].numel() // groups
    mean = _grouped(rows.sum(dim=1), groups).sum(dim=2) / numbers
    mean_square = _grouped((rows * rows).sum(dim=1), groups).sum(dim=2) / numbers
    rstd = (mean_square - mean.square()).clamp(min=0).add(eps).rsqrt()
    scale = rstd[:, :, None] * _grouped(weight.to(rows.dtype), groups)
    shift = _grouped(bias.to(rows.dtype), groups) - mean[:, :, None] * scale
    y = torch.addcmul(shift.flatten(1).unsqueeze(1), rows, scale.flatten(1).unsqueeze(1))
    return _image(y, x), mean, rstd


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C), a view of channels_last memory."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`, in the type and shape of another image."""
    batch, channels, height, width = like.shape
    return rows.to(like.dtype).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _grouped(values: Tensor, groups: int) -> Tensor:
    """(C,) or (B, C) -> (1 or B, G, D)."""
    return values.reshape(-1, groups, values.shape[-1] // groups)
