"""A mirror of a run's checkpoints: in a bucket, on a server or another disk; anything that fsspec can write to.

    URL/step-00001000/part-...  manifest.json  COMPLETE     as in RUN/checkpoints; COMPLETE is written last
    URL/step-00002000/...                      SUPERSEDED   replaces COMPLETE where the run resumed from an earlier step

Buckets have no atomic rename of folders, so files count as a copy only once the marker exists. The hashes verify it.
"""

import json
import posixpath
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from trainer.data.cache.download import Patience, fetch
from trainer.engine.checkpointing.checkpoints import STEP_NAME
from trainer.engine.checkpointing.sealed import COMPLETE_NAME, MANIFEST_NAME, FileRecord
from trainer.errors import ConfigError, DataError

SUPERSEDED_NAME = "SUPERSEDED"
_PATIENCE = Patience(attempts=3)


class CopyFolder:
    """The mirror of one run. No method is collective; unless stated otherwise, errors are those of the file system's
    library.

    Raises ConfigError where the library for such a URL is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.copy_to = {url}: {' '.join(str(error).split())}") from error

    def where(self, step: int) -> str:
        """URL of a step's copy."""
        return f"{self.url}/step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a copy with its marker, oldest first."""
        return [step for step in self._all_steps() if self._files.exists(self._path(step, COMPLETE_NAME))]

    def marker(self, step: int) -> str | None:
        """Content of COMPLETE, which is unique to a checkpoint; None where there is none."""
        try:
            return str(self._files.cat_file(self._path(step, COMPLETE_NAME)).decode(errors="replace").strip())
        except FileNotFoundError:
            return None

    def manifest(self, step: int) -> dict[str, Any] | None:
        """The parsed manifest.json, not verified; None where it cannot be parsed."""
        try:
            content = json.loads(self._files.cat_file(self._path(step, MANIFEST_NAME)))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def open(self, step: int) -> None:
        """Delete the marker, so that files written from now on do not count as a copy until `seal`."""
        self._forget()
        if self._files.exists(self._path(step, COMPLETE_NAME)):
            self._files.rm_file(self._path(step, COMPLETE_NAME))

    def upload(self, folder: Path, step: int, records: Iterable[FileRecord]) -> None:
        """Upload files of a checkpoint. Raises OSError where a file's uploaded size differs."""
        for record in records:
            self._put(folder / record.name, step)

    def seal(self, folder: Path, step: int) -> None:
        """Upload the manifest, then the marker. The files must have been uploaded."""
        for name in (MANIFEST_NAME, COMPLETE_NAME):
            self._put(folder / name, step)

    def tidy(self, step: int, records: Iterable[FileRecord], keep: int, keep_forever: Callable[[int], bool]) -> None:
        """Apply retention after the copy of `step` was sealed: the `keep` newest and those to be kept forever stay.

        Files left by interrupted uploads are deleted too. Copies of later steps belong to work that the run abandoned
        when it resumed from an earlier checkpoint: their marker is removed.
        """
        known = {MANIFEST_NAME, COMPLETE_NAME, *(record.name for record in records)}
        for path in list(self._files.ls(self._path(step), detail=False)):
            if posixpath.basename(path) not in known:
                self._files.rm_file(path)
        complete = self.steps()
        for later in (other for other in complete if other > step):
            self._files.mv(self._path(later, COMPLETE_NAME), self._path(later, SUPERSEDED_NAME))
        kept = [other for other in complete if other <= step][-keep:]
        for older in self._all_steps():
            if older < step and older not in kept and not (older in complete and keep_forever(older)):
                self.open(older)  # marker first, so that a partly deleted copy is never taken for a complete one
                self._files.rm(self._path(older), recursive=True)

    def download(
        self, step: int, name: str, target: Path, *, size: int | None = None, sha256: str | None = None
    ) -> None:
        """Download a file of a copy. Raises DataError where it is unavailable, or not as recorded in the manifest."""
        if PurePosixPath(name).name != name:
            raise DataError(f"{self.where(step)}: names a file {name!r}, which would lie elsewhere")
        with target.open("w+b") as out:
            url = self._files.unstrip_protocol(self._path(step, name))
            fetch(url, out, size=size, digest=sha256, patience=_PATIENCE)

    def _path(self, step: int, *name: str) -> str:
        return posixpath.join(self._root, f"step-{step:08d}", *name)

    def _put(self, source: Path, step: int) -> None:
        target = self._path(step, source.name)
        if not isinstance(self._files, AsyncFileSystem):  # on object stores makedirs would create a bucket
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

    def _forget(self) -> None:
        self._files.invalidate_cache()  # listings are cached; another rank or an earlier job has written there


def words(error: Any) -> str:
    """The message of an exception of any library, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
