"""A cache of shards on a node's local disk: each is downloaded by one process, verified, and evicted within a limit.

    CACHE/shards/<digest>       a complete, verified shard; its mtime is when it was last opened
    CACHE/shards/<digest>.part  a download in progress, allocated at its full length
    CACHE/locks/<digest>        locked by the process that downloads
    CACHE/files/<name>          small files that are never evicted: manifests, indexes

Shards are named by content, so that datasets and jobs may share a cache. Locks are by flock, so the kernel releases
those of a dead process. The folder must be on a disk of this node.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_prep.format import sha256_of
from trainer.data.cache.download import Patience, fetch
from trainer.data.datasets.dataset import Shard
from trainer.errors import DataError

_AGAIN = 0.05  # seconds between checks for room made by others


class NodeCache:
    """The cache, see the module; implements `ShardFiles`. The total size of `shards/` never exceeds `limit` bytes."""

    def __init__(self, folder: Path, limit: int, patience: Patience | None = None) -> None:
        self.folder = folder
        self.limit = limit
        self.patience = patience or Patience()
        self.shards = folder / "shards"
        self.locks = folder / "locks"
        self.files = folder / "files"
        try:
            for path in (self.shards, self.locks, self.files):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir = {folder}: cannot be written ({error.strerror})") from error

    def open(self, shard: Shard) -> int:
        """A descriptor of the shard, which is downloaded where it is not cached. It stays valid after an eviction.

        Raises DataError where the shard cannot be downloaded or there is no room for it.
        """
        path = self.shards / shard.digest
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._bring(shard)
                continue
            if os.fstat(descriptor).st_size == shard.bytes:
                with contextlib.suppress(OSError):  # a disk that became read-only: the cached copy is still usable
                    os.utime(descriptor)
                return descriptor
            os.close(descriptor)
            self._delete(shard, lambda: path.stat().st_size != shard.bytes)

    def pin(self, shard: Shard) -> int | None:
        """Open a shard and prevent its eviction until `unpin`, or until this process ends.

        None where more than half of the cache would be pinned, by all processes together: the rest is for shards being
        read.
        """
        with self._locked("room"):
            if not self._may_pin(shard):  # before downloading it
                return None
        while True:
            descriptor = self.open(shard)
            with self._locked("room"):
                if os.fstat(descriptor).st_nlink:
                    if self._may_pin(shard):
                        fcntl.flock(descriptor, fcntl.LOCK_SH)
                        return descriptor
                    os.close(descriptor)
                    return None
            os.close(descriptor)  # evicted just before

    @staticmethod
    def unpin(descriptor: int) -> None:
        """Release a pin."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a loader process forked meanwhile would keep the lock open
        os.close(descriptor)

    def renew(self, shard: Shard) -> bool:
        """Implements `ShardFiles.renew`: verifies the cached copy and deletes it where it is damaged."""
        path = self.shards / shard.digest
        if shard.verifiable:
            self._delete(shard, lambda: sha256_of(path) != shard.digest)
        return shard.verifiable  # even if undamaged: another process may have replaced it

    def keep(self, url: str, name: str, digest: str) -> Path:
        """A small file with this sha256, downloaded unless it is cached; `name` should identify the content."""
        path = self.files / name
        with self._locked(name.replace("/", "-")), self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or sha256_of(path) != digest:
                self._download(url, path.with_name(f"{path.name}.part"), digest).rename(path)
        return path

    def keep_anew(self, url: str, name: str) -> Path:
        """A small file of unknown content, downloaded each time and stored as <its sha256>/`name`.

        A version that another job uses is therefore kept when the file at the URL is replaced.
        """
        place = hashlib.sha256(url.encode()).hexdigest()
        with self._locked(place), self._writing():
            part = self._download(url, self.files / f"{place}.part", None)
            path = self.files / sha256_of(part) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            return part.rename(path)

    def _download(self, url: str, part: Path, digest: str | None) -> Path:
        with part.open("w+b") as out:
            fetch(url, out, size=None, digest=digest, patience=self.patience)
            _to_disk(out)
        return part

    def _bring(self, shard: Shard) -> None:
        path, part = self.shards / shard.digest, self.shards / f"{shard.digest}.part"
        with self._locked(shard.digest):
            if path.exists():  # another process was faster
                return
            with self._writing():
                try:
                    self._reserve(part, shard)
                    with part.open("r+b") as out:
                        digest = shard.digest if shard.verifiable else None
                        fetch(shard.url, out, size=shard.bytes, digest=digest, patience=self.patience)
                        _to_disk(out)
                    with self._locked("room"):  # otherwise a process that adds up sizes might see neither name
                        part.rename(path)
                finally:
                    part.unlink(missing_ok=True)

    def _reserve(self, part: Path, shard: Shard) -> None:
        """Create a file of the shard's length; where the cache is full, wait for room as long as for a server."""
        deadline = time.monotonic() + self.patience.stall
        while (used := self._make_room(part, shard)) is not None:
            if shard.bytes > self.limit or time.monotonic() > deadline:
                raise DataError(
                    f"data.cache_size = {self.limit} bytes: too small; {used} bytes are in use in {self.folder} and "
                    f"{shard.url} needs {shard.bytes}"
                )
            time.sleep(_AGAIN)

    def _make_room(self, part: Path, shard: Shard) -> int | None:
        """Create the file of the shard's length, evicting the least recently opened shards.

        Returns None; where there is no room, the bytes in use.
        """
        with self._locked("room"):
            part.unlink(missing_ok=True)  # left by a dead process
            entries = sorted(self._entries())
            used = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if used + shard.bytes <= self.limit:
                    break
                if self._evict(path):
                    used -= size
            if used + shard.bytes > self.limit:
                return used
            with part.open("wb") as out:
                os.posix_fallocate(out.fileno(), 0, max(shard.bytes, 1))  # fails here if the disk is full
        return None

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """For each file, its time of last opening, size and path; files deleted meanwhile by others are left out."""
        for entry in _scan(self.shards):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                yield found.st_mtime_ns, found.st_size, Path(entry.path)

    def _may_pin(self, shard: Shard) -> bool:
        """Whether this shard and those pinned already fit into half of the cache; call it with "room" locked."""
        pinned = sum(size for _, size, path in self._entries() if path.name != shard.digest and _is_pinned(path))
        return pinned + shard.bytes <= self.limit // 2

    def _evict(self, path: Path) -> bool:
        """Delete a shard that is not pinned, or a partial download of a dead process; returns whether it did."""
        try:
            if path.suffix == ".part":
                with (self.locks / path.stem).open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            elif not _is_pinned(path):
                path.unlink()  # no pin can be taken meanwhile: that needs the lock "room"
            else:
                return False
        except BlockingIOError:
            return False
        except FileNotFoundError:  # another process was faster
            pass
        return True

    def _delete(self, shard: Shard, is_bad: Callable[[], bool]) -> None:
        """Delete the cached copy if `is_bad`."""
        with self._locked(shard.digest), self._writing(), contextlib.suppress(FileNotFoundError):
            if is_bad():
                (self.shards / shard.digest).unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with self._writing():
            lock = (self.locks / name).open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"data.cache_dir = {self.folder}: cannot be written ({error.strerror})") from error


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return list(found)


def _is_pinned(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _to_disk(out: BinaryIO) -> None:
    """fsync before the rename: after a power failure the final name must not refer to missing data."""
    out.flush()
    os.fsync(out.fileno())
