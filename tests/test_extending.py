"""The code of docs/extending.md: a family, a backbone, a sampler and a source of another package, by every command."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main as data_prep
from tests.harness import (
    REPOSITORY,
    assert_same_state,
    largest_difference,
    launch,
    logged,
    overrides,
    tensors_of,
    write_config,
)

BLOCK = re.compile(r"```(?:python|toml)\n# (\S+)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's modules, as they lie when they are installed."""
    folder = tmp_path_factory.mktemp("package")
    files = dict(BLOCK.findall((REPOSITORY / "docs" / "extending.md").read_text()))
    declared = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]
    for name, content in files.items():
        (folder / name).write_text(content)
    about = folder / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [
        line for group, names in declared.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("squares") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package))
        assert data_prep(["embedded:squares", str(out), "--size", "8", "--workers", "1"]) == 0
    return out


def config(folder: Path, package: Path, data: Path, name: str) -> tuple[str, ...]:
    """A run of the page's family and backbone."""
    path = write_config(folder, data, name)
    text = path.read_text()
    start, end = text.index("[model]"), text.index("[optimizer]")
    mine = (package / "my_run.toml").read_text().replace("image_size = 8", "image_size = 8\nchannels = 1")
    path.write_text(text[:start] + mine + text[end:])
    return ("--config", str(path), *overrides(data__holdout="0.2", log__validate_every="2 steps"))


def test_the_family_and_the_backbone_are_short(package: Path) -> None:
    code = (package / "my_models.py").read_text().splitlines()
    assert len([line for line in code if line.strip()]) < 60


def test_they_train_and_resume_exactly_and_on_another_number_of_ranks(
    tmp_path: Path, package: Path, data: Path
) -> None:
    whole, stopped, moved = (config(tmp_path, package, data, name) for name in ("whole", "stopped", "moved"))
    launch(1, *whole, path=package)
    launch(1, *stopped, *overrides(train__duration="4 steps"), path=package)
    launch(1, *stopped, path=package)
    assert_same_state(tmp_path / "whole", tmp_path / "stopped", 6)
    launch(1, *moved, *overrides(train__duration="2 steps"), path=package)
    launch(2, *moved, *overrides(train__strategy="zero2"), path=package)
    assert largest_difference(*(tensors_of(tmp_path / name, 6) for name in ("whole", "moved"))) < 1e-5
    assert logged(tmp_path / "moved") == pytest.approx(logged(tmp_path / "whole"), rel=1e-5)
    assert logged(tmp_path / "whole", "validation/ema_loss").keys() == {2, 4, 6}
    assert not logged(tmp_path / "whole", "train/bound_bits_per_dim")  # the family has no bound


def test_they_are_drawn_from_by_the_sampler_of_the_package(tmp_path: Path, package: Path, data: Path) -> None:
    grids = overrides(log__samples_sampler="cooler", log__samples_every="6 steps")
    launch(1, *config(tmp_path, package, data, "run"), *grids, path=package)
    out = tmp_path / "drawn"
    drawn = ("--run", str(tmp_path / "run"), "--n", "4", "--seed", "3", "--batch", "4", "--out", str(out))
    launch(2, *drawn, "--sampler", "cooler", script="sample", path=package)
    in_training = next((tmp_path / "run" / "samples").glob("*.png"))
    assert np.array_equal(np.asarray(Image.open(out / "grid.png")), np.asarray(Image.open(in_training)))
    line = launch(1, *drawn, "--sampler", "colder", script="sample", path=package, expect=2)
    assert "--sampler colder: unknown" in line


def test_without_the_package_its_kinds_are_unknown(tmp_path: Path, package: Path, data: Path) -> None:
    out = launch(1, *config(tmp_path, package, data, "run"), expect=2)
    assert out.count("\n") == 1
    assert "model.kind = 'three-convolutions': unknown kind; known here: ddpm-unet, adm-unet" in out
