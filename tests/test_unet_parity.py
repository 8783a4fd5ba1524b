"""The UNet computes what diffusers' independent implementation of the same network computes."""

import re

import pytest
import torch

from tests.harness import unet_section
from tests.networks import randomise, reference
from trainer.config import DDPMUNetConfig
from trainer.models.ddpm_unet import Downsample, UNet
from trainer.models.stages import Stage

# In float64 nothing but the network itself can differ; float32 is what is trained.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

CIFAR10 = unet_section()
# The network of CelebA at 64 x 64 in Song et al. 2021 (DDIM), and the paper's of 256 x 256.
CELEBA64 = unet_section(image_size=64, channel_multipliers=[1, 2, 2, 2, 4])
LSUN256 = unet_section(image_size=256, channel_multipliers=[1, 1, 2, 2, 4, 4])
# The layout of the 256 x 256 recipe (attention on the fifth of six levels), small enough for a test.
LSUN_LAYOUT = unet_section(
    image_size=64, base_channels=32, channel_multipliers=[1, 1, 2, 2, 4, 4], attention_resolutions=[4]
)
# The same levels with attention where a 64 x 64 image has its 16 x 16.
LSUN_AT_16 = unet_section(
    image_size=64, base_channels=32, channel_multipliers=[1, 1, 2, 2, 4, 4], attention_resolutions=[16]
)


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


def difference(
    config: DDPMUNetConfig, dtype: torch.dtype, *, side: int | None = None, **wrong: object
) -> tuple[float, float]:
    """The largest difference of the two outputs, and the size of our output. `side` of the input; the network's own
    costs minutes at 256.
    """
    side = side or config.image_size
    torch.manual_seed(0)
    model = UNet(config, 3).eval()
    randomise(model)
    other = reference(config, **wrong)
    other.load_state_dict(to_diffusers(model), strict=True)
    model.to(dtype)
    other.to(dtype)
    x = torch.randn(2, config.channels, side, side, dtype=dtype)
    t = torch.tensor([3, 871])
    with torch.no_grad():
        ours, theirs = model(x, t), other(x, t).sample
    return (ours - theirs).abs().max().item(), ours.std().item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("config", [CIFAR10, LSUN_LAYOUT, LSUN_AT_16], ids=["cifar10", "lsun", "lsun-16"])
def test_the_network_is_the_one_diffusers_builds(config: DDPMUNetConfig, dtype: torch.dtype) -> None:
    largest, scale = difference(config, dtype)
    assert largest < TOLERANCE[dtype]
    assert 0.3 < scale < 3  # or the tolerance would mean something else


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "side"),
    [
        pytest.param(CELEBA64, 32, id="celeba64"),
        pytest.param(LSUN256, 64, id="lsun256"),
        pytest.param(CELEBA64, 64, id="celeba64-own-size"),
        pytest.param(LSUN256, 256, id="lsun256-own-size"),
    ],
)
def test_the_large_networks_are_too_at_full_width(config: DDPMUNetConfig, side: int) -> None:
    largest, scale = difference(config, torch.float32, side=side)
    assert largest < TOLERANCE[torch.float32]
    assert 0.3 < scale < 3


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
@pytest.mark.parametrize(
    ("config", "side"),
    [
        pytest.param(CIFAR10, 32, id="cifar10", marks=pytest.mark.slow),
        pytest.param(CELEBA64, 32, id="celeba64", marks=pytest.mark.slow),
        pytest.param(LSUN_LAYOUT, None, id="lsun"),
    ],
)
def test_the_comparison_sees_one_wrong_setting(
    config: DDPMUNetConfig, side: int | None, wrong: dict[str, object]
) -> None:
    largest, _ = difference(config, torch.float32, side=side, **wrong)
    assert largest > TOLERANCE[torch.float32]
