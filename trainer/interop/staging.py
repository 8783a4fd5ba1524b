"""Folders that are created atomically."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from trainer.engine.checkpointing.sealed import fsync
from trainer.errors import ConversionError


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` to write to; renamed to `final` when the block ends, and deleted when it raises.

    Raises ConversionError where `final` exists already or cannot be written.
    """
    if final.exists() or final.is_symlink():
        raise ConversionError(f"--out {final}: exists already; choose another folder")
    staging = final.parent / f".{final.name}.unfinished-{os.getpid()}"
    try:
        staging.mkdir(parents=True)
        try:
            yield staging
            for path in staging.rglob("*"):
                fsync(path)
            fsync(staging)
            staging.rename(final)
            fsync(final.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"--out {final}: cannot be written ({error})") from error
