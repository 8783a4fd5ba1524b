"""What the UNet promises apart from its outputs: sizes, initial weights, memory formats, checkpointing."""

import math
from typing import Literal

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.harness import unet_section
from trainer.config import DDPMUNetConfig
from trainer.models.ddpm_unet import UNet
from trainer.models.group_norm import GroupNorm
from trainer.models.layers import AttentionBlock, ResidualBlock, timestep_embedding
from trainer.models.stages import Stage, checkpoint_activations

LSUN = {"image_size": 256, "channel_multipliers": [1, 1, 2, 2, 4, 4]}
TINY = unet_section(
    image_size=16, base_channels=16, channel_multipliers=[1, 2], attention_resolutions=[8], norm_groups=8, dropout=0.3
)


def tiny(seed: int = 0) -> UNet:
    """A small network whose every layer matters: none of them is left near zero."""
    torch.manual_seed(seed)
    model = UNet(TINY, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0, 500, 999])


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (unet_section(), 35_746_307),
        (unet_section(**LSUN), 113_673_219),
        (unet_section(**LSUN, base_channels=192), 255_677_955),
    ],
    ids=["cifar10", "lsun", "lsun-large"],
)
def test_the_papers_networks_have_the_papers_sizes(config: DDPMUNetConfig, parameters: int) -> None:
    with torch.device("meta"):
        model = UNet(config, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == len(list(model.parameters()))  # no buffers


def test_attention_is_at_its_resolution_both_ways_and_in_the_middle() -> None:
    with torch.device("meta"):
        model = UNet(unet_section(), 3)
    down, up = (
        [isinstance(layer.attention, AttentionBlock) if isinstance(layer, Stage) else None for layer in path]
        for path in (model.down, model.up)
    )
    assert down == [False, False, None, True, True, None, False, False, None, False, False]
    assert up == [False] * 3 + [None] + [False] * 3 + [None] + [True] * 3 + [None] + [False] * 3
    assert [isinstance(stage.attention, AttentionBlock) for stage in model.middle] == [True, False]


def test_initial_weights_are_fan_avg_uniform_and_near_zero_where_a_branch_ends() -> None:
    torch.manual_seed(0)
    model = UNet(unet_section(base_channels=64), 3)
    branch_ends = {id(model.conv_out)}
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            branch_ends.add(id(module.conv_out))
        if isinstance(module, AttentionBlock):
            branch_ends.add(id(module.out))
    seen = {nn.Conv2d: 0, nn.Linear: 0, GroupNorm: 0, "near zero": 0}
    for module in model.modules():
        if type(module) not in seen:
            continue
        seen[type(module)] += 1
        assert (module.bias == 0).all()
        if isinstance(module, GroupNorm):
            assert (module.weight == 1).all()
            assert module.eps == 1e-6
            continue
        receptive = module.weight[0, 0].numel()
        fan_avg = (module.weight.shape[0] + module.weight.shape[1]) / 2 * receptive
        scale = 1e-10 if id(module) in branch_ends else 1.0
        seen["near zero"] += scale < 1
        limit = math.sqrt(3 * scale / fan_avg)  # a uniform distribution's variance is limit^2 / 3
        largest, spread = module.weight.abs().max().item(), module.weight.std().item()
        assert 0.98 * limit < largest <= limit * (1 + 1e-6)
        assert spread == pytest.approx(limit / math.sqrt(3), rel=0.03)
    assert seen == {nn.Conv2d: 65, nn.Linear: 48, GroupNorm: 51, "near zero": 29}


def test_one_seed_makes_one_network() -> None:
    for (name, one), two in zip(tiny(3).state_dict().items(), tiny(3).state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(tiny(3).conv_in.weight, tiny(4).conv_in.weight)


def test_the_timestep_embedding_is_sin_then_cos_and_float32_under_autocast() -> None:
    t = torch.tensor([0, 1, 998, 999])
    with torch.autocast("cpu", torch.bfloat16):
        embedding = timestep_embedding(t, 16)
    assert embedding.dtype == torch.float32
    for row, step in zip(embedding, t.tolist(), strict=True):
        phases = [step * math.exp(-i * math.log(10_000) / 7) for i in range(8)]
        expected = torch.tensor([math.sin(p) for p in phases] + [math.cos(p) for p in phases])
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=0)  # float32 phases up to 999


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_recomputes_what_it_says(kind: Literal["selective", "full"]) -> None:
    """Convolutions of the stages run again in the backward pass under "full" only."""
    model = tiny().train()
    checkpoint_activations(model, kind)
    with FlopCounterMode(display=False) as counter:
        loss = model(*batch()).square().mean()
    forward = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    again = counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)
    assert again == 0 if kind == "selective" else 0.5 * forward < again < forward


