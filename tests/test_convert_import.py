"""Imported weights are the ones that were there, in the network that they were trained in, or they are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline
from safetensors.torch import save_file
from torch import Tensor

from tests.harness import checkpoint, events, launch, overrides, tensors_of, unet_section
from tests.networks import make_run, randomise, reference
from tests.published import (
    SMALL,
    as_convolutions,
    authors_names,
    old_names,
    publish,
)
from tests.test_convert_export import TWO_LEVELS, export, network_of, run_convert
from trainer.config import Config, DDPMUNetConfig
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.run_folder import check_identity
from trainer.errors import CheckpointError

CIFAR10 = unet_section(base_channels=32)
CELEBA64 = unet_section(image_size=64, base_channels=32, channel_multipliers=[1, 2, 2, 2, 4])
LSUN256 = unet_section(image_size=256, base_channels=32, channel_multipliers=[1, 1, 2, 2, 4, 4])


def largest_difference(run: Path, theirs: torch.nn.Module, side: int) -> float:
    config = Config.load(run / "config.toml")
    x, t = torch.randn(2, 3, side, side), torch.tensor([3, 871])
    with torch.no_grad():
        outputs = [network_of(run, config, kind, step=0)(x, t) for kind in ("ema", "model")]
        expected = theirs(x, t).sample
    assert 0.3 < expected.std() < 3
    return max((output - expected).abs().max().item() for output in outputs)


@pytest.mark.parametrize(
    ("network", "form"),
    [
        pytest.param(CIFAR10, old_names, id="cifar10-old-names", marks=pytest.mark.slow),
        pytest.param(CELEBA64, lambda tensors: as_convolutions(old_names(tensors)), id="celeba64-old-convolutions"),
        pytest.param(LSUN256, dict, id="lsun256-new-names", marks=pytest.mark.slow),
    ],
)
def test_the_published_layout_gives_diffusers_output(
    network: DDPMUNetConfig,
    form: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = reference(network)
    randomise(theirs)
    source = publish(tmp_path / "ddpm", network, form(theirs.state_dict()))
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run") == 0
    assert largest_difference(tmp_path / "run", theirs, side=32) < 1e-5
    config = Config.load(tmp_path / "run" / "config.toml")
    assert config.model.image_size == network.image_size
    assert config.model.attention_resolutions == [16]
    assert (config.diffusion.timesteps, config.diffusion.schedule) == (1000, "linear")
    assert config.diffusion.variance == "large"
    assert config.run_dir == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("network", "prefix", "suffix"),
    [
        pytest.param(CIFAR10, "", "ckpt", id="cifar10"),
        pytest.param(CELEBA64, "module.", "pth", id="celeba64-data-parallel", marks=pytest.mark.slow),
        pytest.param(LSUN256, "", "safetensors", id="lsun256-safetensors", marks=pytest.mark.slow),
    ],
)
def test_the_authors_layout_gives_diffusers_output(
    network: DDPMUNetConfig, prefix: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = reference(network)
    randomise(theirs)
    levels = len(network.channel_multipliers)
    tensors = {prefix + name: value for name, value in authors_names(theirs.state_dict(), levels).items()}
    source = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, source)
    else:
        torch.save(tensors, source)
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run") == 0
    assert largest_difference(tmp_path / "run", theirs, side=32) < 1e-5
    config = Config.load(tmp_path / "run" / "config.toml")
    assert (config.model.image_size, config.model.attention_resolutions) == (network.image_size, [16])
    assert config.diffusion.variance == ("large" if network.image_size == 32 else "small")


def test_the_side_of_the_images_is_asked_for_where_it_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = unet_section(
        image_size=16, base_channels=32, channel_multipliers=[1, 2], blocks_per_level=1, attention_resolutions=[16, 8]
    )
    source = tmp_path / "model.ckpt"
    torch.save(authors_names(reference(network).state_dict(), 2), source)
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run") == 2
    assert "attends at 2 levels, so the side of its images is not known; give it by" in capsys.readouterr().err
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run", "--image-size", 16) == 0
    model = Config.load(tmp_path / "run" / "config.toml").model
    assert (model.image_size, model.attention_resolutions, model.blocks_per_level) == (16, [16, 8], 1)


@pytest.mark.parametrize("kind", ["ema", "model"])
@pytest.mark.parametrize("saved_by", ["us", "DDPMPipeline", "DDIMPipeline"])
def test_import_of_an_export_is_the_identity(
    saved_by: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = make_run(tmp_path, *TWO_LEVELS, "diffusion.schedule=cosine")
    source, more = export(monkeypatch, run, "--weights", kind), []
    if saved_by != "us":
        pipeline = {"DDPMPipeline": DDPMPipeline, "DDIMPipeline": DDIMPipeline}[saved_by]
        pipeline.from_pretrained(source).save_pretrained(tmp_path / "again")
        source = tmp_path / "again"
    if saved_by == "DDIMPipeline":  # knows no variance
        more = ["--set", "diffusion.variance=small"]
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "imported", *more) == 0
    before, after = tensors_of(run, 3), tensors_of(tmp_path / "imported", 0)
    names = [name.removeprefix("ema/") for name in before if name.startswith("ema/")]
    weights = {name for name in after if not name.startswith("optimizer.")}
    assert weights == {f"{group}/{name}" for group in ("ema", "model") for name in names}
    for name in names:
        for group in ("ema", "model"):
            assert torch.equal(after[f"{group}/{name}"], before[f"{kind}/{name}"])
    imported = Config.load(tmp_path / "imported" / "config.toml")
    assert imported.model == config.model
    assert imported.diffusion == config.diffusion


@pytest.mark.parametrize("given", ["run", "checkpoint"])
@pytest.mark.parametrize("kind", ["ema", "model"])
def test_a_run_and_its_checkpoint_can_be_started_from(
    given: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = make_run(tmp_path, "diffusion.variance=large")
    source = run if given == "run" else checkpoint(run, 3)
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "new", "--weights", kind) == 0
    before, after = tensors_of(run, 3), tensors_of(tmp_path / "new", 0)
    weights = {name: value for name, value in after.items() if name.startswith(("model/", "ema/"))}
    assert all(torch.equal(value, before[f"{kind}/{name.partition('/')[2]}"]) for name, value in weights.items())
    assert not any(value.any() for name, value in after.items() if name.startswith("optimizer."))
    imported = Config.load(tmp_path / "new" / "config.toml")
    assert (imported.model, imported.diffusion) == (config.model, config.diffusion)


def test_imported_weights_are_sampled_and_trained_further(tmp_path: Path, dataset: Path) -> None:
    run, _ = make_run(tmp_path)
    imported = tmp_path / "imported"
    config = tmp_path / "run.toml"
    launch(1, "import", str(run), "--out", str(imported), "--config", str(config), script="convert")
    launch(1, "--run", str(imported), "--n", "1", script="sample")
    assert (imported / "samples" / "step-00000000-ema-seed-0" / "000000.png").exists()
    data = overrides(data__path=str(dataset), optimizer__learning_rate=1e-12, train__ema_decay=0.0)
    launch(2, "--config", str(imported / "config.toml"), *data)
    first, changed, started = events(imported)[:3]
    assert [event["event"] for event in (first, changed, started)] == ["imported", "configuration", "started"]
    assert started["resumed_from"] == str(checkpoint(imported, 0))
    before, after = tensors_of(imported, 0), tensors_of(imported, 6)
    for name, value in before.items():
        if name.startswith("optimizer."):
            continue
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)
    # From here on it is a run like any other: seed and data are what they were.
    output = launch(1, "--config", str(imported / "config.toml"), *data, "--set", "seed=4", expect=2)
    assert "seed: 3 in the checkpoint, 4 now" in output


def test_imported_weights_are_not_trained_as_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path)
    assert run_convert(monkeypatch, "import", run, "--out", tmp_path / "new") == 0
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints", make_accelerator())
    path, damaged = checkpoints.find_verified()
    assert path is not None
    assert not damaged
    saved = json.loads((path / "manifest.json").read_text())["identity"]
    trained = {**saved, "seed": 1, "data.flip": True, "train.global_batch": 8, "data (manifest)": "f"}
    check_identity(saved, trained, path)
    with pytest.raises(CheckpointError, match=r"model\.base_channels: 8 in the checkpoint, 16 now"):
        check_identity(saved, {**trained, "model.base_channels": 16}, path)


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("where", ["ddpm/diffusion_pytorch_model.bin", "model.ckpt", "model.pth"])
def test_no_pickle_is_executed(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, file = tmp_path / "trace", tmp_path / where
    tensors: dict[str, Any] = dict(reference(SMALL).state_dict())
    publish(tmp_path / "ddpm", SMALL, tensors)
    torch.save({**tensors, "conv_in.weight": Malicious(trace)}, file)
    source = file.parent if "ddpm" in where else file
    assert run_convert(monkeypatch, "import", source, "--out", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: no pickle that holds only tensors, so it is not loaded")
    assert not trace.exists()
    assert not (tmp_path / "run").exists()
    torch.load(file, weights_only=False)  # it would have
    assert trace.exists()
