"""Between two log lines the host reads of a step its verdict, once, and nothing else: every other read would wait."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import launch, overrides, write_config
from tests.test_train_step import BATCH, make_step, micro_batches
from trainer.engine.loop import TrainingLoop
from trainer.engine.monitoring.run_telemetry import Telemetry
from trainer.engine.step.step_report import PendingVerdict

_READS = ("tolist", "cpu", "numpy", "__array__")  # of torch.Tensor, that go by no operator on a CPU


class ReadsByOperators(TorchDispatchMode):
    """Hears of item(), bool(), int(), float() and of operators that read: all go by _local_scalar_dense."""

    def __init__(self, heard: Callable[[str], None]) -> None:
        super().__init__()
        self.heard = heard

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.heard(str(func))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class CountReads:
    """Writes what the host read in each step of a run to `path`; `extra` reads once more a step, for comparison."""

    path: str
    extra: str | None = None
    rank: int = 0

    def inject(self) -> None:
        steps: list[list[str]] = [[]]
        run, queued, read = TrainingLoop.run, Telemetry.queued, PendingVerdict.read

        loading = False  # what the stream reads has never been on a device

        def heard(what: str) -> None:
            if not loading:
                steps[-1].append(what)

        def loaded(stream: Iterator[Any]) -> Iterator[Any]:
            nonlocal loading
            while True:
                loading = True
                batch = next(stream, None)
                loading = False
                if batch is None:
                    return
                yield batch

        def run_watched(loop: TrainingLoop, stream: Iterator[Any]) -> bool:
            for name in _READS:
                setattr(torch.Tensor, name, _heard_of(name, getattr(torch.Tensor, name), heard))
            with ReadsByOperators(heard):
                finished = run(loop, loaded(stream))
            Path(self.path).write_text(json.dumps(steps))
            return finished

        def queued_and_counted(telemetry: Telemetry) -> None:
            if self.extra is not None:
                getattr(torch.zeros(()), self.extra)()
            queued(telemetry)
            steps.append([])

        def read_verdict(pending: PendingVerdict) -> Any:
            heard("verdict")
            return read(pending)

        TrainingLoop.run = run_watched  # type: ignore[method-assign]
        Telemetry.queued = queued_and_counted  # type: ignore[method-assign]
        PendingVerdict.read = read_verdict  # type: ignore[method-assign]


def _heard_of(name: str, original: Callable[..., Any], heard: Callable[[str], None]) -> Callable[..., Any]:
    def reading(*args: Any, **kwargs: Any) -> Any:
        heard(name)
        return original(*args, **kwargs)

    return reading


def reads_of_steps(folder: Path, dataset: Path, *, extra: str | None = None, **settings: Any) -> list[list[str]]:
    """Of steps 2 to 6 of a run that logs after its last step and saves nothing before."""
    quiet = {"log__every": "0 steps", "checkpoint__every": "0 steps", "model__dropout": 0.0}
    counter = CountReads(path=str(folder / "reads.json"), extra=extra)
    arguments = ("--config", str(write_config(folder, dataset)), *overrides(**{**quiet, **settings}))
    launch(1, *arguments, fault=counter)  # type: ignore[arg-type]
    steps = json.loads((folder / "reads.json").read_text())
    assert len(steps) == 7  # and what comes after the last
    assert len(steps[6]) > 2  # the log line reads, and so does the checkpoint
    return steps[1:6]


@pytest.mark.parametrize(
    "settings",
    [
        {"train__micro_batch": 2, "train__ema_sigma_rel": [0.1]},
        {
            "diffusion__timestep_sampling": "importance",
            "diffusion__loss": "hybrid",
            "diffusion__variance": "learned-range",
        },
    ],
)
def test_a_step_is_read_once(tmp_path: Path, dataset: Path, settings: dict[str, Any]) -> None:
    for step in reads_of_steps(tmp_path, dataset, **settings):
        assert step == ["verdict", "tolist"]


@pytest.mark.parametrize(
    "read",
    ["item", *(pytest.param(read, marks=pytest.mark.slow) for read in ("tolist", "__bool__", "cpu", "__float__"))],
)
def test_a_read_more_is_noticed(tmp_path: Path, dataset: Path, read: str) -> None:
    for step in reads_of_steps(tmp_path, dataset, extra=read):
        assert len(step) == 3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_never_waited_for_in_a_step(tmp_path: Path) -> None:
    step, _ = make_step(tmp_path, "train.micro_batch=2")
    step.update(step.backward(micro_batches(2))).read()  # the first one makes libraries' plans
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = step.update(step.backward(micro_batches(2)))
        step.state.main.averages.update(2)
        verdict = pending.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(each.finite for each in verdict.networks)
    assert sum(verdict.networks[0].figures.quartile_images) == BATCH
