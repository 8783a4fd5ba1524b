"""ADM's networks take the engine's fast path, and train under any strategy."""

from pathlib import Path

import pytest
import torch
import webdataset as wds
from torch import Tensor, nn

from tests.adm import CONDITIONAL, NETWORKS, golden_weights, normal, unet
from tests.data_harness import encoded, pixels
from tests.harness import (
    assert_same_state,
    largest_difference,
    launch,
    overrides,
    tensors_of,
    write_config,
)
from trainer.interop.openai import from_openai
from trainer.models.adm_unet import ADMStage, ADMUNet
from trainer.models.backbones import example_inputs
from trainer.models.stages import Stage, checkpoint_activations


@pytest.fixture(params=["unet", "convolutions", "upsampler"])
def random_network(request: pytest.FixtureRequest) -> tuple[ADMUNet, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """A network whose every layer matters, and inputs of it."""
    network = NETWORKS[request.param]()
    network.load_state_dict(from_openai(golden_weights(network), network, source="golden"))
    _, _, cond = example_inputs(network.section, 2)
    if "low_res" in cond:
        cond["low_res"] = normal(2, 2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    return network, (normal(1, 2, 3, 32, 32), torch.tensor([3, 997])), cond


Random = tuple[ADMUNet, tuple[Tensor, Tensor], dict[str, Tensor]]


def test_channels_last_flows_through_and_changes_nothing(random_network: Random) -> None:
    network, (x, t), cond = random_network
    network.eval()
    kept: dict[str, bool] = {}
    for name, module in network.named_modules():
        if isinstance(module, Stage | nn.Conv2d | nn.GroupNorm):
            module.register_forward_hook(
                lambda _module, inputs, output, name=name: kept.update(
                    {name: all(h.is_contiguous(memory_format=torch.channels_last) for h in (inputs[0], output))}
                )
            )
    with torch.no_grad():
        contiguous = network(x, t, **cond)
        kept.clear()
        network.to(memory_format=torch.channels_last)
        channels_last = network(x.to(memory_format=torch.channels_last), t, **cond)
    assert (contiguous - channels_last).abs().max() < 1e-5
    assert [name for name, still in kept.items() if not still] == []
    assert len(kept) > 20


def test_it_runs_in_bfloat16(random_network: Random) -> None:
    network, (x, t), cond = random_network
    network.eval()
    with torch.no_grad():
        exact = network(x, t, **cond)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x, t, **cond)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.slow
@pytest.mark.parametrize("random_network", ["upsampler"], indirect=True)
def test_it_traces_into_one_graph(random_network: Random) -> None:
    network, (x, t), cond = random_network
    compiled = torch.compile(network.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, **cond), network(x, t, **cond), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_leaves_gradients_as_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    compute = ADMStage.compute

    def counted(self: ADMStage, h: Tensor, temb: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return compute(self, h, temb)

    monkeypatch.setattr(ADMStage, "compute", counted)
    gradients, counts = [], []
    for chosen in ("none", kind):
        calls = 0
        network = unet(**CONDITIONAL, dropout=0.3).train()
        network.load_state_dict(from_openai(golden_weights(network), network, source="golden"))
        checkpoint_activations(network, chosen)  # type: ignore[arg-type]
        torch.manual_seed(7)
        found = network(normal(1, 2, 3, 32, 32), torch.tensor([3, 997]), label=torch.tensor([1, 5]))
        found.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
        counts.append(calls)
    assert counts[1] == 2 * counts[0]
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.abs().max() > 0, name


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with samples of a class and a smaller image, and `whole`, a run of an upsampler that takes classes."""
    folder = tmp_path_factory.mktemp("upsampler")
    (folder / "data").mkdir()
    with wds.TarWriter(str(folder / "data" / "0.tar")) as writer:
        for n in range(12):
            low = encoded(pixels(100 + n, 4, 4))
            writer.write({"__key__": f"{n:02d}", "png": encoded(pixels(n)), "low.png": low, "cls": n % 3})
    train_upsampler(folder, "whole")
    return folder


def train_upsampler(folder: Path, name: str, *legs: tuple[int, str]) -> None:
    """In legs of the same length, each of which has its number of processes and its strategy."""
    config = write_config(folder, folder / "data", name)
    fields = overrides(
        model__kind="adm-unet",
        model__heads="2",
        model__classes="3",
        model__low_res_size="4",
        model__dropout="0.0",
        data__cond='["label", "low_res"]',
    )
    for leg, (ranks, strategy) in enumerate(legs or [(1, "ddp")], start=1):
        until = overrides(train__duration=f"{6 * leg // len(legs or [0])} steps", train__strategy=strategy)
        launch(ranks, "--config", str(config), *fields, *until)


@pytest.mark.slow
def test_an_upsampler_that_takes_classes_resumes_to_the_bit(upsampler: Path) -> None:
    train_upsampler(upsampler, "resumed", (1, "ddp"), (1, "ddp"))
    assert_same_state(upsampler / "whole", upsampler / "resumed", 6)
    tensors = tensors_of(upsampler / "whole", 6)
    assert tensors["model/label_embedding.weight"].shape == (3, 32)
    assert tensors["model/conv_in.weight"].shape == (8, 6, 3, 3)


@pytest.mark.parametrize(
    "legs",
    [
        pytest.param([(2, "zero3"), (1, "ddp")], marks=pytest.mark.slow),
        pytest.param([(2, "fsdp2"), (2, "zero1"), (2, "zero3")], marks=pytest.mark.slow),
    ],
    ids=["zero3-ddp", "fsdp2-zero1-zero3"],
)
def test_an_upsampler_trains_under_any_strategy(upsampler: Path, legs: list[tuple[int, str]]) -> None:
    train_upsampler(upsampler, str(len(legs)), *legs)
    whole, moved = (tensors_of(upsampler / name, 6) for name in ("whole", str(len(legs))))
    assert largest_difference(moved, whole) < 1e-4
