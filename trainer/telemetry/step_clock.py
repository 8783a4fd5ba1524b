"""How long steps take, for percentiles: the slow ones are what a mean hides."""

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

_KEPT = 4096  # of an interval's steps, the last ones


class StepClock:
    """Seconds from one step's end to the next on this rank, its wait for data included.

    On a device an end is an event in its queue, read when the interval is logged, long after it has passed: nothing
    waits. Ranks that exchange gradients take a step equally long, so one rank's times are those of all.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._last: Any = None
        self._steps: deque[tuple[Any, Any]] = deque(maxlen=_KEPT)

    def start(self) -> None:
        """Count from now on; what was between the last end and now (a pause) is no step's time."""
        self._last = self._now()

    def step_ended(self) -> None:
        """To be called when all of a step has been done or queued."""
        now = self._now()
        if self._last is not None:
            self._steps.append((self._last, now))
        self._last = now

    def take(self) -> dict[str, float]:
        """Scalars of the steps since the last call that have passed on the device; none where none have."""
        seconds = []
        while self._steps and self._has_passed(self._steps[0][1]):
            began, ended = self._steps.popleft()
            seconds.append(began.elapsed_time(ended) / 1000 if self._on_device else ended - began)
        if not seconds:
            return {}
        seconds.sort()
        return {
            "time/step_seconds_p50": percentile(seconds, 0.50),
            "time/step_seconds_p95": percentile(seconds, 0.95),
            "time/step_seconds_max": seconds[-1],
        }

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _has_passed(self, moment: Any) -> bool:
        return bool(moment.query()) if self._on_device else True


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of ascending values that at least `share` (0 to 1] of them do not exceed: one that occurred."""
    return ordered[math.ceil(share * len(ordered)) - 1]
