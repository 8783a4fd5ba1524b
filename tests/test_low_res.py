"""What a network that upsamples is given: made of the image, noised by position; what it refuses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.adm import CONDITIONAL, GOLDEN, normal, unet
from tests.data_harness import pixels
from tests.harness import (
    load_config,
    overrides,
    write_config,
)
from trainer.config.backbones import ADMUNetConfig
from trainer.data.images import from_uint8
from trainer.diffusion.keyed_noise import KeyedNoise, keyed_flips
from trainer.diffusion.low_res import area_downsample, low_res_conditioning, with_noise
from trainer.engine.step.train_step import conditioning, device_batch
from trainer.errors import ConfigError, ConversionError
from trainer.interop.supported import adm_network
from trainer.sampling.conditioned import check_drawable
from trainer.sampling.conditions import Conditions
from trainer.sampling.request import RequestError

SEED = 5
ADM = {"model__kind": "adm-unet", "model__heads": 2, "model__low_res_size": 4, "train__ema_decay": 0.5}
PLAIN = overrides(**ADM, model__dropout=0.0, train__duration="1 steps")
SECTION = ADMUNetConfig.model_validate(GOLDEN | {"low_res_size": 8, "low_res_noise": 0.4})


def upsampler_config(tmp_path: Path, data: Path, *further: str) -> Path:
    """Of an upsampler from 4 x 4 to 8 x 8 without classes."""
    path = write_config(tmp_path, data)
    load_config(path, *PLAIN[1::2], *further)
    return path


# What the network is given


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_area_downsampling_is_the_means_of_blocks(size: int) -> None:
    x, side = normal(0, 2, 3, 16, 16), 16 // size
    blocks = x.double().reshape(2, 3, size, side, size, side).mean(dim=(3, 5))
    torch.testing.assert_close(area_downsample(x, size).double(), blocks, rtol=0, atol=1e-6)
    torch.testing.assert_close(area_downsample(x, size), F.interpolate(x, size, mode="area"), rtol=0, atol=1e-6)


def enlarged(image: Tensor, side: int) -> Tensor:
    """Bilinear, in float64, from the centres of pixels: (h, h) -> (side, side)."""
    h = len(image)
    at = (((torch.arange(side) + 0.5) * h / side) - 0.5).clamp(0, h - 1).double()
    below = at.floor().long()
    above, share = (below + 1).clamp(max=h - 1), at - at.floor()
    rows = torch.lerp(image[below], image[above], share[:, None])
    return torch.lerp(rows[:, below], rows[:, above], share[None, :])


def test_it_is_enlarged_bilinearly_and_stands_beside_x_t() -> None:
    network = unet(**GOLDEN, low_res_size=8)
    seen: list[Tensor] = []
    network.conv_in.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    x, low_res = normal(1, 2, 3, 32, 32), normal(2, 2, 3, 8, 8)
    with torch.no_grad():
        network(x, torch.tensor([3, 997]), low_res=low_res)
    assert torch.equal(seen[0][:, :3], x)
    expected = torch.stack([torch.stack([enlarged(c.double(), 32) for c in image]) for image in low_res])
    torch.testing.assert_close(seen[0][:, 3:].double(), expected, rtol=0, atol=1e-6)


def training_noise(position: Tensor, seed: int = SEED) -> KeyedNoise:
    return KeyedNoise.training(seed, position)


def test_level_and_noise_are_functions_of_seed_and_position() -> None:
    position = torch.arange(4000) + 2**33
    x = torch.zeros(4000, 1, 16, 16)
    given = low_res_conditioning(SECTION, x, {}, training_noise(position))
    level = given["low_res_level"]
    assert given["low_res"].shape == (4000, 1, 8, 8)
    assert level.dtype == torch.float32
    assert 0 <= level.min() < 0.001
    assert 0.399 < level.max() <= 0.4
    assert abs(level.mean().item() - 0.2) < 5 * 0.4 / math.sqrt(12 * 4000)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    for some in order.split(777):
        part = low_res_conditioning(SECTION, x[some], {}, training_noise(position[some]))
        assert all(torch.equal(part[name], given[name][some]) for name in given)
    other = low_res_conditioning(SECTION, x, {}, training_noise(position, seed=6))["low_res_level"]
    assert abs(torch.corrcoef(torch.stack((level, other)))[0, 1]) < 5 / math.sqrt(4000)
    deviation = given["low_res"].std(dim=(1, 2, 3))
    expected = (0.5 * math.pi * level).sin()
    assert ((deviation - expected).abs() < 0.5 * expected + 1e-6).all()  # of 64 numbers each
    assert (deviation / expected).mean().item() == pytest.approx(1, abs=0.02)


def test_noise_keeps_the_variance_and_none_changes_nothing() -> None:
    low_res = normal(0, 1000, 1, 8, 8)
    noise = training_noise(torch.arange(1000))
    for level in (0.0, 0.3, 1.0):
        found = with_noise(low_res, torch.full((1000,), level), noise)["low_res"]
        assert found.std().item() == pytest.approx(1, abs=0.02)
        kept = (found * low_res).mean().item() / low_res.square().mean().item()
        assert kept == pytest.approx(math.cos(0.5 * math.pi * level), abs=0.02)
    assert torch.equal(with_noise(low_res, torch.zeros(1000), noise)["low_res"], low_res)


def test_its_noise_is_that_of_nothing_else() -> None:
    """eps of training is the noise of x_t, and validation's and a sample's are others."""
    index, shape = torch.arange(50), (3, 4, 4)
    kinds = [KeyedNoise.training(SEED, index), KeyedNoise.validation(SEED, index), KeyedNoise.sampling(SEED, index)]
    drawn = [kind.normal("low_res", shape) for kind in kinds]
    drawn += [kind.normal("eps", shape) for kind in kinds[:2]] + [kinds[2].normal("initial", shape)]
    correlations = torch.corrcoef(torch.stack([each.flatten() for each in drawn]))
    assert (correlations - torch.eye(6)).abs().max() < 5 / math.sqrt(50 * 48)


def test_a_batch_is_given_means_of_the_mirrored_image(tmp_path: Path, dataset: Path) -> None:
    config = load_config(upsampler_config(tmp_path, dataset), *PLAIN[1::2])
    assert config.data.flip
    images = torch.from_numpy(np.stack([pixels(n) for n in range(20)])).permute(0, 3, 1, 2)
    found = device_batch({"image": images, "position": torch.arange(20)}, config, torch.device("cpu"))
    flips = keyed_flips(config.seed, torch.arange(20))
    x = torch.stack([image.flip(-1) if flip else image for image, flip in zip(from_uint8(images), flips)])
    assert torch.equal(found.x, x)
    assert found.cond.keys() == {"low_res"}
    torch.testing.assert_close(found.cond["low_res"], F.interpolate(x, 4, mode="area"), rtol=0, atol=1e-6)


def test_a_stored_image_is_taken_where_it_is_read(tmp_path: Path, dataset: Path) -> None:
    config = load_config(upsampler_config(tmp_path, dataset), *PLAIN[1::2], 'data.cond=["low_res"]', "data.flip=false")
    low = torch.from_numpy(np.stack([pixels(100 + n, 4, 4) for n in range(3)])).permute(0, 3, 1, 2)
    batch = {"image": torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "position": torch.arange(3), "low_res": low}
    assert torch.equal(device_batch(batch, config, torch.device("cpu")).cond["low_res"], from_uint8(low))
    assert conditioning(batch, config, torch.device("cpu")).keys() == {"low_res"}


# The network


def test_without_noise_the_network_is_what_it_was() -> None:
    torch.manual_seed(0)
    before = unet(**CONDITIONAL, low_res_size=8).state_dict()
    torch.manual_seed(0)
    told = unet(**CONDITIONAL, low_res_size=8, low_res_noise=0.4)
    added = {f"low_res_temb.dense_{end}.{kind}" for end in ("in", "out") for kind in ("weight", "bias")}
    assert told.state_dict().keys() - before.keys() == added
    assert not any("low_res" in name for name in before)
    for parameter in told.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = normal(1, 2, 3, 32, 32), torch.tensor([3, 997])
    cond = {"label": torch.tensor([1, 5]), "low_res": normal(2, 2, 3, 8, 8)}
    with torch.no_grad():
        found = [told(*inputs, **cond, low_res_level=torch.tensor([0.1, level])) for level in (0.1, 0.4)]
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])
    with pytest.raises(ValueError, match="low_res_level: this network needs it"):
        told(*inputs, **cond)
    with pytest.raises(ValueError, match="low_res_level: this network takes none"):
        unet(**GOLDEN, low_res_size=8)(*inputs, low_res=cond["low_res"], low_res_level=torch.zeros(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.low_res_size=3"], r"model.low_res_size = 3: must divide model.image_size = 8, since low_res is made"),
        (["model.low_res_size=8"], r"model: low_res_size = 8: must be less than image_size = 8"),
        (["model.low_res_noise=1.5"], r"model.low_res_noise = 1.5: should be less than or equal to 1"),
    ],
)
def test_sizes_and_levels_that_cannot_be_are_one_line(
    tmp_path: Path, dataset: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        upsampler_config(tmp_path, dataset, *changes)
    assert "\n" not in str(refused.value)
    upsampler_config(tmp_path, dataset, "model.low_res_size=3", 'data.cond=["low_res"]')  # a stored one has any side


def test_noise_without_an_image_to_put_it_in_is_one_line(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: low_res_noise = 0.5: goes with low_res_size; set it, or leave it"):
        load_config(write_config(tmp_path, dataset), "model.kind=adm-unet", "model.heads=2", "model.low_res_noise=0.5")


def test_what_upsamples_is_drawn_in_a_cascade_only(tmp_path: Path, dataset: Path) -> None:
    model = load_config(upsampler_config(tmp_path, dataset), *PLAIN[1::2]).model
    check_drawable(model, upsamples=True)
    with pytest.raises(ConfigError, match=r"it takes low_res, which samples cannot be given outside a cascade"):
        check_drawable(model)


def test_a_level_is_at_most_that_of_the_training() -> None:
    Conditions(low_res_noise=0.4).check(SECTION)
    with pytest.raises(RequestError, match=r"low_res_noise=0.5: should be from 0 to the model.low_res_noise .*, 0.4$"):
        Conditions(low_res_noise=0.5).check(SECTION)
    with pytest.raises(RequestError, match=r"low_res_noise=0.1: should be from 0 to the model.low_res_noise .*, 0$"):
        Conditions(low_res_noise=0.1).check(ADMUNetConfig.model_validate(GOLDEN))
    with pytest.raises(RequestError, match=r"low_res_noise=1.5: should be a level from 0, without noise, to 1"):
        Conditions(low_res_noise=1.5)


def test_a_network_that_is_told_a_level_is_not_exported(tmp_path: Path, dataset: Path) -> None:
    config = load_config(upsampler_config(tmp_path, dataset), *PLAIN[1::2], "model.low_res_noise=0.5")
    with pytest.raises(ConversionError, match=r"^model.low_res_noise = 0.5: guided-diffusion's upsamplers are told no"):
        adm_network(config, "run")
