"""Shards on a node's own disk: fetched once by one process, verified, in a bounded space.

    CACHE/shards/<digest>       a whole shard, verified when it was fetched; its time is when it was last opened
    CACHE/shards/<digest>.part  one being fetched, at its full length from the beginning
    CACHE/locks/<digest>        held by the process that fetches
    CACHE/files/<name>          small files that are kept: indexes

Names come from contents, so that datasets may share a cache, and so may jobs. Locks are the kernel's (flock): those of
a process that died are free. The folder must be on a disk of this node.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.format import sha256_of
from trainer.data.fetch import Patience, fetch
from trainer.data.shards import Shard
from trainer.errors import DataError


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
                os.utime(descriptor)
                return descriptor
            os.close(descriptor)
            self._delete(shard, lambda: path.stat().st_size != shard.bytes)

    def pin(self, shard: Shard) -> int:
        """Open a shard so that it is not deleted before `unpin`, or before this process ends."""
        while True:
            descriptor = self.open(shard)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                return descriptor
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

    def keep(self, url: str, name: str, digest: str | None) -> Path:
        """A small file, fetched and kept under `name`; anew each time where no `digest` vouches for the one here."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(name.replace("/", "-")):
            if digest is None or not path.exists() or sha256_of(path) != digest:
                part = path.with_name(f"{path.name}.part")
                with self._writing(), part.open("w+b") as out:
                    fetch(url, out, size=None, digest=digest, patience=self.patience)
                part.rename(path)
        return path

    def _bring(self, shard: Shard) -> None:
        path, part = self.shards / shard.digest, self.shards / f"{shard.digest}.part"
        with self._locked(shard.digest):
            if path.exists():  # another process was quicker
                return
            with self._writing():
                self._reserve(part, shard)
                try:
                    with part.open("r+b") as out:
                        digest = shard.digest if shard.verifiable else None
                        fetch(shard.url, out, size=shard.bytes, digest=digest, patience=self.patience)
                    part.rename(path)
                finally:
                    part.unlink(missing_ok=True)

    def _reserve(self, part: Path, shard: Shard) -> None:
        """Make a file of the shard's length, for which the shards that were not opened for longest make room."""
        with self._locked("room"):
            part.unlink(missing_ok=True)  # of a process that died
            entries = [
                (entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in os.scandir(self.shards)
            ]
            used = sum(size for _, size, _ in entries)
            for _, size, name in sorted(entries):
                if used + shard.bytes <= self.limit:
                    break
                if self._evict(Path(name)):
                    used -= size
            if used + shard.bytes > self.limit:
                raise DataError(
                    f"data.cache_size = {self.limit} bytes: too small; {used} bytes are in use in {self.folder} and "
                    f"{shard.url} needs {shard.bytes}"
                )
            with part.open("wb") as out:
                os.posix_fallocate(out.fileno(), 0, max(shard.bytes, 1))  # a full disk is found now

    def _evict(self, path: Path) -> bool:
        """Delete a shard that nobody has pinned, or a part that nobody is fetching; whether it was."""
        held = self.locks / path.stem if path.suffix == ".part" else path
        with contextlib.suppress(FileNotFoundError), held.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            path.unlink()
        return True

    def _delete(self, shard: Shard, is_bad: Callable[[], bool]) -> None:
        """Delete the copy here if it is bad."""
        with self._locked(shard.digest), contextlib.suppress(FileNotFoundError):
            if is_bad():
                (self.shards / shard.digest).unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.locks / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"data.cache_dir = {self.folder}: cannot be written ({error.strerror})") from error
