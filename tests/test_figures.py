"""Figures: defaults that go together, and files that say what made them and never replace another's."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.networks import make_run
from trainer import evaluate


@pytest.fixture
def figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    run, _ = make_run(tmp_path)
    seen: set[Path] = set()
    told: list[str] = []

    def call(command: str, *arguments: object, expect: int = 0) -> Any:
        """The JSON of the one new figure, and its path as "path"; or the error."""
        monkeypatch.setattr(sys, "argv", ["evaluate", command, "--run", str(run), *map(str, arguments)])
        assert evaluate.main() == expect
        printed = capsys.readouterr()
        if expect:
            return printed.err
        told.append(printed.err)
        (path,) = set((run / "evaluation").glob("*.png")) - seen
        seen.add(path)
        return json.loads(path.with_suffix(".json").read_text()) | {"path": path, "told": told[-1]}

    return call


def test_defaults_go_together_with_any_respacing(figure: Any) -> None:
    assert figure("shared-latents", "--respacing", "8", "--rows", "1", "--variants", "1")["splits"] == [8, 6, 4, 2]
    assert figure("shared-latents", "--respacing", "2", "--rows", "1", "--variants", "1")["splits"] == [2, 1]
    assert figure("progressive", "--respacing", "3", "--rows", "1")["every"] == 1


def test_a_figure_says_what_made_it(figure: Any, tmp_path: Path) -> None:
    for name in ("one", "other"):
        Image.new("RGB", (8, 8), "red" if name == "one" else "blue").save(tmp_path / f"{name}.png")
    files = [str(tmp_path / "one.png"), str(tmp_path / "other.png")]
    notes = figure("interpolate", "--files", *files, "--respacing", "4", "--variance", "large", "--seed", "7")
    assert notes["files"] == files
    assert (notes["respacing"], notes["steps"], notes["variance"], notes["seed"]) == ("4", 4, "large", 7)
    assert notes["timesteps"] == [2]
    name = notes["path"].name
    assert all(part in name for part in ("interpolation-t-2-", "-ema-4-large-one-other-seed-7-"))


def test_no_figure_replaces_another(figure: Any, tmp_path: Path) -> None:
    for folder, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        for name in ("one.png", "other.png"):
            Image.new("RGB", (8, 8), colour).save(tmp_path / folder / name)
    for folder in ("a", "b"):  # files of the same names
        files = [tmp_path / folder / name for name in ("one.png", "other.png")]
        figure("interpolate", "--respacing", "2", "--files", *files)
    for options in ([], ["--rows", "2"], ["--every", "2"], ["--respacing", "3"], ["--variance", "large"]):
        figure("progressive", "--respacing", "2", "--rows", "1", *options)


def test_an_out_that_something_else_lies_at_is_refused(figure: Any, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"somebody's")
    said = figure("progressive", "--rows", "1", "--out", photo, expect=2)
    assert said.startswith(f"error: --out {photo}: is there already, and another request made it")
    assert photo.read_bytes() == b"somebody's"


@pytest.mark.parametrize("name", ["x" * 250, "caf\udce9", "new\nline"])
def test_names_of_files_of_any_kind_make_a_name(figure: Any, tmp_path: Path, name: str) -> None:
    for number in (1, 2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}{number}"[:251], format="png")
    files = sorted(tmp_path.glob(f"{name[:3]}*"))
    notes = figure("reconstruct", "--respacing", "2", "--files", *files)
    assert notes["files"] == list(map(str, files))
    assert notes["path"].name.isprintable()


def test_a_respacing_that_gives_fewer_steps_says_so(figure: Any) -> None:
    notes = figure("progressive", "--rows", "1", "--respacing", "quadratic6")
    assert notes["steps"] == 5
    assert "--respacing quadratic6: 5 steps, for 1 of 6 fall on a timestep that is visited already" in notes["told"]
