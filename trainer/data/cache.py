"""Shards on a node's own disk: fetched once by one process, verified, in a bounded space.

    CACHE/shards/<digest>       a whole shard, verified when it was fetched; its time is when it was last opened
    CACHE/shards/<digest>.part  one being fetched, at its full length from the beginning
    CACHE/locks/<digest>        held by the process that fetches
    CACHE/files/<name>          small files that are kept: manifests, indexes

Names come from contents, so that datasets may share a cache, and so may jobs. Locks are the kernel's (flock): those of
a process that died are free. The folder must be on a disk of this node.
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
from trainer.data.dataset import Shard
from trainer.data.fetch import Patience, fetch
from trainer.errors import DataError

_AGAIN = 0.05  # seconds until it is looked again whether others have made room


class NodeCache:
    """See the module; a `ShardFiles`. `limit` bytes are never exceeded by what `shards/` holds."""

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
        """A descriptor of the shard, which is fetched where it is not here. It outlives the shard's deletion.

        Raises DataError where it cannot be fetched or there is no room for it.
        """
        path = self.shards / shard.digest
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._bring(shard)
                continue
            if os.fstat(descriptor).st_size == shard.bytes:
                with contextlib.suppress(
                    OSError
                ):  # of a disk that has become read-only: what is here serves all the same
                    os.utime(descriptor)
                return descriptor
            os.close(descriptor)
            self._delete(shard, lambda: path.stat().st_size != shard.bytes)

    def pin(self, shard: Shard) -> int | None:
        """Open a shard so that it is not deleted before `unpin`, or before this process ends.

        None where more than half of the cache would be pinned, by all processes together: the rest is for reading.
        """
        with self._locked("room"):
            if not self._may_pin(shard):  # to fetch it would be in vain
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
            os.close(descriptor)  # deleted just before

    @staticmethod
    def unpin(descriptor: int) -> None:
        """The contrary of `pin`."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a loader process was forked meanwhile
        os.close(descriptor)

    def renew(self, shard: Shard) -> bool:
        """See `ShardFiles`: the copy here is read again whole, and deleted where it is not what was promised."""
        path = self.shards / shard.digest
        if shard.verifiable:
            self._delete(shard, lambda: sha256_of(path) != shard.digest)
        return shard.verifiable  # even where it is whole by now: another process may have fetched it anew

    def keep(self, url: str, name: str, digest: str) -> Path:
        """A small file of this sha256, fetched where the one here is not it; `name` should identify the content."""
        path = self.files / name
        with self._locked(name.replace("/", "-")), self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or sha256_of(path) != digest:
                self._download(url, path.with_name(f"{path.name}.part"), digest).rename(path)
        return path

    def keep_anew(self, url: str, name: str) -> Path:
        """A small file of which nobody knows the content, fetched each time and kept as <its sha256>/`name`.

        So one that another job uses stays as it is, when the file behind the URL is replaced.
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
            if path.exists():  # another process was quicker
                return
            with self._writing():
                try:
                    self._reserve(part, shard)
                    with part.open("r+b") as out:
                        digest = shard.digest if shard.verifiable else None
                        fetch(shard.url, out, size=shard.bytes, digest=digest, patience=self.patience)
                        _to_disk(out)
                    with self._locked("room"):  # else who counts meanwhile might see neither name
                        part.rename(path)
                finally:
                    part.unlink(missing_ok=True)

    def _reserve(self, part: Path, shard: Shard) -> None:
        """Make a file of the shard's length; where others fill the cache, wait for them as long as for a server."""
        deadline = time.monotonic() + self.patience.stall
        while (used := self._make_room(part, shard)) is not None:
            if shard.bytes > self.limit or time.monotonic() > deadline:
                raise DataError(
                    f"data.cache_size = {self.limit} bytes: too small; {used} bytes are in use in {self.folder} and "
                    f"{shard.url} needs {shard.bytes}"
                )
            time.sleep(_AGAIN)

    def _make_room(self, part: Path, shard: Shard) -> int | None:
        """The file of the shard's length, for which the shards that were not opened for longest make room.

        Returns None, or the bytes that are in use where there is no room.
        """
        with self._locked("room"):
            part.unlink(missing_ok=True)  # of a process that died
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
                os.posix_fallocate(out.fileno(), 0, max(shard.bytes, 1))  # a full disk is found now
        return None

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Of each file: when it was last opened, its bytes, its path; not of those that others delete meanwhile."""
        for entry in _scan(self.shards):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                yield found.st_mtime_ns, found.st_size, Path(entry.path)

    def _may_pin(self, shard: Shard) -> bool:
        """Whether half of the cache holds this and what is pinned already; to be asked while "room" is locked."""
        pinned = sum(size for _, size, path in self._entries() if path.name != shard.digest and _is_pinned(path))
        return pinned + shard.bytes <= self.limit // 2

    def _evict(self, path: Path) -> bool:
        """Delete a shard that nobody has pinned, or a part that nobody is fetching; whether it is gone."""
        try:
            if path.suffix == ".part":
                with (self.locks / path.stem).open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            elif not _is_pinned(path):
                path.unlink()  # nor can anyone pin it now: that takes the lock on "room"
            else:
                return False
        except BlockingIOError:
            return False
        except FileNotFoundError:  # another process was quicker
            pass
        return True

    def _delete(self, shard: Shard, is_bad: Callable[[], bool]) -> None:
        """Delete the copy here if it is bad."""
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
    """Before the renaming: after a power cut the name must not stand for a hole."""
    out.flush()
    os.fsync(out.fileno())
