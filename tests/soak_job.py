"""A job of the soak: a launcher, its ranks and their loaders, what they train on noted, and ways to end it.

Run as a script, it is `trainer/train.py` under a real launcher, with the notes and the fault that the environment asks
for.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import multiprocessing

import psutil
import torch

from tests.faults import Fault
from tests.harness import REPOSITORY, environment, free_port, run_rank, server
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.engine.step import train_step as step

TRAINED = "SOAK_TRAINED"  # environment variables for a real launcher's ranks
FAULT = "SOAK_FAULT"
_PATIENCE = 10.0  # seconds that a launcher leaves its ranks after SIGTERM
_GONE = 180.0  # seconds after which everything of an ended job has to be gone


class BrokenPromiseError(Exception):
    """The product did not keep a promise; the message says which."""


@dataclass(frozen=True)
class Drawn:
    """What one image was trained with: the pixels after the flip and the noise as CRC-32, and the timestep."""

    sample: int
    pixels: int
    t: int
    noise: int


@dataclass(frozen=True)
class Notes:
    """Takes the place of a `Fault` in `run_rank`: notes what every rank trains on, and lays the trap of one rank."""

    path: Path
    fault: Fault | None = None

    @property
    def rank(self) -> int:
        """This process's, whichever it is."""
        return int(os.environ.get("RANK", "0"))

    def inject(self) -> None:
        """Note every micro-batch as one line: [[position, sample, pixels, t, noise], ...]."""
        inputs: Callable[..., Any] = step.device_batch
        noise = GaussianDiffusion.q_sample
        known: dict[str, torch.Tensor] = {}

        def device_batch(batch: dict[str, torch.Tensor], *args: Any) -> Any:
            known.update(batch)
            return inputs(batch, *args)

        def q_sample(diffusion: GaussianDiffusion, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> Any:
            pixels, noises = ([zlib.crc32(one.contiguous().numpy()) for one in images] for images in (x0, eps))
            lists = known["position"].tolist(), known["id"].tolist(), pixels, t.tolist(), noises
            with self.path.open("a") as out:  # a short line: written whole, whoever else writes
                out.write(json.dumps(list(zip(*lists))) + "\n")
            return noise(diffusion, x0, t, eps)

        step.device_batch = device_batch
        GaussianDiffusion.q_sample = q_sample  # type: ignore[method-assign]
        if self.fault is not None and self.fault.rank == self.rank:
            self.fault.inject()


def read_notes(path: Path) -> list[tuple[int, Drawn]]:
    """Position and draw of every image that a job trained on, in the order of the notes."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(position, Drawn(*rest)) for line in lines for position, *rest in json.loads(line)]


class Job:
    """A training command in `processes` processes under a launcher: one of our own, or `accelerate launch`."""

    def __init__(
        self, processes: int, arguments: Sequence[str], *, folder: Path, fault: Fault | None, accelerate: bool
    ) -> None:
        folder.mkdir(parents=True)
        self.notes, self.log, self._code = folder / "trained.jsonl", folder / "output.txt", folder / "exit"
        self.log.touch()
        self.started, self.began = time.monotonic(), time.time()
        notes = Notes(self.notes, fault)
        self.launcher = (_start_accelerate if accelerate else _start_launcher)(processes, arguments, notes, self.log)
        self._known: set[psutil.Process] = set()
        self.look()

    def look(self) -> list[psutil.Process]:
        """Remember what runs below the launcher now; returns it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            below = self.launcher.children(recursive=True)
            self._known |= {process for process in below if "resource_tracker" not in _command(process)}
            return below
        return []

    def ranks(self) -> list[psutil.Process]:
        """The training processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [process for process in self.launcher.children() if "resource_tracker" not in _command(process)]
        return []

    def loaders(self) -> list[psutil.Process]:
        """Loader processes of all ranks."""
        return [p for p in self.look() if p not in self.ranks() and "resource_tracker" not in _command(p)]

    def everything(self) -> list[psutil.Process]:
        """Launcher, ranks, loaders, and what was once seen below the launcher."""
        self.look()
        for process in list(self._known):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._known |= set(process.children(recursive=True))
        return [self.launcher, *self._known]

    def exit_code(self) -> int | None:
        """The launcher's, once it is gone; None where it was killed."""
        if isinstance(self.launcher, psutil.Popen):
            return self.launcher.wait()
        return int(self._code.read_text().split()[0]) if self._code.exists() else None

    def was_killed(self) -> bool:
        """Whether a rank ended by SIGKILL, as the launcher saw it."""
        if isinstance(self.launcher, psutil.Popen):
            return "SIGKILL" in self.log.read_text()
        return self._code.exists() and str(-signal.SIGKILL) in self._code.read_text().split()[1:]

    def runs(self) -> bool:
        """Whether the launcher still does."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.launcher.status() != psutil.STATUS_ZOMBIE
        return False

    def micro_batches(self) -> int:
        """How many were trained on until now."""
        return self.notes.read_bytes().count(b"\n") if self.notes.exists() else 0

    def wait_until(self, happened: Callable[[], bool], *, seconds: float = 600) -> bool:
        """Returns False where the launcher ends before it happens. Raises BrokenPromiseError where neither does."""
        deadline = time.monotonic() + seconds
        while not happened():
            if not self.runs():
                return False
            if time.monotonic() > deadline:
                raise BrokenPromiseError(f"neither ended nor went on for {seconds:.0f} s; see {self.log}")
            time.sleep(0.01)
        return True

    def wait_until_gone(self) -> None:
        """Wait for every process of the job. Raises BrokenPromiseError where one is left."""
        _, alive = psutil.wait_procs(self.everything(), timeout=_GONE)
        left = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        if left:
            raise BrokenPromiseError(f"processes left alive {_GONE:.0f} s after the end: {left}; see {self.log}")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _start_launcher(processes: int, arguments: Sequence[str], notes: Notes, log: Path) -> psutil.Process:
    launcher = server().Process(target=_launch, args=(processes, free_port(), tuple(arguments), notes, str(log)))
    launcher.start()
    return psutil.Process(launcher.pid)


def _launch(processes: int, port: int, arguments: tuple[str, ...], notes: Notes, log: str) -> None:
    """As torchrun does it: SIGTERM is handed on; when a rank fails, the others get SIGTERM and then SIGKILL."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_be_rank, args=(rank, processes, port, arguments, notes, None, log))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()

    def hand_on(*_: object) -> None:
        for rank in ranks:
            if rank.is_alive():
                rank.terminate()

    signal.signal(signal.SIGTERM, hand_on)
    deadline = float("inf")
    while any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks) and deadline == float("inf"):
            deadline = time.monotonic() + _PATIENCE
            hand_on()
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(0.01)
    code = 1 if any(rank.exitcode for rank in ranks) else 0
    Path(log).with_name("exit").write_text(" ".join(str(each) for each in [code, *(rank.exitcode for rank in ranks)]))
    sys.exit(code)


