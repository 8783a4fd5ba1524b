"""--profile and --memory-snapshot: these steps and no others, and the run is what it would have been."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import assert_same_state, launch, write_config
from trainer.errors import ConfigError
from trainer.telemetry.profiling import MemoryRecorder, Recording, StepRange


def trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as stream:
        found: list[dict[str, Any]] = json.load(stream)["traceEvents"]
    return found


@pytest.mark.slow
def test_the_steps_are_traced_on_all_ranks_and_train_the_same(tmp_path: Path, dataset: Path) -> None:
    plain, traced = write_config(tmp_path, dataset, "plain"), write_config(tmp_path, dataset, "traced")
    launch(2, "--config", str(plain))
    output = launch(2, "--config", str(traced), "--profile", "steps=3..4,ranks=all")
    folder = tmp_path / "traced" / "profiles" / "steps-3-4"
    assert f"steps 3 to 4 are recorded in {folder}" in output
    for rank in range(2):
        events = trace(folder / f"rank-0000{rank}.3.pt.trace.json.gz")
        names = {event["name"] for event in events if "name" in event}
        assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#3", "ProfilerStep#4"}
        assert {"aten::convolution", "aten::_fused_adam_"} <= names
        assert "aten::convolution" in (folder / f"rank-0000{rank}.operators.txt").read_text()
    assert_same_state(tmp_path / "plain", tmp_path / "traced", 6)
    assert not (tmp_path / "plain" / "profiles").exists()


def test_memory_is_recorded_on_cuda_alone(tmp_path: Path, dataset: Path) -> None:
    config = str(write_config(tmp_path, dataset))
    output = launch(1, "--config", config, "--memory-snapshot", "steps=2", expect=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert line.startswith("error: --memory-snapshot: records CUDA's allocator, and this run computes on the CPU")


def test_the_memorys_history_is_switched_on_written_and_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda enabled="all", **_: calls.append(f"record {enabled}")
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    recording = record(MemoryRecorder(torch.device("cuda")), tmp_path, "steps=2..3")
    for step in (1, 2, 3, 4):
        recording.before_step(step)
    assert calls == ["record all", "rank-00000.memory.pickle", "record None"]


class Told:
    """A recorder that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def start(self) -> None:
        self.calls.append("start")

    def begin_step(self, step: int) -> None:
        self.calls.append(step)

    def save(self, stem: Path) -> None:
        self.calls.append(stem.name)


def record(recorder: Any, folder: Path, steps: str, rank: int = 0) -> Recording:
    return Recording(recorder, StepRange.parse(steps), folder=folder, rank=rank, say=lambda _: None)


@pytest.mark.parametrize(
    ("steps", "first", "last", "rank", "expected"),
    [
        ("steps=3..4", 1, 6, 0, ["start", 3, 4, "rank-00000"]),
        ("steps=3", 1, 6, 0, ["start", 3, "rank-00000"]),
        ("steps=3..9", 4, 6, 0, ["start", 4, 5, 6, "rank-00000"]),  # resumed within, and the run ends within
        ("steps=3..4", 5, 6, 0, []),  # resumed behind
        ("steps=3..4", 1, 6, 1, []),  # not rank 0's
        ("steps=3..4,ranks=all", 1, 6, 1, ["start", 3, 4, "rank-00001"]),
    ],
)
def test_which_steps_are_recorded(
    tmp_path: Path, steps: str, first: int, last: int, rank: int, expected: list[object]
) -> None:
    recorder = Told()
    recording = record(recorder, tmp_path, steps, rank)
    for step in range(first, last + 1):
        recording.before_step(step)
    recording.end()
    recording.end()
    assert recorder.calls == expected


@pytest.mark.parametrize("text", ["10..15", "steps=5..4", "steps=0..4", "steps=a", "steps=1..2,ranks=some", ""])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"should be like steps=10\.\.15"):
        StepRange.parse(text)
