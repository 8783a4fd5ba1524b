"""Group normalisation whose backward pass is fast on CPUs, too, in channels_last memory.

PyTorch's own there goes through a group's channels of a pixel, which lie side by side, in whole vector registers and
the rest one by one: with 128 channels in 32 groups, everything one by one. The backward pass here sums and multiplies
over all channels of a pixel at once.
"""

from typing import Any

import torch
from torch import Tensor, nn

VECTOR_BYTES = 32  # of the registers that PyTorch's kernels count in


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
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()  # which writes kernels of its own
        ):
            return super().forward(x)
        out: Tensor = _ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return out


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """PyTorch's forward pass and another backward pass, for channels_last images on a CPU.

    With m and r the mean and the reciprocal standard deviation of a group of n = D H W numbers, y = w r (x - m) + b.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """dx = w r dy + r / n (r^2 (x - m) (m sum(w dy) - sum(w dy x)) - sum(w dy)), sums over the group."""
        x, weight, mean, rstd = ctx.saved_tensors
        (batch, channels, height, width), groups = x.shape, mean.shape[1]
        exact = torch.promote_types(x.dtype, torch.float32)
        x_rows, dy_rows = (_rows(image).to(exact) for image in (x, dy))
        mean, rstd = (statistic.to(exact)[:, :, None] for statistic in (mean, rstd))
        scale = weight.to(exact).reshape(1, groups, -1)  # (1, G, D)

        sum_dy_x = (dy_rows * x_rows).sum(dim=1).reshape(batch, groups, -1)  # (B, G, D)
        sum_dy = dy_rows.sum(dim=1).reshape(batch, groups, -1)
        d_weight = ((sum_dy_x - sum_dy * mean) * rstd).sum(dim=0).flatten()
        d_bias = sum_dy.sum(dim=0).flatten()

        group_dy_x = (scale * sum_dy_x).sum(dim=2, keepdim=True)  # (B, G, 1)
        group_dy = (scale * sum_dy).sum(dim=2, keepdim=True)
        numbers = height * width * channels // groups
        of_x = rstd**3 * (mean * group_dy - group_dy_x) / numbers
        constant = -mean * of_x - rstd * group_dy / numbers
        of_dy, of_x, constant = (
            factor.expand(batch, groups, channels // groups).reshape(batch, 1, channels)
            for factor in (rstd * scale, of_x, constant)
        )
        dx = torch.addcmul(constant, x_rows, of_x).addcmul_(dy_rows, of_dy).to(x.dtype)
        d_image = dx.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return d_image, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None


def _rows(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C), a view of channels_last memory."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)
