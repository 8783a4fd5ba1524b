"""What a network that upsamples is given: the image of low resolution, perhaps with noise, and how much of it."""

import math

import torch.nn.functional as F
from torch import Tensor

from trainer.config.backbones import ModelConfig, upsampler
from trainer.diffusion.contract import Conditioning
from trainer.diffusion.keyed_noise import KeyedNoise

MADE = ("low_res", "low_res_level")  # what such a network takes that need not be stored


def area_downsample(x: Tensor, size: int) -> Tensor:
    """Means over square blocks of pixels: (B, C, H, H) -> (B, C, size, size). H: a multiple of size."""
    return F.avg_pool2d(x, x.shape[-1] // size)


def low_res_conditioning(model: ModelConfig, x: Tensor, cond: Conditioning, noise: KeyedNoise) -> dict[str, Tensor]:
    """What is added to the conditioning of images x, (B, C, H, W), for a network of this section; {} where it does not
    upsample.

    low_res: (B, C, h, h), that of `cond`, where it was stored, or made from x by `area_downsample`. With
    `model.low_res_noise` it is noised to low_res_level, (B,), uniform from 0 to that: a function of the seed and of
    what `noise` is keyed by.
    """
    section = upsampler(model)
    if section is None:
        return {}
    assert section.low_res_size is not None
    low_res = cond["low_res"] if "low_res" in cond else area_downsample(x, section.low_res_size)
    if not section.low_res_noise:
        return {"low_res": low_res}
    level = section.low_res_noise * noise.bits("low_res_level").float() * 2.0**-32
    return with_noise(low_res, level, noise)


def with_noise(low_res: Tensor, level: Tensor, noise: KeyedNoise) -> dict[str, Tensor]:
    """Ho et al. 2022 (cascaded diffusion models), section 4.2, noise conditioning augmentation: low_res and its level.

    low_res' = cos(pi s / 2) low_res + sin(pi s / 2) eps, which keeps the variance; s is the level, 0 none, 1 noise
    alone. low_res: (B, C, h, w) float32; level: (B,) float32; noise: has "low_res".
    """
    angle = 0.5 * math.pi * level[:, None, None, None]
    eps = noise.normal("low_res", tuple(low_res.shape[1:]))
    return {"low_res": angle.cos() * low_res + angle.sin() * eps, "low_res_level": level}
