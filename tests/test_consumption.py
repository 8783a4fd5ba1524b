"""Whole runs that are killed and go on with other numbers of processes train on each image exactly once an epoch."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults import Fault
from tests.harness import launch, overrides
from trainer.engine.step import train_step as step

KILL_RANK_1_IN_STEP_5 = Fault(action="kill", point="device_batch", call=5, rank=1)


class EveryRank:
    """Whatever rank is asked for."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


@dataclass(frozen=True)
class Recorded:
    """In the place of a `Fault`, on all ranks: notes which positions and ids are trained on, and may do a fault too."""

    journal: Path
    fault: Fault | None = None
    rank: Any = field(default_factory=EveryRank)

    def inject(self) -> None:
        original: Callable[..., Any] = step.device_batch

        def recording(batch: dict[str, Any], *args: Any) -> Any:
            pairs = list(zip(batch["position"].tolist(), batch["id"].tolist()))
            with self.journal.open("a") as out:  # a short line: written whole, whoever else writes
                out.write(json.dumps(pairs) + "\n")
            return original(batch, *args)

        step.device_batch = recording
        if self.fault is not None and self.fault.rank == int(os.environ.get("RANK", "0")):
            self.fault.inject()


def consumed(journal: Path) -> list[tuple[int, int]]:
    return [(position, sample) for line in journal.read_text().splitlines() for position, sample in json.loads(line)]


@pytest.mark.parametrize("order", ["global", pytest.param("lanes", marks=pytest.mark.slow)])
def test_two_one_two_processes_train_on_each_image_once_an_epoch(tmp_path: Path, config_path: Path, order: str) -> None:
    """21 images, 8 to a batch: three epochs that end inside batches. Killed in the fifth step, saved after the fourth.

    What the killed job consumed after its last checkpoint is consumed again, the same images at the same positions.
    """
    settings = overrides(data__order=order, data__lanes=4, data__window=1, checkpoint__background="false")
    jobs = [
        (2, "8 steps", KILL_RANK_1_IN_STEP_5),
        (1, "6 steps", None),
        (2, "8 steps", None),
    ]
    seen: list[list[tuple[int, int]]] = []
    for number, (processes, duration, fault) in enumerate(jobs):
        journal = tmp_path / f"job-{number}.jsonl"
        launch(
            processes,
            "--config",
            str(config_path),
            *settings,
            *overrides(train__duration=duration),
            fault=Recorded(journal, fault),
            expect=None if fault else 0,
        )
        seen.append(consumed(journal))
    killed, second, third = seen
    assert sorted(position for position, _ in second) == list(range(32, 48))
    assert sorted(position for position, _ in third) == list(range(48, 64))
    counted = [(position, sample) for position, sample in killed if position < 32] + second + third
    assert sorted(position for position, _ in counted) == list(range(64))
    again = dict(counted)
    assert all(again[position] == sample for position, sample in killed)
    for epoch in range(3):
        inside = Counter(sample for position, sample in counted if position // 21 == epoch)
        assert inside == dict.fromkeys(range(21), 1)
