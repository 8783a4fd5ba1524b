"""Logs of a restarted run: no step twice, none backward, in JSON lines and in TensorBoard."""

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.harness import REPOSITORY, launch, overrides, write_config
from trainer.telemetry.metrics import Metrics, read_metrics

ON_GPUS = {"device/memory_allocated_bytes", "device/memory_reserved_bytes"}


def test_work_that_was_lost_and_done_again_is_logged_once(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 0)
    for step in range(1, 6):
        first.scalars(step, {"loss": 1.0})
    first.close()
    again = Metrics(tmp_path, 3)
    for step in range(4, 8):
        again.scalars(step, {"loss": 2.0})
    again.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(s, 1.0 + (s > 3)) for s in range(1, 8)]
    assert tensorboard_steps(tmp_path, "loss") == [1, 2, 3, 4, 5, 6, 7]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.scalars(1, {"loss": 1.0})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    Metrics(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_run_logs_what_the_readme_says(tmp_path: Path, dataset: Path) -> None:
    config = str(write_config(tmp_path, dataset))
    launch(1, "--config", config, *overrides(log__every="2 steps", train__duration="5 steps"))
    logs = tmp_path / "run" / "logs"
    records = read_metrics(logs)
    assert [record["step"] for record in records] == [2, 4, 5]
    told = documented_scalars("train/", "time/", "device/", "goodput/") - ON_GPUS - {"train/noise_scale"}
    quartiles = {f"train/loss_q{number}" for number in (1, 2, 3, 4)}
    for record in records:
        assert told - quartiles <= record.keys() <= told | {"step"}
    assert quartiles <= {name for record in records for name in record}
    # steps 1 to 5 had lr x min(step / warmup, 1) with step = 0..4 and warmup = 2: the first one moves nothing
    assert [record["train/learning_rate"] for record in records] == [5e-4, 1e-3, 1e-3]
    assert tensorboard_steps(logs, "train/loss") == [2, 4, 5]


def documented_scalars(*groups: str) -> set[str]:
    """The names in the tables of docs/telemetry.md."""
    names: set[str] = set()
    for line in (REPOSITORY / "docs" / "telemetry.md").read_text().splitlines():
        if line.startswith("| `"):
            names |= set(re.findall(r"`([a-z]+/[a-z0-9_]+)`", line.split("|")[1]))
    return {name for name in names if name.startswith(groups)}


def tensorboard_steps(folder: Path, name: str) -> list[int]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(name)]
