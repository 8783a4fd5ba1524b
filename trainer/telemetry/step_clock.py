"""Step times, for percentiles: slow steps are hidden by a mean."""

import time
from collections import deque
from typing import Any

import numpy as np
import torch

_KEPT = 4096  # step times kept of an interval, the last ones


class StepClock:
    """Seconds from the end of a step to the end of the next on this rank, including waiting for data.

    On a device the end of a step is an event, read when the interval is logged, long after it has passed: no
    synchronisation. Ranks that exchange gradients have equal step times, so those of one rank represent all.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._last: Any = None
        self._steps: deque[tuple[Any, Any]] = deque(maxlen=_KEPT)

    def start(self) -> None:
        """Start timing now; excludes the time between the last step's end and now (a pause)."""
        self._last = self._now()

    def step_ended(self) -> None:
        """Call when all work of a step has been done or queued."""
        now = self._now()
        if self._last is not None:
            self._steps.append((self._last, now))
        self._last = now

    def take(self) -> dict[str, float]:
        """Scalars of the steps that the device has completed since the last call; empty where there are none."""
        seconds = []
        while self._steps and self._has_passed(self._steps[0][1]):
            began, ended = self._steps.popleft()
            seconds.append(began.elapsed_time(ended) / 1000 if self._on_device else ended - began)
        if not seconds:
            return {}
        # By nearest rank: the smallest that at least such a share of them does not exceed.
        p50, p95, longest = np.quantile(seconds, (0.5, 0.95, 1.0), method="inverted_cdf").tolist()
        return {"time/step_seconds_p50": p50, "time/step_seconds_p95": p95, "time/step_seconds_max": longest}

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _has_passed(self, moment: Any) -> bool:
        return bool(moment.query()) if self._on_device else True
