"""Error messages for a data.path that is neither a prepared dataset nor tars."""

import os
import shlex
from pathlib import Path

from data_prep.sources.rules import has_image_suffix, is_by_product
from trainer.errors import DataError

_ARCHIVES = (".zip", ".tgz", ".gz", ".tfrecords", ".parquet", ".mdb")
_MOST_LOOKED_AT = 10_000  # files, so that a large folder is not searched for long


def check_prepared(path: Path, *, image_size: int, channels: int) -> None:
    """Raise DataError where `path` exists; if it holds images, the message has the command to prepare them.

    image_size and channels: the configuration's.
    """
    if not path.exists():
        return
    found = path.name if path.is_file() else _first_to_prepare(path)
    if found is None:
        raise DataError(f"{path}: holds neither prepared data nor tars nor images; give a folder with one of them")
    source = path.parent if path.name == "data.mdb" else path
    grey = " --mode L" if channels == 1 else ""
    out = source.with_name(f"{source.name.partition('.')[0] or 'data'}-{image_size}")
    command = f"python -m data_prep {shlex.quote(str(source))} {shlex.quote(str(out))} --size {image_size}{grey}"
    holds = "is a file" if path.is_file() else f"holds {found}"
    raise DataError(f"{path}: {holds}, which is to be prepared first: `{command}`; then data.path = {str(out)!r}")


def _first_to_prepare(folder: Path) -> str | None:
    """Name of an image or an archive of images in `folder`; None where there is none."""
    looked_at = 0
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not is_by_product(name))
        for name in sorted(files):
            if not is_by_product(name) and (has_image_suffix(name) or name.endswith(_ARCHIVES)):
                return str(Path(place, name).relative_to(folder))
        looked_at += len(files)
        if looked_at > _MOST_LOOKED_AT:
            break
    return None