def _be_rank(rank: int, processes: int, port: int, arguments: tuple[str, ...], notes: Notes, log: str) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in names.items()})  # also where there is one rank
    _take_one_core(rank)
    run_rank(rank, processes, port, "train", arguments, notes, None, log)  # type: ignore[arg-type]  # stands for a fault


def _take_one_core(rank: int) -> None:
    """Threads of a tiny network only wait for each other; and by another number of them sums are rounded otherwise."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def _start_accelerate(processes: int, arguments: Sequence[str], notes: Notes, log: Path) -> psutil.Process:
    several = ["--multi_gpu"] if processes > 1 else []
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *several]
    quiet = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    port = ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    fault = {FAULT: json.dumps(asdict(notes.fault))} if notes.fault is not None else {}
    with log.open("a") as out:
        return psutil.Popen(
            [*launcher, *port, *quiet, str(Path(__file__).relative_to(REPOSITORY)), *arguments],
            cwd=REPOSITORY,
            env=environment(**{TRAINED: str(notes.path)}, **fault),
            stdout=out,
            stderr=subprocess.STDOUT,
        )


if __name__ == "__main__":
    from trainer.train import main

    _take_one_core(int(os.environ.get("LOCAL_RANK", "0")))
    asked = os.environ.get(FAULT)
    Notes(Path(os.environ[TRAINED]), Fault(**json.loads(asked)) if asked is not None else None).inject()
    sys.exit(main())
