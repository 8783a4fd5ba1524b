"""Damaged samples under `data.on_bad_sample = "skip"`: each is reported once, and too many end the run."""

from collections.abc import Callable

from trainer.errors import DataError


class BadSamples:
    """Counts the damaged samples that this process skipped since it started; `report` is called once for each."""

    def __init__(self, limit: int, report: Callable[[str], None]) -> None:
        self.limit = limit
        self.report = report
        self._seen: set[str] = set()

    def note(self, faults: list[str]) -> None:
        """Record messages that name samples; raises DataError where their number exceeds `limit`."""
        for fault in faults:
            if fault in self._seen:
                continue
            self._seen.add(fault)
            self.report(fault)
            if len(self._seen) > self.limit:
                raise DataError(f"{fault}; damaged samples exceed data.max_bad_samples = {self.limit}")
