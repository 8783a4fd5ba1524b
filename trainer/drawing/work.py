"""Resumable work: numbered items in batches, with one file per batch, written by whichever rank computes it."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator

from data_prep.progress import WorkProgress
from trainer.engine.processes.collectives import broadcast, check_alike, gather, together
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.signals import StopRequest
from trainer.telemetry.files import write_whole

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Words and numbers for progress lines: "`doing`: ... of `items` `what`"; an item takes `units` of the unit `unit`.

    `kind`: of the error where it cannot be done.
    """

    doing: str
    items: int
    what: str = "images"
    units: int = 1
    unit: str = "step"
    kind: type[TrainerError] = TrainerError


class Work:
    """A folder of results for one request; batches with a result are not computed again.

    FOLDER/request.json                 the request; a different one in the same folder is refused
    FOLDER/parts/000000000-000000064.npz   the result of a batch; images until all are combined

    The number of processes may change between two starts.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], accelerator: Accelerator) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self._request = dict(request)
        self._parts = folder / "parts"
        self._stopping = folder / ".stopping"
        check_alike(self._request, kind=ConfigError)
        together(f"{folder}: cannot be written", self._claim, only_rank=0)

    def missing(self, batches: list[range], is_done: Callable[[range], bool] | None = None) -> list[range]:
        """This rank's share of the batches without a result. Collective."""
        is_done = is_done or (lambda numbers: self.part(numbers).exists())
        missing = broadcast([numbers for numbers in batches if not is_done(numbers)])
        return missing[self.accelerator.process_index :: self.accelerator.num_processes]

    def carry_out(
        self,
        missing: Callable[[], list[range]],
        action: Callable[[range, Callable[[int], object]], object],
        task: Task,
        stop: StopRequest,
    ) -> bool:
        """Do what is missing, batch by batch, until it is done or a rank has a request to stop, which is reported.

        missing: gives this rank's share of the batches to be done, as the method does; action: does a batch, and calls
        its second argument with the number of units that have advanced. Returns whether all is done. Collective. Raises
        `task.kind` on all ranks where an action fails.
        """
        share = missing()

        def until_stopped() -> bool:
            for numbers in share:
                action(numbers, bar.update)
                if self._is_stopping(stop):
                    return False
            return True

        total, visible = task.units * sum(map(len, share)), self.accelerator.is_main_process
        with WorkProgress(total=total, what=task.doing, unit=task.unit, visible=visible) as bar:
            done = together(f"{self.folder}: cannot be written", until_stopped, kind=task.kind)
        return all(done) or not self._report_stop(stop, missing(), task)

    def _is_stopping(self, stop: StopRequest) -> bool:
        """Whether any rank has a request to stop. Shared through a file, since ranks do not synchronise between
        batches.
        """
        if stop:
            self._stopping.touch()
        return self._stopping.exists()

    def _report_stop(self, stop: StopRequest, share: list[range], task: Task) -> bool:
        """Report the progress and return True where any rank's `share`, which is still missing, is not empty.

        Collective.
        """
        left = sum(gather(sum(map(len, share))))
        signals = [name for name in gather(stop.signal.name if stop.signal is not None else None) if name]
        if self.accelerator.is_main_process:
            self._stopping.unlink(missing_ok=True)  # all ranks have read it
            if left:
                done = f"{task.items - left} of {task.items} {task.what} are done, in {self.folder}"
                print(f"stopped by {signals[0]}: {done}; the same command goes on")
        return left > 0

    def save(self, numbers: range, arrays: Arrays) -> None:
        """Store a batch's result atomically."""
        self._parts.mkdir(exist_ok=True)
        content = io.BytesIO()
        np.savez(content, **dict[str, Any](arrays))
        write_whole(self.part(numbers), content.getvalue())

    def load(self, numbers: range) -> dict[str, npt.NDArray[Any]]:
        """The stored result of a batch."""
        try:
            with np.load(self.part(numbers), allow_pickle=False) as stored:
                return dict(stored)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.part(numbers)}: damaged ({error}); delete it and run this again") from error

    def holds(self, numbers: range, name: str) -> bool:
        """Whether a batch has a result with an array of this name. A damaged one counts; `load` finds it."""
        try:
            with np.load(self.part(numbers), allow_pickle=False) as stored:
                return name in stored.files
        except FileNotFoundError:
            return False
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):
            return True

    def part(self, numbers: range) -> Path:
        """Path of a batch's result."""
        return self._parts / f"{numbers.start:09d}-{numbers.stop:09d}.npz"

    def discard_parts(self) -> None:
        """Delete the batches' results after they have been combined. Collective."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(self._parts, ignore_errors=True)

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stopping.unlink(missing_ok=True)
        path = self.folder / "request.json"
        if path.exists():
            stored = json.loads(path.read_text())
            differences = [
                f"{name}: {stored.get(name)} there, {self._request.get(name)} now"
                for name in self._request | stored
                if stored.get(name) != self._request.get(name)
            ]
            if differences:
                raise ConfigError(
                    f"--out {self.folder}: holds what another request made ({'; '.join(differences)}); "
                    "choose another folder",
                    agreed=True,
                )
        else:
            if any(other.name != f"{path.name}.tmp" for other in self.folder.iterdir()):  # left by a kill
                raise ConfigError(f"--out {self.folder}: holds other files; choose a new or empty folder", agreed=True)
            write_whole(path, json.dumps(self._request, indent=1) + "\n")
