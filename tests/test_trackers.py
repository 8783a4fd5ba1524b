"""Weights & Biases: told what the logs are told, one run there for all starts here, and never the end of a run."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness import REPOSITORY, environment, load_config, logged, overrides, write_config
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.telemetry.metrics import Metrics
from trainer.telemetry.trackers import Trackers, check_trackers


class Tracker:
    """Remembers what it is told; raises from the `fails_at`-th call on."""

    name = "told"

    def __init__(self, fails_at: int = 1000) -> None:
        self.calls: list[Any] = []
        self.fails_at = fails_at

    def log(self, values: dict[str, float], step: int) -> None:
        self._call((step, values))

    def log_images(self, values: dict[str, list[Any]], step: int) -> None:
        self._call((step, {name: [picture.shape for picture in pictures] for name, pictures in values.items()}))

    def finish(self) -> None:
        self._call("finish")

    def _call(self, call: Any) -> None:
        self.calls.append(call)
        if len(self.calls) >= self.fails_at:
            raise ConnectionError("the service is gone")


def log(folder: Path, *trackers: Tracker) -> list[str]:
    said: list[str] = []
    metrics = Metrics(folder, 0, Trackers(trackers, said.append))  # type: ignore[arg-type]
    metrics.scalars(1, {"train/loss": 1.0})
    metrics.scalars(2, {"train/loss": 0.5})
    metrics.picture(2, "samples", np.zeros((4, 5, 3), dtype=np.uint8))
    metrics.close()
    return said


EVERYTHING = [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5}), (2, {"samples": [(4, 5, 3)]}), "finish"]


def test_a_tracker_is_told_what_the_logs_are(tmp_path: Path) -> None:
    tracker = Tracker()
    assert log(tmp_path, tracker) == []
    assert tracker.calls == EVERYTHING


def test_one_that_fails_is_told_no_more_and_ends_nothing(tmp_path: Path) -> None:
    failing, other = Tracker(fails_at=2), Tracker()
    said = log(tmp_path, failing, other)
    assert said == ["log.trackers: told has failed and is told no more: the service is gone"]
    assert len(failing.calls) == 2
    assert other.calls == EVERYTHING


def config_with_wandb(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path, Path("nowhere")), 'log.trackers=["wandb"]')


def test_what_is_not_installed_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with_wandb(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'log.trackers = \["wandb"\]: is not installed; pip install "ddpm-trainer\['):
        check_trackers(config)


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.trackers"):
        load_config(write_config(tmp_path, Path("nowhere")), 'log.trackers=["wandbb"]')


def train(config: Path, *settings: str, expect: int = 0, **variables: str) -> str:
    command = [
        sys.executable,
        "trainer/train.py",
        "--config",
        str(config),
        "--set",
        'log.trackers=["wandb"]',
        *settings,
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(**variables), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stderr


@pytest.mark.slow
def test_every_start_goes_on_with_the_same_run_there(tmp_path: Path, dataset: Path) -> None:
    pytest.importorskip("wandb")
    config, run = write_config(tmp_path, dataset), tmp_path / "run"
    train(config, *overrides(train__duration="2 steps"), WANDB_MODE="offline")
    train(config, *overrides(train__duration="4 steps", log__samples_every="4 steps"), WANDB_MODE="offline")
    identity = (run / "wandb" / "id").read_text().strip()
    records = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in records] == [f"run-{identity}.wandb"] * 2
    for path in records:
        content = path.read_bytes()
        assert b"train/loss" in content
        assert b"channel_multipliers" in content
    assert list((run / "wandb").glob("offline-run-*/files/media/images/samples_4_*.png"))
    assert sorted(logged(run)) == [1, 2, 3, 4]


@pytest.mark.slow
def test_who_is_not_logged_in_is_told_so_in_one_line(tmp_path: Path, dataset: Path) -> None:
    pytest.importorskip("wandb")
    unknown = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    said = train(write_config(tmp_path, dataset), expect=2, **unknown)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert line.startswith('error: log.trackers = ["wandb"]: does not start (')
    assert line.endswith('log in by "wandb login", or set WANDB_MODE=offline')
