"""What cannot be imported exactly is refused, by the name of the setting, tensor or choice that stands against it."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from tests.harness import overrides
from tests.networks import make_run, reference
from tests.published import (
    PUBLISHED_SCHEDULER,
    SMALL,
    publish,
)
from tests.test_convert_export import run_convert
from trainer.config import Config
from trainer.diffusion.ddpm.schedules import make_betas
from trainer.engine.run_folder import identity


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: Path, *more: str) -> str:
    out = source.parent / "refused"
    assert run_convert(monkeypatch, "import", source, "--out", out, *more) == 2
    assert not out.exists()
    assert not list(out.parent.glob(".refused*"))
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("freq_shift", 0, "should be 1"),
        ("flip_sin_to_cos", True, "should be False"),
        ("downsample_padding", 1, "should be 0"),
        ("attention_head_dim", 8, "should be None"),
        ("norm_eps", 1e-5, "should be 1e-06"),
        ("mid_block_type", None, "should be 'UNetMidBlock2D'"),
        ("center_input_sample", True, "should be False"),
        ("time_embedding_type", "fourier", "should be 'positional'"),
        ("resnet_time_scale_shift", "scale_shift", "should be 'default'"),
        ("add_attention", False, "should be True"),
        ("act_fn", "relu", "should be 'silu'"),
        ("out_channels", 4, "should be in_channels, 3, or twice as many"),
        ("sample_size", None, "should be the side of square images"),
        ("sample_size", [8, 16], "should be the side of square images"),
        ("block_out_channels", [8, 12], "each should be a multiple of the first, 8"),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"], "each should be one of DownBlock2D, AttnDownBlock2D"),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"], "should have attention where down_block_types have it"),
        ("encoder_hid_dim", 3, "a setting that this network does not have"),
        ("_class_name", "UNet2DConditionModel", "should be 'UNet2DModel'"),
    ],
)
def test_a_setting_of_another_network_is_refused_by_its_name(
    field: str,
    value: object,
    right: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict(), **{field: value})
    line = refusal(monkeypatch, capsys, source)
    assert line.startswith(f"error: {source}/config.json: {field} = {value!r}: {right}")


@pytest.mark.parametrize(
    "field", ["freq_shift", "flip_sin_to_cos", "downsample_padding", "attention_head_dim", "norm_eps"]
)
def test_a_setting_that_is_left_out_means_diffusers_default(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    settings = json.loads((source / "config.json").read_text())
    del settings[field]
    (source / "config.json").write_text(json.dumps(settings))
    default = inspect.signature(UNet2DModel).parameters[field].default
    assert f"{field} is left out, which means {default!r}: should be" in refusal(monkeypatch, capsys, source)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction_type", "flow_prediction"),
        ("clip_sample", False),
        ("clip_sample_range", 2.0),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("variance_type", "learned"),
        ("beta_schedule", "sigmoid"),
    ],
)
def test_another_process_is_refused_by_the_schedulers_field(
    field: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    (source / "scheduler_config.json").write_text(json.dumps(PUBLISHED_SCHEDULER | {field: value}))
    line = refusal(monkeypatch, capsys, source)
    assert line.startswith(f"error: {source}/scheduler_config.json: ")
    assert f"{field} = {value!r}" in line


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_table_of_betas_is_recognised_and_nothing_near_it(
    schedule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    betas = make_betas(schedule, 500)
    for name, table in (("near", betas * 0.999), ("same", betas.float())):
        settings = PUBLISHED_SCHEDULER | {"trained_betas": table.tolist(), "num_train_timesteps": 500}
        (source / "scheduler_config.json").write_text(json.dumps(settings))
        assert run_convert(monkeypatch, "import", source, "--out", tmp_path / name) == 0
        diffusion = Config.load(tmp_path / name / "config.toml").diffusion
        assert (diffusion.schedule, diffusion.timesteps) == (schedule if name == "same" else "table", 500)
        assert diffusion.betas == (None if name == "same" else table.tolist())


NAME = "down_blocks.1.attentions.0.to_k.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"{NAME}: missing (1 of 144 tensors are)"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra: of no layer of this network"),
        (
            lambda tensors: tensors.update({NAME: torch.zeros(16, 8)}),
            f"{NAME}: shape (16, 8), the network has (16, 16)",
        ),
        (lambda tensors: tensors.update({NAME: torch.zeros(16, 16, 3, 3)}), f"{NAME}: shape (16, 16, 3, 3), the"),
        (lambda tensors: tensors[NAME][3, 4].fill_(float("nan")), f"{NAME}: holds NaN or infinity"),
        (lambda tensors: tensors[NAME][3, 4].fill_(float("-inf")), f"{NAME}: holds NaN or infinity"),
        (
            lambda tensors: tensors.update({NAME: torch.zeros(16, 16, dtype=torch.int64)}),
            f"{NAME}: torch.int64, weights are floating point numbers",
        ),
        (lambda tensors: tensors.update({NAME: "text"}), f"{NAME}: a str; a state dict holds tensors only"),
    ],
)
def test_a_wrong_tensor_is_refused_by_its_name(
    damage: Callable[[dict[str, Any]], object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = {name: value.clone() for name, value in reference(SMALL).state_dict().items()}
    damage(tensors)
    source = publish(tmp_path / "ddpm", SMALL, tensors)
    line = refusal(monkeypatch, capsys, source)
    assert line.startswith(f"error: {source}/diffusion_pytorch_model.bin: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "ema"], "--weights ema: {source} is no run or checkpoint of ours"),
        (["--image-size", "8"], "--image-size 8: {source} says itself"),
        (["--set", "model.base_channels=16"], "model.base_channels = 16: the weights in {source} have 8"),
        (["--set", "diffusion.timesteps=10"], "diffusion.timesteps = 10: the weights in {source} have 1000"),
        (["--set", "model.bas_channels=16"], "{source} (choose by --set what it does not say): model.bas_channels: "),
        (["--config", "nowhere.toml"], "nowhere.toml: cannot be read"),
    ],
)
def test_choices_that_the_source_does_not_leave_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    line = refusal(monkeypatch, capsys, source, *arguments)
    assert line.startswith("error: " + message.format(source=source))


def test_dropout_variance_and_training_are_free_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(tmp_path / "ddpm", SMALL, reference(SMALL).state_dict())
    chosen = overrides(model__dropout=0.3, diffusion__variance="small", train__global_batch=7, data__path="mine")
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run", *chosen) == 0
    config = Config.load(tmp_path / "run" / "config.toml")
    assert (config.model.dropout, config.diffusion.variance) == (0.3, "small")
    assert (config.train.global_batch, config.data.path) == (7, "mine")


def test_what_is_no_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    torch.save([torch.zeros(1)], tmp_path / "list.ckpt")
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.ckpt")
    torch.save(reference(SMALL).state_dict(), tmp_path / "diffusers.bin")
    for name, message in (
        ("nothing", "nothing: no such file or folder"),
        ("empty", "empty/config.json: cannot be read"),
        ("broken.ckpt", "broken.ckpt: no pickle that holds only tensors"),
        ("broken.safetensors", "broken.safetensors: cannot be read"),
        ("list.ckpt", "list.ckpt: holds a list, should be a state dict"),
        ("other.ckpt", "other.ckpt: conv_in.weight: shape (1,), should be a convolution's"),
        ("diffusers.bin", "diffusers.bin: no state dict in the layout of pytorch_diffusion"),
    ):
        assert message in refusal(monkeypatch, capsys, tmp_path / name)


def test_an_existing_folder_is_never_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path)
    before = sorted(run.rglob("*"))
    assert run_convert(monkeypatch, "import", run, "--out", run) == 2
    assert f"error: --out {run}: exists already" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_what_half_of_the_output_means_is_not_changed_by_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = make_run(tmp_path, "diffusion.variance=learned-range", "diffusion.loss=hybrid")
    learned = ("--set", "diffusion.variance=learned", "--set", "diffusion.loss=bound")
    line = refusal(monkeypatch, capsys, run, *learned)
    assert "diffusion.variance = 'learned': the weights in" in line
    assert "have 'learned-range'" in line
    assert identity(config, None)["diffusion.variance"] == "learned-range"
