"""CUDA graphs of compiled stages: asked for, marked, and with gradients that no replay writes over."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.harness import load_config, overrides, unet_section
from tests.networks import randomise
from tests.test_compile import BATCH, relative_error
from tests.test_train_step import make_step, micro_batches
from trainer.engine import build
from trainer.engine.network.compilation import compile_stages
from trainer.engine.network.precision import multiply_float32
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.errors import ConfigError
from trainer.models.ddpm_unet import UNet
from trainer.models.stages import ActivationCheckpointing, checkpoint_activations


@pytest.fixture(autouse=True)
def _compiled_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    multiply_float32("ieee")
    yield
    torch.compiler.reset()


def accumulated_over_steps(kind: ActivationCheckpointing, *, cuda_graphs: bool) -> list[Tensor]:
    """Gradients of all parameters, flat, after each of three steps of two micro-batches, with dropout."""
    torch.manual_seed(0)
    shape = unet_section(
        image_size=16, base_channels=32, channel_multipliers=[1], attention_resolutions=[], dropout=0.3
    )
    network = UNet(shape, 3)
    randomise(network)
    network.cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    checkpoint_activations(network, kind)
    optimizer = guarded_adam(network)
    if cuda_graphs:
        compile_stages(network, None, cuda_graphs=True)
        optimizer.keep_gradients()
    steps = []
    for step in range(3):
        for micro_step in range(2):
            torch.manual_seed(2 * step + micro_step)
            if cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            x = torch.randn(BATCH, 3, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
            network(x, torch.arange(BATCH, device="cuda")).square().mean().backward()
        steps.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        optimizer.zero_grad()
    return steps


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_cuda_graphs_accumulate_the_gradients_of_an_uncompiled_network(kind: ActivationCheckpointing) -> None:
    """Other images and masks in every micro-batch, also where graphs are replayed (from the third on)."""
    eager, found = accumulated_over_steps("none", cuda_graphs=False), accumulated_over_steps(kind, cuda_graphs=True)
    for one, other in zip(found, eager, strict=True):
        assert relative_error(one, other) < 1e-5


def guarded_adam(network: nn.Module) -> GuardedAdam:
    return GuardedAdam(network.parameters(), learning_rate=0.1, betas=(0.9, 0.999), eps=1e-8, clip_norm=1.0)


class Replayed(torch.autograd.Function):
    """2 x, with a gradient in memory that the next backward pass writes over, as a CUDA graph's is."""

    pool = torch.zeros(3)

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # noqa: ARG004
        return 2 * x

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:  # noqa: ARG004
        torch.mul(dy, 2, out=Replayed.pool)
        return Replayed.pool.detach()


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_in_reused_memory_accumulate_where_they_are_kept_elsewhere(keep: bool) -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = guarded_adam(nn.ParameterList([weight]))
    if keep:
        optimizer.keep_gradients()
    for _ in range(2):
        for factor in (1.0, 10.0):
            (factor * Replayed.apply(weight)).sum().backward()
        assert weight.grad is not None
        # 2 (1 + 10), unless autograd takes the first 2 in place, which is 20 when the second 20 is added.
        assert weight.grad.tolist() == [22.0 if keep else 40.0] * 3
        optimizer.zero_grad()


def test_a_step_with_cuda_graphs_marks_each_micro_batch_and_keeps_its_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    marks: list[int] = []
    monkeypatch.setattr(build, "compile_stages", lambda *_, cuda_graphs: asked.append(cuda_graphs))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(len(marks)))
    chosen = ("train.micro_batch=2", "train.compile=regional", "train.cuda_graphs=true")
    step, _ = make_step(tmp_path, *chosen)
    assert asked == [True]

    def places() -> list[int]:
        return [p.grad.data_ptr() for p in step.state.main.network.module.parameters() if p.grad is not None]

    at_first = places()
    assert len(at_first) == len(list(step.state.main.network.module.parameters()))
    step.update(step.backward(micro_batches(2))).read()
    assert places() == at_first
    assert len(marks) == step.layout.accumulation


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_inductor_is_asked_for_cuda_graphs(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda forward, **settings: asked.append(settings["options"]) or forward)
    network = UNet(unet_section(image_size=16, base_channels=32, channel_multipliers=[1], attention_resolutions=[]), 3)
    compile_stages(network, None, cuda_graphs=cuda_graphs)
    assert [options["triton.cudagraphs"] for options in asked] == [cuda_graphs] * len(asked)
    assert len(asked) == 7  # two on the way down, two in the middle, three on the way up


def test_cuda_graphs_without_a_cuda_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    network = UNet(unet_section(image_size=16, base_channels=32, channel_multipliers=[1], attention_resolutions=[]), 3)
    with pytest.raises(ConfigError, match="no CUDA device is here; take false"):
        compile_stages(network, None, cuda_graphs=True)


@pytest.mark.parametrize("others", [overrides(train__compile="none"), overrides(train__strategy="fsdp2")])
def test_cuda_graphs_are_for_compiled_stages_whose_memory_stays_in_place(config_path: Path, others: list[str]) -> None:
    chosen = [*overrides(train__compile="regional", train__cuda_graphs="true"), *others]
    with pytest.raises(ConfigError, match='cuda_graphs is for compile = "regional" with strategy = "ddp"'):
        load_config(config_path, *chosen[1::2])
