"""Configuration of the authors' networks from tensor shapes: state dicts in the AUTHORS layout have no settings."""

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.errors import ConversionError

_ATTENTION_SIDE = 16  # the authors' networks have attention at 16 x 16, from which the image size follows
_NORM_GROUPS = 32
_CIFAR_SIDE = 32


def model_section(tensors: Mapping[str, Tensor], image_size: int | None, *, source: str) -> dict[str, Any]:
    """The [model] section; `image_size` is needed only if attention is not at 16 x 16 alone.

    Dropout cannot be inferred from weights and is 0 here. Raises ConversionError where the tensors are of another
    layout.
    """
    first = _shape(tensors, "conv_in.weight", source)
    levels = list(itertools.takewhile(lambda i: f"down.{i}.block.0.conv1.weight" in tensors, itertools.count()))
    widths = [_shape(tensors, f"down.{level}.block.0.conv1.weight", source)[0] for level in levels]
    if not levels or not first[0] or any(width % first[0] for width in widths):
        raise ConversionError(
            f"{source}: no state dict in the layout of pytorch_diffusion (down.0.block.0.conv1.weight, ...), whose "
            "levels are multiples of conv_in wide; a diffusers model is given as its folder, with its config.json"
        )
    blocks = itertools.takewhile(lambda i: f"down.0.block.{i}.conv1.weight" in tensors, itertools.count())
    attentive = [level for level in levels if f"down.{level}.attn.0.q.weight" in tensors]
    if image_size is None:
        if len(attentive) != 1:
            raise ConversionError(
                f"{source}: attends at {len(attentive)} levels, so the side of its images is not known; "
                "give it by --image-size"
            )
        image_size = _ATTENTION_SIDE * 2 ** attentive[0]
    return {
        "image_size": image_size,
        "channels": first[1],
        "base_channels": first[0],
        "channel_multipliers": [width // first[0] for width in widths],
        "blocks_per_level": len(list(blocks)),
        "attention_resolutions": [image_size // 2**level for level in attentive],
        "dropout": 0.0,
        "norm_groups": _NORM_GROUPS,
    }


def diffusion_section(model: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' process, the same for all their networks; sampling variance beta_t for CIFAR-10, beta~_t for larger
    ones.
    """
    variance = "large" if model["image_size"] == _CIFAR_SIDE else "small"
    return {"timesteps": 1000, "schedule": "linear", "variance": variance}


def _shape(tensors: Mapping[str, Tensor], name: str, source: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ConversionError(f"{source}: {name}: missing")
    if tensors[name].ndim != 4:
        raise ConversionError(f"{source}: {name}: shape {tuple(tensors[name].shape)}, should be a convolution's")
    return tuple(tensors[name].shape)
