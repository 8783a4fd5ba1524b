"""Weights and settings as anybody may make them: one short line within a second or two, whatever they say."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.networks import reference
from tests.published import PUBLISHED_SCHEDULER, PUBLISHED_UNET, SMALL, publish
from tests.test_manifests import HEADERS
from trainer.engine.processes.collectives import make_accelerator
from trainer.errors import ConversionError, TrainerError
from trainer.interop.layouts import fit
from trainer.interop.sources import open_source, read_tensors
from trainer.models.ddpm_unet import UNet

DEEP = "[" * 200_000 + "]" * 200_000


def refusal(path: Path) -> str:
    started = time.monotonic()
    with pytest.raises(TrainerError) as fault:
        open_source(path, weights=None, image_size=None, accelerator=make_accelerator())
    assert time.monotonic() - started < 2
    assert "\n" not in str(fault.value)
    assert len(str(fault.value)) < 1000
    return str(fault.value)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A diffusers folder with a network's settings and no weights: it is to be refused before they are looked for."""
    folder = tmp_path / "ddpm"
    folder.mkdir()
    settings = PUBLISHED_UNET | {
        "sample_size": 8,
        "norm_num_groups": 4,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "scheduler_config.json").write_text(json.dumps(PUBLISHED_SCHEDULER))
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers_per_block", 10**9),
        ("layers_per_block", 10**300),
        ("sample_size", 2**1000),
        ("block_out_channels", [8] * 100_000),
        ("block_out_channels", [10**9, 10**9]),
        ("block_out_channels", []),
        ("block_out_channels", [0, 0]),
        ("block_out_channels", {"8": 16}),
        ("block_out_channels", 8),
        ("in_channels", 10**9),
        ("norm_num_groups", 10**30),
        ("dropout", float("nan")),
        ("dropout", "much"),
        ("down_block_types", [["DownBlock2D"], {}]),
        ("up_block_types", None),
        ("sample_size", [[8], [8]]),
        ("act_fn", "\x1b]0;owned\x07" * 10_000),
        ("_class_name", ["UNet2DModel"]),
    ],
)
def test_settings_of_any_kind_are_refused_at_once(source: Path, field: str, value: Any) -> None:
    rewrite(source / "config.json", **{field: value})
    if field in ("in_channels", "block_out_channels") and value == 10**9:
        rewrite(source / "config.json", out_channels=value)
    refusal(source)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_train_timesteps", 10**12),
        ("num_train_timesteps", -5),
        ("num_train_timesteps", "1000"),
        ("num_train_timesteps", 2.5),
        ("trained_betas", 7),
        ("trained_betas", []),
        ("trained_betas", [[0.1], [0.2]]),
        ("trained_betas", [0.1, None]),
        ("trained_betas", ["a"]),
        ("trained_betas", [0.1] * 1_000_001),
        ("trained_betas", {"0": 0.1}),
        ("beta_end", "x"),
        ("beta_end", float("inf")),
        ("beta_start", None),
        ("prediction_type", ["epsilon"]),
        ("variance_type", {}),
        ("beta_schedule", [1]),
        ("_class_name", {}),
    ],
)
def test_schedules_of_any_kind_are_refused_at_once(source: Path, field: str, value: Any) -> None:
    rewrite(source / "scheduler_config.json", **{field: value})
    refusal(source)


@pytest.mark.parametrize("content", [DEEP, "", "null", '{"a": ' + "9" * 5000 + "}", "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_files_that_hold_no_settings_are_refused(source: Path, name: str, content: str) -> None:
    (source / name).write_bytes(content.encode(errors="surrogateescape"))
    assert refusal(source).startswith(f"{source / name}: ")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_file_is_not_read(source: Path, name: str, make: Any) -> None:
    (source / name).unlink(missing_ok=True)
    make(source / name)
    assert refusal(source).startswith(f"{source}")


@pytest.mark.timeout(20)
def test_settings_without_end_are_not_read(source: Path) -> None:
    with (source / "config.json").open("r+b") as stream:
        stream.truncate(1 << 40)
    assert "bytes" in refusal(source)


def test_links_to_files_are_read_as_caches_of_the_hub_have_them(tmp_path: Path) -> None:
    blobs = publish(tmp_path / "blobs", SMALL, reference(SMALL).state_dict())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert open_source(snapshot, weights=None, image_size=None, accelerator=make_accelerator()).weights


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", [kind for kind in HEADERS if kind not in ("another shape", "integers")])
def test_tensors_of_others_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(HEADERS[kind])
    assert refusal(path).startswith(f"{path}: ")


AUTHORS = {"conv_in.weight": (8, 3, 3, 3), "down.0.block.0.conv1.weight": (8, 8, 3, 3), "down.0.attn.0.q.weight": (8,)}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "changes",
    [
        {"conv_in.weight": (0, 3, 3, 3)},
        {f"down.{level}.block.0.conv1.weight": (8, 8, 3, 3) for level in range(3000)},
        {f"down.0.block.{block}.conv1.weight": (8, 8, 3, 3) for block in range(3000)},
        {"down.0.block.0.conv1.weight": ()},
    ],
)
def test_state_dicts_of_any_shapes_are_refused_at_once(tmp_path: Path, changes: dict[str, tuple[int, ...]]) -> None:
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in (AUTHORS | changes).items()}
    torch.save(tensors, tmp_path / "weights.ckpt")
    assert refusal(tmp_path / "weights.ckpt").startswith(f"{tmp_path / 'weights.ckpt'}: ")


def weights_with(value: Tensor) -> dict[str, Tensor]:
    from trainer.models.ddpm_unet import UNet

    tensors = UNet(SMALL, 3).state_dict()
    return tensors | {"conv_in.bias": tensors["conv_in.bias"].to(value.dtype).index_fill(0, torch.tensor(3), value)}


def test_finiteness_is_that_of_the_numbers_that_are_kept() -> None:
    """float64 has 1e39, float32 has not."""
    fit(weights_with(torch.tensor(1e38, dtype=torch.float64)), UNet(SMALL, 3), source="there")
    with pytest.raises(ConversionError, match=r"there: conv_in.bias: holds NaN or infinity, as float32"):
        fit(weights_with(torch.tensor(1e39, dtype=torch.float64)), UNet(SMALL, 3), source="there")


def test_numbers_of_8_bits_are_taken(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    assert read_tensors(tmp_path / "w.safetensors")["w"].float().tolist() == [1] * 4
