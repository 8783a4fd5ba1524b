"""ddpm-init: prepared data to a configuration that suits it."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.cli import main as data_prep
from tests.harness import REPOSITORY
from trainer import init
from trainer.config import Config
from trainer.engine.network.build import build_network
from trainer.errors import ConfigError
from trainer.starting.recipe import recipe
from trainer.starting.source import suitable_size
from trainer.starting.template import as_toml

SIDES = [8, 28, 64, 100, 256, 512, *(pytest.param(side, marks=pytest.mark.slow) for side in (16, 48, 160))]


def configured(folder: Path, *, side: int, images: int, gpu: bool, channels: int = 3) -> Config:
    settings = recipe(image_size=side, channels=channels, images=images, gpu=gpu)
    path = folder / "made.toml"
    path.write_text(as_toml(settings, run_dir=Path("runs/made"), data=Path('da"ta/größe'), about=["about"]))
    return Config.load(path)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_a_configuration_of_any_size_is_valid_and_builds(side: int, gpu: bool, tmp_path: Path) -> None:
    for images, channels in ((1, 1), (300, 3), (1_000_000, 3)):
        config = configured(tmp_path, side=side, images=images, gpu=gpu, channels=channels)
        if images == 300:
            with torch.device("meta"):
                build_network(config)
        assert (config.model.image_size, config.model.channels) == (side, channels)
        assert 4 <= side >> (len(config.model.channel_multipliers) - 1) <= 32
        assert config.data.path == 'da"ta/größe'
        duration = config.train.duration.count
        assert config.optimizer.warmup.count <= duration // 20
        assert 10 / (1 - config.train.ema_decay) <= 1.01 * duration
        assert config.checkpoint.every.count <= duration // 5


@pytest.mark.parametrize(("side", "suitable"), [(513, 512), (250, 256), (33, 32), (129, 128), (75, 72)])
def test_a_size_that_has_no_levels_is_refused_with_one_that_has(side: int, suitable: int) -> None:
    with pytest.raises(ConfigError, match=rf"images of {side} x {side}: .*--size {suitable}$"):
        recipe(image_size=side, channels=3, images=10, gpu=True)
    recipe(image_size=suitable, channels=3, images=10, gpu=True)


def test_at_the_papers_sizes_it_is_the_papers_setting(tmp_path: Path) -> None:
    for name, images in (("cifar10", 50_000), ("celebahq256", 30_000)):
        theirs = Config.load(REPOSITORY / "configs" / f"{name}.toml")
        ours = configured(tmp_path, side=theirs.model.image_size, images=images, gpu=True)
        assert ours.model == theirs.model
        assert ours.optimizer == theirs.optimizer
        assert ours.train == theirs.train
        assert ours.diffusion.schedule == theirs.diffusion.schedule


def test_more_images_are_given_a_wider_network_and_a_longer_run(tmp_path: Path) -> None:
    few, many, most = (configured(tmp_path, side=64, images=n, gpu=True) for n in (300, 20_000, 3_000_000))
    assert few.model.base_channels < many.model.base_channels == most.model.base_channels == 128
    assert few.model.dropout > many.model.dropout > most.model.dropout == 0
    assert few.train.duration.count < many.train.duration.count < most.train.duration.count == 800_000


def ask(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ddpm-init", *arguments])
    return init.main()


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images, 40 x 50 and one that is broken, below the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("my photos")
    (folder / "holiday").mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (40, 50), (number, 0, 0)).save(folder / "holiday" / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_plain_images_are_told_how_to_become_data(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(str(photos), monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.endswith("prepare them: ddpm-prepare 'my photos' 'data/my photos' --size 32\n")
    assert told.count("\n") == 1
    assert data_prep(["my photos", "data/my photos", "--size", "32", "--max-reject-fraction", "1"]) == 0
    capsys.readouterr()
    assert ask("data/my photos", "--for", "gpu", monkeypatch=monkeypatch) == 0
    assert "ddpm-train --config 'my photos.toml'\n" in capsys.readouterr().out
    config = Config.load(Path("my photos.toml"))
    assert (config.run_dir, config.data.path, config.model.image_size) == ("runs/my photos", "data/my photos", 32)
    assert ask("data/my photos", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == "error: my photos.toml: is there already; give another name with --out\n"


@pytest.mark.parametrize("side", [10, 31, 64, 200, 1000])
def test_the_size_is_one_that_images_have(side: int, tmp_path: Path) -> None:
    for number in range(4):
        Image.new("L", (side, side + number)).save(tmp_path / f"{number}.png")
    assert suitable_size(tmp_path) == {10: 16, 31: 16, 64: 64, 200: 128, 1000: 256}[side]


def test_what_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(str(tmp_path / "nothing"), monkeypatch=monkeypatch) == 2
    assert "nothing: no such folder; prepare images with: ddpm-prepare IMAGES" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")
    assert ask(str(tmp_path), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_papers_configurations_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--list", monkeypatch=monkeypatch) == 0
    told = capsys.readouterr().out
    assert "cifar10                CIFAR-10, unconditional, L_simple: FID 3.17" in told
    assert len(told.splitlines()) == len(list((REPOSITORY / "configs").glob("*.toml")))


@pytest.mark.parametrize("name", ['line\nrun_dir = "elsewhere"', "delete\x7f", "quote\"s'", "größe #1"])
def test_a_folder_may_have_any_name(
    name: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_prep([str(photos), f"data/{name}", "--size", "32", "--max-reject-fraction", "1"]) == 0
    assert ask(f"data/{name}", "--for", "gpu", "--out", "out.toml", monkeypatch=monkeypatch) == 0
    config = Config.load(Path("out.toml"))
    assert (config.run_dir, config.data.path) == (f"runs/{name}", f"data/{name}")
    assert "out.toml: for 8 images" in capsys.readouterr().out


def test_a_name_that_toml_cannot_hold_leaves_no_file(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_prep([str(photos), "data/x", "--size", "32", "--max-reject-fraction", "1"]) == 0
    Path("data/x").rename("data/bad\udcff")
    capsys.readouterr()
    assert ask("data/bad\udcff", "--for", "gpu", "--out", "out.toml", monkeypatch=monkeypatch) == 2
    assert "out.toml: cannot be written" in capsys.readouterr().err
    assert not Path("out.toml").exists()


@pytest.mark.parametrize("name", ["x" * 300, "photos/.staging"])
def test_folders_that_cannot_be_read_or_are_unfinished_are_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = name.partition("/")[0]
    if data != name:
        Path(name).mkdir(parents=True)
    assert ask(data, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert ("unfinished; run data_prep again" if data != name else "cannot be read") in told
