"""Cyclic garbage is collected at steps that all ranks share, and at no other time."""

import gc
import weakref
from pathlib import Path

import pytest

from tests.harness import load_config
from trainer.engine import session
from trainer.engine.step import garbage_collection as garbage
from trainer.engine.step.garbage_collection import collect_after, manual_collection
from trainer.telemetry.profiling import RecordingRequest


class Knot:
    def __init__(self) -> None:
        self.me = self


def test_garbage_lies_until_the_step_that_collects_it() -> None:
    with manual_collection():
        knot = weakref.ref(Knot())
        kept = [[number] for number in range(100_000)]  # ordinarily collects hundreds of times
        assert kept
        collect_after(garbage._STEPS - 1)
        assert knot() is not None
        collect_after(garbage._STEPS)
        assert knot() is None
        assert gc.get_freeze_count() > 1000
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_run_collects_at_agreed_steps_and_leaves_nothing_behind(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collections: list[int] = []
    monkeypatch.setattr(garbage, "_STEPS", 2)
    monkeypatch.setattr(garbage.gc, "collect", lambda *_: collections.append(1))
    automatic: list[bool] = []
    run_loop = session.TrainingLoop.run

    def run(self: session.TrainingLoop, stream: object) -> bool:
        before, finished = len(collections), run_loop(self, stream)  # type: ignore[arg-type]
        automatic.append(gc.isenabled())
        assert len(collections) - before == 3  # steps 2, 4, 6
        return finished

    monkeypatch.setattr(session.TrainingLoop, "run", run)
    session.train(load_config(config_path, "data.workers=0"), resume="none", record=RecordingRequest())
    assert automatic == [False]
    assert gc.isenabled()
