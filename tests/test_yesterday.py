"""Runs and data that an earlier version wrote are still good: they resume, and are sampled, measured and exported."""

import json
from pathlib import Path

import pytest
import torch

from data_prep.cli import main as data_prep
from tests.harness import launch, logged
from tests.yesterday import FOLDER, copy_run, digest, go_on, norms, rounding

EXPECTED = json.loads((FOLDER / "expected.json").read_text())
TAR = "shard-000000.tar"
SLOW = pytest.mark.slow
CASES = [
    pytest.param(name, strategy, processes, marks=() if (name, strategy, processes) in quick else SLOW)
    for quick in [{("rich", "ddp", 1), ("plain", "zero2", 2)}]
    for name in ("plain", "rich")
    for strategy in ("ddp", "zero2")
    for processes in (1, 2)
]


@pytest.mark.parametrize(("name", "strategy", "processes"), CASES)
def test_an_earlier_run_goes_on_as_the_earlier_version_did(
    name: str, strategy: str, processes: int, tmp_path: Path
) -> None:
    """The same losses, weights, moments and averages after ten more steps; where torch rounds as it did when the
    fixtures were written, to the last bit.
    """
    expected = EXPECTED[f"{name} {strategy} {processes}"]
    run = go_on(name, tmp_path, processes=processes, strategy=strategy)
    losses = {step: loss for step, loss in logged(run).items() if step > 10}
    assert losses == pytest.approx({int(step): loss for step, loss in expected["losses"].items()}, rel=1e-4)
    assert norms(run, 20) == pytest.approx(expected["norms"], rel=1e-4)
    if torch.__version__.partition("+")[0] == EXPECTED["torch"] and rounding() == EXPECTED["rounding"]:
        assert digest(run, 20) == expected["sha256"]


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_an_earlier_run_is_sampled_measured_and_exported(name: str, tmp_path: Path) -> None:
    run, _ = copy_run(name, tmp_path)
    config = run / "config.toml"
    config.write_text(config.read_text().replace('path = "data"', f'path = "{FOLDER / "data"}"'))
    launch(1, "--run", str(run), "--n", "2", script="sample")
    launch(1, "bpd", "--run", str(run), "--images", "2", script="evaluate")
    launch(1, "export", "--run", str(run), "--out", str(tmp_path / "exported"), script="convert")
    assert list((run / "samples").rglob("*.png"))
    assert list((run / "evaluation").rglob("*.json"))
    assert list((tmp_path / "exported").rglob("*.safetensors"))


def test_earlier_shards_verify() -> None:
    assert data_prep(["verify", str(FOLDER / "data"), "--decode", "all"]) == 0


def test_images_alone_are_written_to_the_byte_as_before(dataset: Path) -> None:
    """Where the codecs are those that wrote the fixture."""
    first = slice(512, 512 + 100)
    if (dataset / TAR).read_bytes()[first] != (FOLDER / "data" / TAR).read_bytes()[first]:
        pytest.skip("another version of libwebp encodes other bytes")
    for path in (FOLDER / "data").iterdir():
        assert (dataset / path.name).read_bytes() == path.read_bytes(), path.name
