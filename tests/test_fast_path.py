"""What makes a step fast does not change what it computes: memory layout, arithmetic, buckets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness import assert_same_state, checkpoint, launch, load_config, logged, overrides, write_config
from tests.test_train_step import BATCH, make_step, micro_batches
from trainer.engine.network.precision import autocast, run_in
from trainer.engine.planning import dry_run
from trainer.engine.planning.dry_run import as_text, describe_run
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.step.train_step import TrainStep
from trainer.models.layers import group_norm


def is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("run", [TrainStep.backward, TrainStep.rehearse], ids=["train", "warm up"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_layer_of_a_training_step_is_given_channels_last(
    tmp_path: Path, precision: str, run: Callable[..., object]
) -> None:
    """The images, x_t and whatever normalisation puts out included; a layer that is not would copy all it is given."""
    step, _ = make_step(tmp_path, f"train.precision={precision}")
    seen: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = is_channels_last(inputs[0]) and is_channels_last(output)

        return hook

    layers = {
        name: module
        for name, module in step.state.main.network.module.named_modules()
        if isinstance(module, nn.Conv2d | nn.GroupNorm)
    }
    for name, module in layers.items():
        module.register_forward_hook(note(name))
    run(step, micro_batches(BATCH)) if run is TrainStep.backward else run(step, step.phases[0])
    assert seen.keys() == layers.keys()
    assert len(seen) > 20
    assert [name for name, kept in seen.items() if not kept] == []
    convolutions = [p for p in step.state.main.network.module.parameters() if p.ndim == 4]
    assert all(is_channels_last(p) and p.grad is not None and is_channels_last(p.grad) for p in convolutions)


def test_what_adds_up_over_a_run_is_float32_in_bfloat16_too(tmp_path: Path) -> None:
    step, _ = make_step(tmp_path, "train.precision=bf16")
    convolved: list[torch.dtype] = []
    conv_in = step.state.main.network.module.get_submodule("conv_in")
    conv_in.register_forward_hook(lambda *seen: convolved.append(seen[2].dtype))
    loss = step.backward(micro_batches(BATCH))
    assert convolved == [torch.bfloat16]
    parameters = list(step.state.main.network.module.parameters())
    kept = {
        "loss": [loss],
        "weights": parameters,
        "gradients": [p.grad for p in parameters],
        "moments": [t for state in step.state.main.network.optimizer.state.values() for t in state.values()],
        "average": step.state.main.averages.by_name["ema"].values,
    }
    for name, tensors in kept.items():
        assert tensors
        assert {t.dtype for t in tensors if t is not None} == {torch.float32}, name
    tables = [table for table in vars(step.state.objective.diffusion).values() if isinstance(table, torch.Tensor)]
    assert {table.dtype for table in tables if table.is_floating_point()} == {torch.float32, torch.float64}


def test_statistics_of_normalisation_are_not_rounded_to_bfloat16() -> None:
    """Of values around 100 that differ by about 1 a mean in bfloat16 would be off by 0.25."""
    torch.manual_seed(0)
    norm = group_norm(4, 16)
    x = (100 + torch.randn(2, 16, 8, 8)).bfloat16()
    with autocast("bf16", x.device):
        found = norm(x)
    exact = norm.double()(x.double())
    assert (found.double() - exact).abs().max() < 2**-8 * exact.abs().max()


def test_the_optimizer_and_the_exchange_take_the_fast_way(tmp_path: Path) -> None:
    step, _ = make_step(tmp_path)
    assert all(group["fused"] for group in step.state.main.network.optimizer.param_groups)
    settings = make_accelerator(bucket_size=50 * 2**20).ddp_handler
    assert (settings.gradient_as_bucket_view, settings.bucket_cap_mb) == (True, 50)


@pytest.mark.slow
def test_a_run_in_many_buckets_is_the_same_run_and_resumes_to_the_bit(tmp_path: Path, dataset: Path) -> None:
    arguments = ("--config", str(write_config(tmp_path, dataset)), *overrides(train__bucket_size="4 kB"))
    launch(2, "--config", str(write_config(tmp_path, dataset, "one bucket")))
    launch(2, *arguments)
    assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "one bucket"), abs=1e-6)
    (tmp_path / "run").rename(tmp_path / "whole")
    launch(2, *arguments, *overrides(train__duration="4 steps"))
    launch(2, *arguments)
    assert checkpoint(tmp_path / "run", 6).exists()
    assert_same_state(tmp_path / "whole", tmp_path / "run", 6)


@pytest.fixture
def _float32_as_it_was() -> Any:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, how in zip(backends, before, strict=True):
        backend.fp32_precision = how


@pytest.mark.usefixtures("_float32_as_it_was")
def test_float32_is_float32_and_tf32_is_asked_for() -> None:
    """PyTorch's own default rounds convolutions, and only these."""
    on_gpu = torch.device("cuda")
    for precision, how in (("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")):
        run_in(precision, nn.Identity(), on_gpu)  # type: ignore[arg-type]
        assert torch.backends.cuda.matmul.fp32_precision == how
        assert torch.backends.cudnn.conv.fp32_precision == how


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_arithmetic_that_a_cpu_does_not_have_is_refused(config_path: Path, precision: str) -> None:
    output = launch(1, "--config", str(config_path), *overrides(train__precision=precision), expect=2)
    assert f"error: train.precision = '{precision}': needs a GPU; on a CPU take 'fp32' or 'bf16'" in output


def test_a_dry_run_tells_where_bfloat16_is_slow(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_path, "train.precision=bf16")
    for lacks in (False, True):
        monkeypatch.setattr(dry_run, "cpu_lacks_bf16", lambda lacks=lacks: lacks)
        plan, _ = describe_run(config, world_size=1)
        assert bool(plan["remarks"]) == lacks
        assert ("this CPU has neither AVX512-BF16 nor AMX" in as_text(plan)) == lacks
    assert not describe_run(load_config(config_path), world_size=1)[0]["remarks"]


def test_more_than_float32s_share_of_memory_is_not_foretold_for_tf32(config_path: Path) -> None:
    fp32, tf32, bf16 = (
        describe_run(load_config(config_path, f"train.precision={name}"), world_size=1)[0]["memory_per_device_bytes"]
        for name in ("fp32", "tf32", "bf16")
    )
    assert fp32 == tf32 != bf16
