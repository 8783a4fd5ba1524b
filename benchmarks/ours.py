"""Our own step and our own loop, fed with images that are there already; each is called in a process of its own."""

import io
import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from benchmarks.data import write_dataset
from benchmarks.machine import synchronize
from benchmarks.turns import Run
from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.engine import session
from trainer.engine.build import build_state
from trainer.engine.step.train_step import TrainStep
from trainer.engine.strategies import DataParallel
from trainer.signals import StopRequest
from trainer.telemetry.profiling import RecordingRequest

Batch = dict[str, torch.Tensor]


def make_train_step(config: Config, *, ranks: int = 1) -> TrainStep:
    """The trainer's step over data parallelism, in this process, which may be one of several ranks. Collective."""
    strategy = DataParallel(config.train)
    state = build_state(config, strategy)
    step = TrainStep(
        config=config,
        layout=BatchLayout.plan(config.train.global_batch, ranks, config.train.micro_batch),
        state=state,
        stop=StopRequest(),
    )
    step.warm_up()
    return step


def batches(config: Config, size: int) -> Iterator[Batch]:
    """Always the same images, at positions that go on."""
    model = config.model
    images = torch.randint(0, 256, (size, *model.image_shape), dtype=torch.uint8)
    for first in itertools.count(0, size):
        yield {"image": images, "position": torch.arange(first, first + size)}


def take(step: TrainStep, stream: Iterator[Batch]) -> None:
    """One step, guard and EMA included."""
    step.update(step.backward(stream)).read()
    step.state.main.updated()


def train_step(config: Config, *, steps: int, threads: int) -> Run:
    """`steps` steps: noise, forward, backward, clipping, Adam, EMA and the step's report to the host."""
    step = make_train_step(config)
    stream = batches(config, step.layout.micro_batch)
    torch.set_num_threads(threads)

    def run() -> int:
        for _ in range(steps):
            take(step, stream)
        synchronize(step.state.strategy.device)
        return steps * config.train.global_batch

    return run


class Gate:
    """Lets a training loop, which runs in a thread of its own, have `steps` batches in a turn.

    The loop asks for a batch more when it has taken the turn's last step; so it settles that step in the next turn,
    as it settled the last turn's in this one.
    """

    def __init__(self, config: Config, *, steps: int, threads: int) -> None:
        layout = BatchLayout.plan(config.train.global_batch, 1, config.train.micro_batch)
        self._batches = batches(config, layout.micro_batch)
        self._turn = steps * layout.accumulation
        self._threads = threads
        self._open = threading.Semaphore(0)
        self._done = threading.Semaphore(0)

    def stream(self, *_: Any, **__: Any) -> Iterator[Batch]:
        """In place of the reader's; called as that is."""
        torch.set_num_threads(self._threads)
        while True:
            self._open.acquire()
            yield from itertools.islice(self._batches, self._turn)
            self._done.release()

    def take_turn(self, loop: threading.Thread) -> None:
        """Let the loop go on, and wait until it wants more. RuntimeError where it has ended, with its own words."""
        self._open.release()
        while not self._done.acquire(timeout=1):
            if not loop.is_alive():
                raise RuntimeError("the training loop has ended")


def training_loop(config: Config, *, steps: int, threads: int) -> Run:
    """`steps` steps of the whole loop that `trainer/train.py` runs: verdict, heartbeat, pace, progress, log lines.

    Only the reader's batches are replaced. Checkpoints and sample grids, which have benchmarks of their own, are left
    out.
    """
    folder = Path(tempfile.mkdtemp(prefix="loop-"))
    config = _with_data(config, folder)
    gate = Gate(config, steps=steps, threads=threads)
    mock.patch.object(session, "micro_batches", gate.stream).start()
    mock.patch.object(StopRequest, "install").start()  # signals belong to the main thread
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # the table's place; open as long as the process
    # A daemon, for it waits at the gate when the process is to end.
    options = {"resume": "none", "record": RecordingRequest()}
    loop = threading.Thread(target=session.train, args=(config,), kwargs=options, daemon=True)
    loop.start()

    def run() -> int:
        gate.take_turn(loop)
        return steps * config.train.global_batch

    return run


def _with_data(config: Config, folder: Path) -> Config:
    """The configuration with a small data set to name, a folder, and no end."""
    model, shards = config.model, folder / "shards"
    mode = {1: "L", 3: "RGB"}[model.channels]
    file = io.BytesIO()
    Image.new(mode, (model.image_size, model.image_size)).save(file, "PNG")
    write_dataset(shards, [file.getvalue()] * 4, model.image_size, "png", mode)
    sections = config.model_dump()
    sections["run_dir"] = str(folder / "run")
    sections["data"] = {"path": str(shards), "flip": config.data.flip}
    sections["train"] |= {"duration": "1000000 steps", "hang_timeout": "0 seconds"}  # it waits for its turns
    sections["checkpoint"]["every"] = "0 steps"
    sections["log"] |= {"samples_every": "0 steps", "validate_every": "0 steps"}
    return type(config).model_validate(sections)
