"""Prefetching of shards, in the order in which a rank's plan needs them."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

from trainer.data.cache.node_cache import NodeCache
from trainer.data.datasets.dataset import Shard
from trainer.errors import DataError

_FARTHEST = 4096  # micro-steps ahead of training
_AGAIN = 1.0  # seconds between checks whether other processes released pins


@dataclass(eq=False)
class Prefetcher:
    """A thread that walks a plan ahead of training and pins the shards needed next in the node's cache.

    needs: the shards of a micro-step, in the order of need; micro_steps: those of the plan; in_hand: micro-steps ahead
    of training that loader processes already have, and download for themselves; budget: bytes that this process may pin
    at a time; the cache limits the pins of all processes. A shard that does not fit is downloaded by the reader when it
    is needed. Failed downloads are ignored, since the reader reports them.
    """

    cache: NodeCache
    shards: Sequence[Shard]
    _: KW_ONLY
    needs: Callable[[int], Sequence[int]]
    micro_steps: range
    in_hand: int
    budget: int

    def __post_init__(self) -> None:
        self._training = self.micro_steps.start  # the current micro-step of training
        self._last_need: dict[int, int] = {}  # of each pinned shard, as far as the plan was walked
        self._pins: dict[int, int] = {}  # descriptors
        self._closed = False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._walk, name="prefetch", daemon=True)

    def start(self) -> None:
        """Start; loader processes should be started before, since they inherit open descriptors."""
        self._thread.start()

    def advance(self, micro_step: int) -> None:
        """Set the current micro-step of training."""
        with self._moved:
            self._training = micro_step
            self._moved.notify()

    def close(self) -> None:
        """Stop and release all pins once the current download has ended; does not wait for that."""
        with self._moved:
            self._closed = True
            self._moved.notify()

    def _walk(self) -> None:
        try:
            for micro_step in self.micro_steps:
                for shard in self.needs(micro_step):
                    self._last_need[shard] = micro_step
                    if shard not in self._pins:
                        self._pin(shard, micro_step)
                with self._moved:
                    while not self._closed and micro_step >= self._training + _FARTHEST:
                        self._moved.wait()
                if self._closed:
                    return
            with self._moved:
                while not self._closed:
                    self._moved.wait()
        finally:
            for descriptor in self._pins.values():
                self.cache.unpin(descriptor)
            self._pins.clear()

    def _pin(self, shard: int, micro_step: int) -> None:
        """Wait for room and pin the shard; give up where there is none by the time it is needed."""
        wanted = self.shards[shard]
        while not self._closed and (now := self._training) + self.in_hand <= micro_step:
            self._unpin_used()
            if sum(self.shards[pinned].bytes for pinned in self._pins) + wanted.bytes <= self.budget:
                try:
                    descriptor = self.cache.pin(wanted)
                except DataError:
                    return  # the reader will report it
                if descriptor is not None:
                    self._pins[shard] = descriptor
                    return
            with self._moved:
                if not self._closed and self._training == now:
                    self._moved.wait(_AGAIN)

    def _unpin_used(self) -> None:
        for shard in [shard for shard in self._pins if self._last_need[shard] < self._training]:
            self.cache.unpin(self._pins.pop(shard))
