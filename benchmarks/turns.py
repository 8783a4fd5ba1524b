"""Contenders measured in turns, each in a process of its own.

One process would hand its memory and its caches from one contender to the next, so that a rate depended on what ran
before; and on a machine with other work, contenders that run one after the other meet different machines. So each has
a process that waits for its turn, and what is compared are the turns of one round: their ratio's median is reported.
"""

import gc
import multiprocessing
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from trainer.signals import on_parents_death

Run = Callable[[], int]  # does its work once; returns the number of images
Clock = Literal["cpu", "wall"]  # CPU time hardly feels other work on the machine; a GPU's work only the wall clock sees


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One run: images, and the seconds that it took of CPU time (its own and its children's) and by the clock."""

    images: int
    cpu: float
    wall: float


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A function that can be imported, and what it is called with in the contender's process to give its `Run`."""

    make: Callable[..., Run]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Medians over all rounds. `ratio` is of time an image by the clock that was asked for, of the reference to this
    one's in the same round.
    """

    name: str
    per_cpu_second: float
    per_second: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float


def compare(contenders: Mapping[str, Contender], *, reference: str, rounds: int, clock: Clock = "cpu") -> list[Result]:
    """Run each once for the caches and then `rounds` times."""
    turns = take_turns(contenders, rounds=rounds)
    return [result(name, turns[name], turns[reference], clock=clock) for name in contenders]


def take_turns(contenders: Mapping[str, Contender], *, rounds: int) -> dict[str, list[Turn]]:
    """Every contender's turns, the first of which, for the caches, is left out.

    RuntimeError names a contender that ended before its time; what it died of is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    try:
        for name, contender in contenders.items():
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=_serve, args=(contender, theirs))
            process.start()
            processes.append(process)
            theirs.close()
        for round_ in range(rounds + 1):
            for name, pipe in pipes.items():
                turn = _next_turn(name, pipe)
                if round_ > 0:
                    turns[name].append(turn)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()
    return turns


def result(name: str, turns: list[Turn], reference: list[Turn], *, clock: Clock) -> Result:
    """A contender beside the reference, round by round."""

    def seconds(turn: Turn) -> float:
        return turn.cpu if clock == "cpu" else turn.wall

    ratios = [
        (seconds(other) / other.images) / (seconds(turn) / turn.images)
        for turn, other in zip(turns, reference, strict=True)
    ]
    return Result(
        name=name,
        per_cpu_second=statistics.median(turn.images / turn.cpu for turn in turns),
        per_second=statistics.median(turn.images / turn.wall for turn in turns),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
    )


def _next_turn(name: str, pipe: Connection) -> Turn:
    try:
        pipe.send("run")
        turn: Turn = pipe.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError(f"{name}: ended before its turn was over") from error
    return turn


def load() -> str:
    """How busy the machine is besides, for whoever reads the figures."""
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def _serve(contender: Contender, pipe: Connection) -> None:
    on_parents_death(signal.SIGKILL)  # or a benchmark that is killed would leave it in the middle of its turn
    run = contender.make(*contender.arguments)
    gc.collect()
    gc.freeze()  # or every turn would end with a look at all that was imported
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        started, cpu = time.perf_counter(), _cpu_seconds()
        images = run()
        gc.collect()  # loader processes are the children's CPU time only once they have ended
        pipe.send(Turn(images=images, cpu=_cpu_seconds() - cpu, wall=time.perf_counter() - started))


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
