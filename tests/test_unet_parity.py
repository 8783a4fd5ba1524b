"""The UNet computes what diffusers' independent implementation of the same network computes."""

import re

import pytest
import torch
from diffusers import UNet2DModel

from trainer.models.unet import Downsample, Stage, UNet, UNetConfig

# In float64 nothing but the network itself can differ; float32 is what is trained.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

CIFAR10 = UNetConfig(image_size=32)
# The layout of the 256 x 256 recipe (attention on the fifth of six levels), small enough for a test.
LSUN_LAYOUT = UNetConfig(
    image_size=64, base_channels=32, channel_multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(4,)
)
# The same levels with attention where a 64 x 64 image has its 16 x 16.
LSUN_AT_16 = UNetConfig(
    image_size=64, base_channels=32, channel_multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(16,)
)


def randomise(model: UNet) -> None:
    """Weights that hide nothing: no layer near zero, no bias at zero, no norm at one, outputs of order one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def reference(config: UNetConfig, **wrong: object) -> UNet2DModel:
    attention = [side in config.attention_resolutions for side in config.level_resolutions]
    settings = {
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "norm_num_groups": config.norm_groups,
        "layers_per_block": config.blocks_per_level,
        "act_fn": "silu",
    }
    return UNet2DModel(
        sample_size=config.image_size,
        block_out_channels=config.level_channels,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        **(settings | wrong),
    ).eval()


PARTS = {
    "residual.norm_in": "norm1",
    "residual.conv_in": "conv1",
    "residual.dense_temb": "time_emb_proj",
    "residual.norm_out": "norm2",
    "residual.conv_out": "conv2",
    "residual.shortcut": "conv_shortcut",
    "attention.norm": "group_norm",
    "attention.query": "to_q",
    "attention.key": "to_k",
    "attention.value": "to_v",
    "attention.out": "to_out.0",
}
OUTER = {
    "temb.dense_in": "time_embedding.linear_1",
    "temb.dense_out": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}


def diffusers_prefixes(model: UNet) -> dict[str, tuple[str, int]]:
    """Our layer ("down.3") -> diffusers' block and the number inside it ("down_blocks.1", 0)."""
    prefixes = {"middle.0": ("mid_block", 0), "middle.1": ("mid_block", 1)}
    for path in ("down", "up"):
        level = position = 0
        for number, layer in enumerate(getattr(model, path)):
            prefixes[f"{path}.{number}"] = (f"{path}_blocks.{level}", position)
            position += 1
            if not isinstance(layer, Stage):  # the resampling layer ends its level
                level, position = level + 1, 0
    return prefixes


def to_diffusers(model: UNet) -> dict[str, torch.Tensor]:
    prefixes = diffusers_prefixes(model)
    renamed = {}
    for name, tensor in model.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        if layer in OUTER:
            renamed[f"{OUTER[layer]}.{kind}"] = tensor
            continue
        outer, inner = re.fullmatch(r"(\w+\.\d+)\.(.+)", layer).groups()
        block, position = prefixes[outer]
        if inner == "conv":
            module = model.get_submodule(outer)
            resample = "downsamplers" if isinstance(module, Downsample) else "upsamplers"
            renamed[f"{block}.{resample}.0.conv.{kind}"] = tensor
        else:
            group = "attentions" if inner.startswith("attention") else "resnets"
            renamed[f"{block}.{group}.{position}.{PARTS[inner]}.{kind}"] = tensor
    return renamed


def difference(config: UNetConfig, dtype: torch.dtype, **wrong: object) -> tuple[float, float]:
    """The largest difference of the two outputs, and the size of our output."""
    torch.manual_seed(0)
    model = UNet(config).eval()
    randomise(model)
    other = reference(config, **wrong)
    other.load_state_dict(to_diffusers(model), strict=True)
    model.to(dtype)
    other.to(dtype)
    x = torch.randn(2, config.channels, config.image_size, config.image_size, dtype=dtype)
    t = torch.tensor([3, 871])
    with torch.no_grad():
        ours, theirs = model(x, t), other(x, t).sample
    return (ours - theirs).abs().max().item(), ours.std().item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("config", [CIFAR10, LSUN_LAYOUT, LSUN_AT_16], ids=["cifar10", "lsun", "lsun-16"])
def test_the_network_is_the_one_diffusers_builds(config: UNetConfig, dtype: torch.dtype) -> None:
    largest, scale = difference(config, dtype)
    assert largest < TOLERANCE[dtype]
    assert 0.3 < scale < 3  # or the tolerance would mean something else


@pytest.mark.parametrize(
    "wrong",
    [
        {"downsample_padding": 1},
        {"flip_sin_to_cos": True},
        {"freq_shift": 0},
        {"attention_head_dim": 8},
        {"norm_eps": 1e-5},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_comparison_sees_one_wrong_setting(wrong: dict[str, object]) -> None:
    largest, _ = difference(CIFAR10, torch.float32, **wrong)
    assert largest > TOLERANCE[torch.float32]
