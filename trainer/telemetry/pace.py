"""Straggler detection: each rank's own time per micro-step, compared between the ranks.

Ranks that exchange gradients all take as long as the slowest, so step times do not identify a straggler. Waiting for
data and the forward pass are a rank's own; they are timed, and compared once a log interval. On a device the forward
pass is timed by events that are read long after they have passed, without synchronisation. With sharded weights forward
passes wait for other ranks too, so only stragglers in data loading are identified.
"""

import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")
_KEPT = 64  # at most so many forward passes in an interval's mean
_SLOW = 1.25  # times the median of the ranks
_TELLING = 0.020  # seconds per micro-step; smaller differences count as noise
_IN_A_ROW = 3  # consecutive intervals before a straggler is reported


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Seconds per micro-step of each rank, in rank order, and the ranks' hosts."""

    data: Sequence[float]
    forward: Sequence[float]
    hosts: Sequence[str]

    def scalars(self) -> dict[str, float]:
        """Scalars for the log: the median of the ranks, and the slowest rank relative to it."""
        own = [data + forward for data, forward in zip(self.data, self.forward)]
        return {
            "ranks/data_seconds": median_low(self.data),
            "ranks/forward_seconds": median_low(self.forward),
            "ranks/slowest_over_median": max(own) / max(median_low(own), 1e-9),
        }

    def slow(self) -> tuple[int, str] | None:
        """The worst straggler's rank, and a line with its host and whether data or forward pass is slow; None if there
        is none.
        """
        found = []
        for what, seconds in (("forward pass", self.forward), ("data", self.data)):
            usual, slowest = median_low(seconds), max(seconds)
            if slowest > _SLOW * usual and slowest - usual > _TELLING:
                rank = list(seconds).index(slowest)
                line = f"rank {rank} on {self.hosts[rank]}: {what} {slowest:.3f} s, median of the ranks {usual:.3f} s"
                found.append((slowest - usual, rank, line))
        return max(found)[1:] if found else None


class Pace:
    """Times this rank's data loading and forward passes. Only `compare` is collective."""

    def __init__(self, device: torch.device) -> None:
        self.waited = 0.0  # seconds spent waiting for data
        self._device = device
        self._data: deque[float] = deque(maxlen=_KEPT)
        self._forward: deque[tuple[Any, Any]] = deque(maxlen=_KEPT)
        self._began: Any = None
        self._hosts: list[str] = []
        self._on_the_way: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        self._slow_rank: int | None = None
        self._slow_for = 0  # consecutive intervals

    def watch(self, network: nn.Module) -> None:
        """Time the forward passes of this network as called by the training step."""
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end)

    def timed(self, stream: Iterator[T]) -> Iterator[T]:
        """The stream, with the time spent waiting for it measured."""
        while True:
            began = time.perf_counter()
            try:
                item = next(stream)
            except StopIteration:
                return
            self._data.append(time.perf_counter() - began)
            self.waited += self._data[-1]
            yield item

    def report(self) -> tuple[dict[str, float], str | None]:
        """Scalars of the interval before the last `compare`, and a line the first time that a straggler persists.

        Does not wait if called an interval after `compare`.
        """
        spread = self._collect()
        if spread is None:
            return {}, None
        rank, line = spread.slow() or (None, None)
        self._slow_for = self._slow_for + 1 if rank is not None and rank == self._slow_rank else 1
        self._slow_rank = rank
        return spread.scalars(), line if self._slow_for == _IN_A_ROW else None

    def compare(self) -> None:
        """Start the exchange of this interval's means between the ranks; the next `report` has the result.
        Collective.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1 or not self._forward:
            return
        if not self._hosts:
            hosts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(hosts, socket.gethostname())
            self._hosts = hosts
        passed = [self._seconds(*pair) for pair in self._forward if self._device.type != "cuda" or pair[1].query()]
        own = torch.tensor([_mean(self._data), _mean(passed)])
        self._data.clear()
        self._forward.clear()
        own = own.to(self._device, non_blocking=True)
        everyone = own.new_empty(dist.get_world_size(), 2)
        dist.all_gather(list(everyone), own)
        arrived = torch.cuda.Event() if everyone.is_cuda else None
        everyone = everyone.to("cpu", non_blocking=True)
        if arrived is not None:
            arrived.record()
        self._on_the_way = (everyone, arrived)

    def _collect(self) -> Spread | None:
        if self._on_the_way is None:
            return None
        (everyone, arrived), self._on_the_way = self._on_the_way, None
        if arrived is not None:
            arrived.synchronize()
        data, forward = everyone.T.tolist()
        return Spread(data=data, forward=forward, hosts=self._hosts)

    def _begin(self, *_: Any) -> None:
        self._began = self._now()

    def _end(self, *_: Any) -> None:
        self._forward.append((self._began, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self._device.type == "cuda" else ended - began


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
