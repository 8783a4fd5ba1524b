"""Profiles of a range of steps: torch.profiler's trace, and the history of CUDA memory.

RUN/profiles/steps-10-15/rank-00000.10.pt.trace.json.gz   for Perfetto, chrome://tracing and TensorBoard's plugin
                         rank-00000.operators.txt         operators by total time
                         rank-00000.memory.pickle         for pytorch.org/memory_viz
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override

from trainer.errors import ConfigError

_REQUEST = re.compile(r"steps=(\d+)(?:\.\.(\d+))?(,ranks=all)?")
_OPERATORS = 40  # rows of the table
_MEMORY_EVENTS = 1_000_000  # allocations and frees, of which the last ones are kept


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """Steps `first` to `last` of a run, inclusive, counted from 1; on rank 0, or on all ranks."""

    first: int
    last: int
    all_ranks: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "steps=10..15", "steps=10" or "steps=10..15,ranks=all". Raises ConfigError for anything else."""
        match = _REQUEST.fullmatch(text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if match is None or not 1 <= first <= last:
            raise ConfigError(f"{text}: should be like steps=10..15, or steps=10..15,ranks=all; the first step is 1")
        return cls(first=first, last=last, all_ranks=match[3] is not None)


class Recorder(Protocol):
    """A profiler that is active during a range of steps."""

    def start(self) -> None:
        """Called before the first step of the range."""

    def begin_step(self, step: int) -> None:
        """Called before each step of the range."""

    def save(self, stem: Path) -> None:
        """Called after the last step: stop, and write files whose names begin with `stem`. Raises OSError."""


class TraceRecorder(Recorder):
    """Records activities of host and device over time, by torch.profiler."""

    def __init__(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities, record_shapes=True)
        self._order = f"self_{device.type}_time_total"
        self._step: record_function | None = None
        self._first = 0

    @override
    def start(self) -> None:
        self._profile.start()

    @override
    def begin_step(self, step: int) -> None:
        self._end_step()
        self._first = self._first or step
        self._step = record_function(f"ProfilerStep#{step}")  # by which TensorBoard's plugin recognises steps
        self._step.__enter__()

    @override
    def save(self, stem: Path) -> None:
        self._end_step()
        self._profile.stop()
        self._profile.export_chrome_trace(f"{stem}.{self._first}.pt.trace.json.gz")
        table = self._profile.key_averages().table(sort_by=self._order, row_limit=_OPERATORS, max_name_column_width=80)
        Path(f"{stem}.operators.txt").write_text(table)

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None


class MemoryRecorder(Recorder):
    """Records allocations of CUDA memory with their stacks. Raises ConfigError for a run without CUDA."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(
                f"--memory-snapshot: records CUDA's allocator, and this run computes on the {device.type.upper()}; "
                "leave it out, or take --profile"
            )

    @override
    def start(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)

    @override
    def begin_step(self, step: int) -> None:
        """Do nothing: the record has no steps."""

    @override
    def save(self, stem: Path) -> None:
        torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
        torch.cuda.memory._record_memory_history(enabled=None)


class Recording:
    """A recorder that is active during a range of steps, or the part of it that this process trains."""

    def __init__(
        self, recorder: Recorder, steps: StepRange, *, folder: Path, rank: int, say: Callable[[str], None]
    ) -> None:
        self._recorder = recorder
        self._steps = steps
        self._stem = folder / f"steps-{steps.first}-{steps.last}" / f"rank-{rank:05d}"
        self._mine = steps.all_ranks or rank == 0
        self._on = False
        self._say = say

    def before_step(self, step: int) -> None:
        """Start or stop before `step` (counted from 1) is trained."""
        if not self._mine:
            return
        if step > self._steps.last:
            self.end()
        elif step >= self._steps.first:
            if not self._on:
                self._recorder.start()
                self._on = True
            self._recorder.begin_step(step)

    def end(self) -> None:
        """Stop and write, if the recorder is active. A failure to write is reported, not raised."""
        if not self._on:
            return
        self._on = False
        try:
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            self._recorder.save(self._stem)
        except (OSError, RuntimeError) as fault:  # the profiler's C++ code raises RuntimeError on a full disk
            self._say(f"{self._stem}: not written: {fault}")
        else:
            self._say(f"steps {self._steps.first} to {self._steps.last} are recorded in {self._stem.parent}")


@dataclass(frozen=True, kw_only=True)
class RecordingRequest:
    """The command line's profiling options; None where an option is not given."""

    trace: StepRange | None = None
    memory: StepRange | None = None

    def open(self, device: torch.device, *, folder: Path, rank: int, say: Callable[[str], None]) -> list[Recording]:
        """The recordings requested, on this rank. Raises ConfigError where the device does not support one."""
        recorders: list[tuple[Recorder, StepRange]] = []
        if self.trace is not None:
            recorders.append((TraceRecorder(device), self.trace))
        if self.memory is not None:
            recorders.append((MemoryRecorder(device), self.memory))
        return [Recording(recorder, steps, folder=folder, rank=rank, say=say) for recorder, steps in recorders]