def test_activation_checkpointing_leaves_gradients_as_they_are_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0
    plain_forward = ResidualBlock.forward

    def counting_forward(self: ResidualBlock, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return plain_forward(self, x, temb)

    monkeypatch.setattr(ResidualBlock, "forward", counting_forward)
    blocks = 2 * 2 + 2 + 3 * 2
    gradients = {}
    for checkpointing in ("none", "selective", "full"):
        runs = 0
        model = tiny().train()
        checkpoint_activations(model, checkpointing)
        torch.manual_seed(7)
        model(*batch()).square().mean().backward()
        assert runs == blocks * (1 if checkpointing == "none" else 2)  # once more in the backward pass
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients["none"].items():
        assert torch.equal(gradient, gradients["selective"][name]), name
        assert torch.equal(gradient, gradients["full"][name]), name
        assert gradient.abs().max() > 0, name

    model.eval()
    runs = 0
    model(*batch()).sum().backward()
    assert runs == blocks


def test_dropout_acts_in_training_only() -> None:
    model, (x, t) = tiny(), batch()
    with torch.no_grad():
        assert not torch.equal(model.train()(x, t), model(x, t))
        assert torch.equal(model.eval()(x, t), model(x, t))


def test_channels_last_flows_through_and_changes_nothing() -> None:
    model, (x, t) = tiny().eval(), batch()
    formats = {}
    for name, module in model.named_modules():
        if isinstance(module, Stage | nn.Conv2d):
            module.register_forward_hook(
                lambda _module, inputs, output, name=name: formats.update(
                    {name: all(x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], output))}
                )
            )
    with torch.no_grad():
        contiguous = model(x, t)
        model.to(memory_format=torch.channels_last)
        formats.clear()
        channels_last = model(x.to(memory_format=torch.channels_last), t)
    assert (contiguous - channels_last).abs().max() < 1e-5
    assert formats
    assert [name for name, kept in formats.items() if not kept] == []


@pytest.mark.slow
def test_the_network_traces_into_one_graph() -> None:
    model, (x, t) = tiny().eval(), batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t), model(x, t), atol=1e-5, rtol=0)


def test_the_network_runs_in_bfloat16_by_autocast_and_as_a_whole() -> None:
    model, (x, t) = tiny().eval(), batch()
    with torch.no_grad():
        exact = model(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(x, t)
        whole = model.to(torch.bfloat16)(x.to(torch.bfloat16), t)
    for output in (autocast, whole):
        assert output.dtype == torch.bfloat16
        assert (output - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "image_size = 30: must be a multiple of 8"),
        ({"base_channels": 48}, "norm_groups = 32: must divide every level's channels, here 48"),
        ({"base_channels": 3, "norm_groups": 1}, "base_channels = 3: must be even and at least 4"),
        (
            {"attention_resolutions": [12]},
            r"attention_resolutions = \[12\]: 12 is no level's side, .* \[32, 16, 8, 4\]",
        ),
    ],
)
def test_an_impossible_network_is_refused_by_field_and_remedy(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet_section(**change)
