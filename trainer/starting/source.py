"""What lies where a newcomer points: prepared data, or images that have yet to be prepared."""

import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image

from data_prep.format import MANIFEST_NAME, FormatError, Manifest, load_manifest
from data_prep.output import STAGING_NAME
from data_prep.sources.base import has_image_suffix
from trainer.errors import DataError

_LOOKED_AT = 32  # images, to find the size of all


def open_prepared(data: Path) -> Manifest:
    """The manifest of prepared data. Raises DataError, which says how to prepare it where it is something else."""
    try:
        if (data / MANIFEST_NAME).is_file() or (data / STAGING_NAME).exists():
            return _manifest(data)
        exists = data.exists()
    except OSError as error:
        raise DataError(f"{data}: cannot be read ({error.strerror})") from error
    if not exists:
        raise DataError(f"{data}: no such folder; prepare images with: ddpm-prepare IMAGES {data} --size 64")
    out = Path("data") / (data.name if data.is_dir() else data.name.partition(".")[0])
    if out.resolve().is_relative_to(data.resolve()):
        out = Path(f"{data.resolve().name}_prepared")
    command = shlex.join(["ddpm-prepare", str(data), str(out), "--size", str(suitable_size(data))])
    raise DataError(f"{data}: is not prepared data (no {MANIFEST_NAME}); if it holds images, prepare them: {command}")


def _manifest(data: Path) -> Manifest:
    try:
        manifest = load_manifest(data)
    except FormatError as error:
        raise DataError(str(error)) from error
    if not manifest.samples:
        raise DataError(f"{data}: holds no image")
    return manifest


def suitable_size(data: Path) -> int:
    """The largest power of two, from 16 to 256, that most images found there need not be enlarged to; 64 if none is."""
    sides = sorted(min(size) for size in islice(_sizes(data), _LOOKED_AT))
    if not sides:
        return 64
    fits = sides[len(sides) // 4]
    return next((size for size in (256, 128, 64, 32) if size <= fits), 16)


def _sizes(data: Path) -> Iterator[tuple[int, int]]:
    for path in data.rglob("*"):
        if has_image_suffix(path.name):
            try:
                with Image.open(path) as image:
                    yield image.size
            except Exception:  # damaged images are data_prep's to tell; Pillow raises anything
                continue
