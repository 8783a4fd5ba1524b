"""ADM's networks compute what guided-diffusion's do, have its sizes, and take what their sections say."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.adm import CONDITIONAL, GOLDEN, OUT_CHANNELS, classifier, golden_weights, normal, unet
from tests.harness import (
    REPOSITORY,
    load_config,
    write_config,
)
from trainer.config import ADMUNetConfig, Config
from trainer.config.backbones import ADMClassifierConfig
from trainer.engine.build import build_network
from trainer.errors import ConfigError
from trainer.interop.openai import from_openai, to_openai
from trainer.models import adm_layers
from trainer.models.adm_classifier import ADMClassifier
from trainer.models.adm_layers import ResidualBlock, timestep_embedding
from trainer.models.adm_unet import ADMUNet
from trainer.models.backbones import example_inputs

TOLERANCE = 2e-6  # float32 differs by 2e-7 here; the smallest mistake, another epsilon in GroupNorm, by 3e-6 and more


def output(network: ADMUNet | ADMClassifier, **cond: Tensor) -> Tensor:
    network.load_state_dict(from_openai(golden_weights(network), network, source="golden"))
    if isinstance(network, ADMUNet) and network.label_embedding is not None:
        cond["label"] = torch.tensor([1, 5])
    with torch.no_grad():
        return network.eval()(normal(1, 2, 3, 32, 32), torch.tensor([3, 997]), **cond)


def assert_golden(found: Tensor, mean: float, first: float, last: float) -> None:
    numbers = [found.double().abs().mean().item(), found.flatten()[0].item(), found.flatten()[-1].item()]
    assert numbers == pytest.approx([mean, first, last], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("order", "expected"),
    [("legacy", (0.5163389, 0.7198938, -0.0067373)), ("new", (0.5133043, 0.8788313, 0.1201363))],
)
def test_the_unet_is_guided_diffusions(order: str, expected: tuple[float, float, float]) -> None:
    assert_golden(output(unet(**CONDITIONAL, attention_order=order)), *expected)


def test_the_upsampler_is_guided_diffusions() -> None:
    network = unet(**CONDITIONAL, low_res_size=8)
    assert_golden(output(network, low_res=normal(2, 2, 3, 8, 8)), 0.4387434, 0.5952700, -0.3277293)


def test_the_classifier_is_guided_diffusions() -> None:
    assert_golden(output(classifier("attention")), 0.3452117, -0.1131869, -0.2246327)


def sin_before_cos(t: Tensor, dim: int) -> Tensor:
    return timestep_embedding(t, dim).roll(dim // 2, dims=1)


def half_less_one(t: Tensor, dim: int) -> Tensor:
    half = dim // 2
    phase = t.float()[:, None] * torch.exp(-np.log(10_000) * torch.arange(half) / (half - 1))[None, :]
    return torch.cat((phase.cos(), phase.sin()), dim=1)


def shift_before_scale(self: ResidualBlock, x: Tensor, temb: Tensor) -> Tensor:
    h = self.conv_in(adm_layers.resample(F.silu(self.norm_in(x)), self.resampling))
    shift, scale = self.dense_temb(F.silu(temb))[:, :, None, None].chunk(2, dim=1)
    h = self.conv_out(F.silu(self.norm_out(h) * (1 + scale) + shift))
    return self.shortcut(adm_layers.resample(x, self.resampling)) + h


def conv_before_resampling(self: ResidualBlock, x: Tensor, temb: Tensor) -> Tensor:
    h = adm_layers.resample(self.conv_in(F.silu(self.norm_in(x))), self.resampling)
    scale, shift = self.dense_temb(F.silu(temb))[:, :, None, None].chunk(2, dim=1)
    h = self.conv_out(F.silu(self.norm_out(h) * (1 + scale) + shift))
    return self.shortcut(adm_layers.resample(x, self.resampling)) + h


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (adm_layers, "timestep_embedding", sin_before_cos),
        (adm_layers, "timestep_embedding", half_less_one),
        (ResidualBlock, "forward", shift_before_scale),
        (ResidualBlock, "forward", conv_before_resampling),
        (adm_layers, "GROUP_NORM_EPS", 1e-6),
        (adm_layers, "_ROWS_OF_QKV", {"legacy": "b n (three heads d) -> three b heads n d"}),
    ],
    ids=["sin-cos", "half-1", "scale-shift", "conv-resampling", "eps", "qkv"],
)
def test_the_golden_outputs_see_one_mistake(
    owner: object, name: str, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = output(unet(**CONDITIONAL))
    monkeypatch.setattr(owner, name, wrong)
    difference = (output(unet(**CONDITIONAL)) - right).abs().max().item()
    assert difference > 9e-5
    with pytest.raises(AssertionError):
        assert_golden(output(unet(**CONDITIONAL)), 0.5163389, 0.7198938, -0.0067373)


def test_the_attention_orders_are_one_network_with_its_rows_sorted() -> None:
    legacy, new = unet(**CONDITIONAL, attention_order="legacy"), unet(**CONDITIONAL, attention_order="new")
    expected = output(legacy)
    weights = legacy.state_dict()
    for name, tensor in weights.items():
        if ".qkv." in name:  # [head][q, k, v][d] to [q, k, v][head][d]
            heads = tensor.shape[0] // 3 // 16
            weights[name] = tensor.unflatten(0, (heads, 3, 16)).transpose(0, 1).reshape(tensor.shape)
    new.load_state_dict(weights)
    with torch.no_grad():
        found = new.eval()(normal(1, 2, 3, 32, 32), torch.tensor([3, 997]), label=torch.tensor([1, 5]))
    assert torch.equal(found, expected)


# Configuration, parameters, tensors in the state dict, and multiply-adds of a forward pass in 10^9.
PUBLISHED = {
    "imagenet64": (295_904_454, 541, 109.7),
    "imagenet128": (421_529_606, 493, 306.9),
    "imagenet256": (553_838_086, 567, 1119.8),
    "lsun256_adm_bedroom": (552_814_086, 566, 1119.8),
    "lsun256_adm_cat": (552_814_086, 566, 1119.8),
    "lsun256_adm_horse": (552_814_086, 566, 1119.8),
    "imagenet512": (558_997_638, 645, 1982.3),
    "imagenet64_256_upsampler": (311_795_910, 567, 631.6),
    "imagenet128_512_upsampler": (308_835_270, 537, 2504.8),
}


def shipped(name: str) -> Config:
    return Config.load(REPOSITORY / "configs" / f"{name}.toml")


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_networks_have_the_published_sizes(name: str) -> None:
    config = shipped(name)
    with torch.device("meta"):
        network = build_network(config)
        x, t, cond = example_inputs(config.model, 1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, t, **cond)
    assert isinstance(network, ADMUNet)
    size, entries, multiply_adds = PUBLISHED[name]
    assert parameters(network) == size
    assert f"{size:,} parameters" in (REPOSITORY / "configs" / f"{name}.toml").read_text()
    assert len(to_openai(network.state_dict(), network)) == len(network.state_dict()) == entries
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=2e-3)


# The same of the classifiers; the one of 512 x 512 has no configuration.
CLASSIFIERS = {
    "imagenet64_classifier": (65_438_568, 19),
    "imagenet128_classifier": (42_568_040, 21),
    "imagenet256_classifier": (54_096_360, 73),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shipped_classifiers_have_the_published_sizes(name: str) -> None:
    config = shipped(name)
    with torch.device("meta"):
        network = build_network(config)
        x, t, cond = example_inputs(config.model, 1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert network(x, t, **cond).shape == (1, 1000)
    size, multiply_adds = CLASSIFIERS[name]
    assert parameters(network) == size
    assert f"{size:,} parameters" in (REPOSITORY / "configs" / f"{name}.toml").read_text()
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, abs=0.5)


def test_the_published_classifier_of_512_has_its_size() -> None:
    like = shipped("imagenet512").model.model_dump(include={"image_size", "channel_multipliers"})
    model = shipped("imagenet256_classifier").model.model_dump() | like
    with torch.device("meta"):
        assert parameters(ADMClassifier(ADMClassifierConfig.model_validate(model))) == 54_448_360


def test_small_networks_have_the_sizes_of_guided_diffusions() -> None:
    assert parameters(unet(**CONDITIONAL)) == 829_638
    assert parameters(unet(**CONDITIONAL, resblock_updown=False)) == 758_310
    assert parameters(classifier("attention")) == 394_122


def test_blocks_attention_and_resampling_are_where_the_published_keys_have_them() -> None:
    with torch.device("meta"):
        network = build_network(shipped("imagenet256"))
    assert isinstance(network, ADMUNet)
    names = to_openai(network.state_dict(), network)

    def places(path: str, part: str) -> list[int]:
        return sorted({int(name.split(".")[1]) for name in names if name.startswith(path) and name.endswith(part)})

    assert places("input_blocks", ".qkv.weight") == [10, 11, 13, 14, 16, 17]
    assert places("output_blocks", ".qkv.weight") == list(range(9))
    ups = [name for name in names if name.startswith("output_blocks") and name.endswith("in_layers.0.weight")]
    last = {int(name.split(".")[1]) for name in ups if int(name.split(".")[2]) > 0}
    assert last == {2, 5, 8, 11, 14}
    assert {f"input_blocks.{n}.1.qkv.weight" for n in (3, 6, 9, 12, 15)}.isdisjoint(names)
    assert names["input_blocks.10.1.qkv.weight"].shape == (3 * 512, 512, 1)
    for name in (
        "time_embed.0",
        "time_embed.2",
        "label_emb",
        "input_blocks.0.0",
        "middle_block.2.out_layers.3",
        "out.2",
    ):
        assert f"{name}.weight" in names


def test_a_fresh_network_is_nothing_and_a_fresh_classifier_undecided() -> None:
    x, t = normal(1, 2, 3, 32, 32), torch.tensor([3, 997])
    with torch.no_grad():
        assert torch.equal(unet(**GOLDEN)(x, t), torch.zeros(2, OUT_CHANNELS, 32, 32))
        assert torch.equal(classifier("adaptive")(x, t), torch.zeros(2, 10))
    for module in unet(**GOLDEN).modules():
        if isinstance(module, ResidualBlock):
            assert not module.conv_out.weight.any()
            assert module.conv_in.weight.any()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"image_size": 33}, "image_size = 33: must be a multiple of 2, since 2 levels halve it 1 times"),
        (
            {"channel_multipliers": [1, 0.3]},
            r"channel_multipliers = \[1.0, 0.3\]: 0.3 times base_channels = 32 must be a multiple of",
        ),
        (
            {"attention_resolutions": [12]},
            r"attention_resolutions = \[12\]: 12 is no level's side, must be among \[32, 16\]",
        ),
        ({"heads": 2}, "should have either heads or head_channels"),
        ({"head_channels": 48}, "head_channels = 48: must divide the 64 channels of a level with attention"),
        ({"label_drop": 0.1}, "label_drop = 0.1: goes with classes"),
        ({"low_res_size": 32}, "low_res_size = 32: must be less than image_size = 32"),
    ],
)
def test_an_impossible_network_is_refused_in_one_line(
    tmp_path: Path, dataset: Path, changes: dict[str, object], line: str
) -> None:
    path = write_config(tmp_path, dataset)
    text = path.read_text()
    start, end = text.index("[model]"), text.index("[optimizer]")
    fields = {"kind": "adm-unet"} | GOLDEN | changes
    section = "".join(f"{name} = {value!r}\n" for name, value in fields.items())
    path.write_text(f"{text[:start]}[model]\n{section}[diffusion]\ntimesteps = 20\n{text[end:]}")
    with pytest.raises(ConfigError, match=f"model: {line}") as refused:
        load_config(path)
    assert "\n" not in str(refused.value)


def test_conditioning_is_what_the_section_says() -> None:
    x, t = normal(1, 2, 3, 32, 32), torch.tensor([3, 997])
    with pytest.raises(ValueError, match="label: this network needs it"):
        unet(**CONDITIONAL)(x, t)
    with pytest.raises(ValueError, match="label: this network takes none"):
        unet(**GOLDEN)(x, t, label=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="low_res: this network needs it"):
        unet(**GOLDEN, low_res_size=8)(x, t)


def test_the_null_class_is_one_more_label() -> None:
    section = ADMUNetConfig.model_validate(CONDITIONAL | {"label_drop": 0.1})
    assert (section.null_label, section.label_rows) == (10, 11)
    assert ADMUNetConfig.model_validate(CONDITIONAL).null_label is None
    network = unet(**CONDITIONAL, label_drop=0.1)
    network.load_state_dict(from_openai(golden_weights(network), network, source="golden"))
    x, t = normal(1, 1, 3, 32, 32), torch.tensor([3])
    with torch.no_grad():
        told = [network(x, t, label=torch.tensor([label])) for label in (0, 9, 10)]
    assert not torch.equal(told[0], told[2])
    assert not torch.equal(told[1], told[2])
