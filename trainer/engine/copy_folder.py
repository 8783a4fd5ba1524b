"""Copies of a run's checkpoints in another place: a bucket, a server, another disk; whatever fsspec can write.

    URL/step-00001000/part-...  manifest.json  COMPLETE     as in RUN/checkpoints; COMPLETE is written last
    URL/step-00002000/...                      SUPERSEDED   the marker of a copy of what the run was taken back from

Nobody renames a folder in a bucket, so the marker alone makes a copy of files; what it is worth, hashes say.
"""

import json
import posixpath
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from trainer.data.fetch import Patience, fetch
from trainer.engine.checkpoints import STEP_NAME
from trainer.engine.sealed import COMPLETE_NAME, MANIFEST_NAME, FileRecord
from trainer.errors import ConfigError, DataError

SUPERSEDED_NAME = "SUPERSEDED"
_PATIENCE = Patience(attempts=3)


class CopyFolder:
    """One run's copies. No method is collective; each raises what the file system's library raises, if not said else.

    Raises ConfigError where there is no library for such a URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.copy_to = {url}: {' '.join(str(error).split())}") from error

    def where(self, step: int) -> str:
        """The URL of a step's copy."""
        return f"{self.url}/step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of which there is a copy with its marker, oldest first."""
        return [step for step in self._all_steps() if self._files.exists(self._path(step, COMPLETE_NAME))]

    def marker(self, step: int) -> str | None:
        """What COMPLETE holds, which no other checkpoint's does; None where there is none."""
        try:
            return str(self._files.cat_file(self._path(step, COMPLETE_NAME)).decode(errors="replace").strip())
        except FileNotFoundError:
            return None

    def manifest(self, step: int) -> dict[str, Any] | None:
        """What manifest.json says, proven or not; None where it cannot be understood."""
        try:
            content = json.loads(self._files.cat_file(self._path(step, MANIFEST_NAME)))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def open(self, step: int) -> None:
        """Take the marker away, so that what is written from now on is no copy before it is sealed."""
        self._forget()
        if self._files.exists(self._path(step, COMPLETE_NAME)):
            self._files.rm_file(self._path(step, COMPLETE_NAME))

    def upload(self, folder: Path, step: int, records: Iterable[FileRecord]) -> None:
        """Copy files of a checkpoint. Raises OSError where one does not arrive whole."""
        for record in records:
            self._put(folder / record.name, step)

    def seal(self, folder: Path, step: int) -> None:
        """The files are there: copy the manifest, and the marker last."""
        for name in (MANIFEST_NAME, COMPLETE_NAME):
            self._put(folder / name, step)

    def tidy(self, step: int, records: Iterable[FileRecord], keep: int, keep_forever: Callable[[int], bool]) -> None:
        """A copy of `step` has been sealed: older ones go, but the `keep` newest and those to be kept for ever.

        So do files that an interrupted copying left. Copies of later steps are of work that the run was taken back
        from: they lose their marker.
        """
        known = {MANIFEST_NAME, COMPLETE_NAME, *(record.name for record in records)}
        for path in self._names(step):
            if posixpath.basename(path) not in known:
                self._files.rm_file(path)
        complete = self.steps()
        for later in (other for other in complete if other > step):
            self._files.mv(self._path(later, COMPLETE_NAME), self._path(later, SUPERSEDED_NAME))
        kept = [other for other in complete if other <= step][-keep:]
        for older in self._all_steps():
            if older < step and older not in kept and not (older in complete and keep_forever(older)):
                self.open(older)  # first, so that a half-deleted one is never taken for a copy
                self._files.rm(self._path(older), recursive=True)

    def download(
        self, step: int, name: str, target: Path, *, size: int | None = None, sha256: str | None = None
    ) -> None:
        """Fetch a file of a copy. Raises DataError where it cannot be had or is not what was promised."""
        if PurePosixPath(name).name != name:
            raise DataError(f"{self.where(step)}: names a file {name!r}, which would lie elsewhere")
        with target.open("w+b") as out:
            url = self._files.unstrip_protocol(self._path(step, name))
            fetch(url, out, size=size, digest=sha256, patience=_PATIENCE)

    def _path(self, step: int, *name: str) -> str:
        return posixpath.join(self._root, f"step-{step:08d}", *name)

    def _put(self, source: Path, step: int) -> None:
        target = self._path(step, source.name)
        if not isinstance(self._files, AsyncFileSystem):  # object stores have no folders, and would make a bucket
            self._files.makedirs(posixpath.dirname(target), exist_ok=True)
        self._files.put_file(str(source), target)
        self._forget()
        arrived, size = self._files.info(target)["size"], source.stat().st_size
        if arrived != size:
            raise OSError(f"{self.where(step)}/{source.name}: {arrived} of {size} bytes arrived")

    def _all_steps(self) -> list[int]:
        self._forget()
        try:
            names = [posixpath.basename(path.rstrip("/")) for path in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := STEP_NAME.fullmatch(name)))

    def _names(self, step: int) -> list[str]:
        return list(self._files.ls(self._path(step), detail=False))

    def _forget(self) -> None:
        self._files.invalidate_cache()  # of listings: another rank, and another job before, has written there


def words(error: Any) -> str:
    """An error of whichever library, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
