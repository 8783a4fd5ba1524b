"""Downloads of single files from anything that fsspec reads: http(s), s3, gs, hf, or another folder."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec

from trainer.errors import DataError

_CHUNK = 4 << 20
_NO_SUCH_RANGE = 416
_HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Retries of a download.

    attempts: their total number; first_delay: seconds before the second, doubled each time; stall: seconds within which
    at least `least_bytes` must arrive.
    """

    attempts: int = 6
    first_delay: float = 1.0
    stall: float = 60.0
    least_bytes: int = 1 << 20


def fetch(url: str, out: BinaryIO, *, size: int | None, digest: str | None, patience: Patience) -> None:
    """Copy a file to the beginning of `out`; `size` in bytes and `digest` (sha256) are verified where they are given.

    Failed or stalled connections, truncated bodies and wrong contents are retried, with exponential backoff; where
    there is a digest to verify the result, the download is resumed. Raises DataError with the URL and the last reason;
    without retries where the file does not exist or access is denied. Raises OSError where `out` cannot be written.
    """
    download = _Download(url, out, size, patience)
    for attempt in range(1, patience.attempts + 1):
        try:
            if digest is None:
                download.begin_anew()
            download.go_on()
            found = download.sha256.hexdigest()
            if size is not None and out.tell() != size:
                reason = f"cut off after {out.tell()} of {size} bytes"
            elif digest is not None and found != digest:
                reason = f"sha256 is {found}, {digest} was promised"
                download.begin_anew()
            else:
                return
        except _CannotWriteError as error:
            raise error.reason from error
        except Exception as error:  # fsspec backends raise exceptions of their libraries
            if _is_final(cause := _cause(error)):
                raise DataError(f"{url}: {_words(cause)}") from error
            reason = _words(cause)
        if attempt < patience.attempts:
            time.sleep(patience.first_delay * 2 ** (attempt - 1))
    raise DataError(f"{url}: cannot be fetched, {patience.attempts} attempts: {reason}")


class _CannotWriteError(Exception):
    """An error of the local file, as opposed to the connection."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _CannotWriteError(error) from error


class _Download:
    """A partial download: the received bytes are `out` up to its position, and `sha256` is their hash."""

    def __init__(self, url: str, out: BinaryIO, size: int | None, patience: Patience) -> None:
        self.url = url
        self.out = out
        self.size = size
        self.patience = patience
        self.sha256 = hashlib.sha256()

    def begin_anew(self) -> None:
        """Discard what was received."""
        with _writing():
            self.out.seek(0)
        self.sha256 = hashlib.sha256()

    def go_on(self) -> None:
        """Read to the end of the file, at most `size` bytes, and truncate `out` there.

        Raises _CannotWriteError, and exceptions of the protocol's library.
        """
        if self.size is not None and self.out.tell() >= self.size:
            self.begin_anew()
        with self._open() as source:
            since, arrived = time.monotonic(), 0
            while chunk := source.read(_CHUNK):
                with _writing():
                    self.out.write(chunk)
                self.sha256.update(chunk)
                arrived += len(chunk)
                if self.size is not None and self.out.tell() > self.size:
                    self.begin_anew()
                    raise OSError(f"longer than the {self.size} bytes that were promised")
                if time.monotonic() - since > self.patience.stall:
                    if arrived < self.patience.least_bytes:
                        raise TimeoutError(f"{arrived} bytes in {self.patience.stall:g} seconds")
                    since, arrived = time.monotonic(), 0
        with _writing():
            self.out.truncate()

    def _open(self) -> Any:
        """Open the file at the position of `out`, or at 0 where the server does not support ranges."""
        filesystem, path = _filesystem(self.url, self.patience)
        at = self.out.tell()
        if not _is_http(self.url):  # object stores: consecutive range requests
            source = filesystem.open(path, "rb", block_size=_CHUNK)
            source.seek(at)
            return source
        plain = {"block_size": 0, "size": self.size}  # a single request, without one for the size first
        if not at:
            return filesystem.open(path, "rb", **plain)
        try:
            headers = {"Range": f"bytes={at}-", "Accept-Encoding": "identity"}
            source = filesystem.open(path, "rb", **plain, headers=headers)
        except Exception as error:
            if getattr(error, "status", None) != _NO_SUCH_RANGE:
                raise
            self.begin_anew()
            return filesystem.open(path, "rb", **plain)
        if not source.r.headers.get("Content-Range", "").startswith(f"bytes {at}-"):
            self.begin_anew()
        return source


def remote_size(url: str, patience: Patience) -> tuple[int, str]:
    """Length in bytes, and a value that changes with the content (an ETag or a time). Raises DataError."""
    with _asking(url, patience) as (filesystem, path):
        info = filesystem.info(path)
    if info.get("size") is None:
        raise DataError(f"{url}: the server does not say how long it is")
    stamps = ("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime", "generation", "blob_id")
    return int(info["size"]), str([str(info[stamp]) for stamp in stamps if stamp in info])


def list_tars(url: str, patience: Patience) -> list[str]:
    """The URLs of the .tar files in a folder, sorted. Raises DataError."""
    with _asking(url, patience) as (filesystem, path):
        found = filesystem.glob(f"{path.rstrip('/')}/*.tar")
    return sorted(filesystem.unstrip_protocol(name) for name in found)


def exists(url: str, patience: Patience) -> bool:
    """Whether the file exists. Raises DataError where this cannot be determined."""
    with _asking(url, patience) as (filesystem, path):
        return bool(filesystem.exists(path))


@contextlib.contextmanager
def _asking(url: str, patience: Patience) -> Iterator[tuple[Any, str]]:
    """A URL's file system and its path there; errors of either, without retries, as DataError."""
    try:
        yield _filesystem(url, patience)
    except Exception as error:  # fsspec backends raise exceptions of their libraries
        raise DataError(f"{url}: {_words(_cause(error))}") from error


def _filesystem(url: str, patience: Patience) -> tuple[Any, str]:
    options = {}
    if _is_http(url):
        import aiohttp  # optional, like the libraries of other protocols

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience.stall, sock_read=patience.stall)
        options = {"client_kwargs": {"timeout": timeout}}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, path


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _cause(error: BaseException) -> BaseException:
    """The cause of an error: fsspec raises FileNotFoundError for any failure to open a URL."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_final(error: BaseException) -> bool:
    """Whether a retry is pointless: HTTP 4xx except 408 (timeout) and 429 (too many requests), for example."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, _HOPELESS)


def _words(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404:
        return "no such file"
    if isinstance(error, TimeoutError) and not str(error):
        return "timed out"
    return " ".join(f"{type(error).__name__}: {error}".split())
