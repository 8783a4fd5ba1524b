"""Damaged samples under `data.on_bad_sample = "skip"`: each told of once, and too many end the run."""

from collections.abc import Callable

from trainer.errors import DataError


class BadSamples:
    """Counts what this process passed over since it started; `report` is called once for each damaged sample."""

    def __init__(self, limit: int, report: Callable[[str], None]) -> None:
        self.limit = limit
        self.report = report
        self._seen: set[str] = set()

    def note(self, faults: list[str]) -> None:
        """Messages that name samples; raises DataError where they become more than `limit`."""
        for fault in faults:
            if fault in self._seen:
                continue
            self._seen.add(fault)
            self.report(fault)
            if len(self._seen) > self.limit:
                raise DataError(f"{fault}; damaged samples exceed data.max_bad_samples = {self.limit}")
