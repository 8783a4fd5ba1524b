"""Preparing a dataset: data_prep beside the bare loop of decode -> transform -> encode, in turns within one run.

    python benchmarks/prepare.py [--images 600] [--size 256] [--folder PHOTOS] [--rounds 5] [--json FILE]

Each case takes the same encoded images, on one core and without starting processes on any side. The bare loop is what
anybody would write: Pillow's calls and nothing checked; "codec" throws the result away and "stored" appends it to one
file, which somebody must. data_prep's side is `write_shard`: reading from an LMDB, every check, the transform, the tar
with its index, hashes and fsync. Seconds are CPU time, the kernel's included; the better of all turns counts.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lmdb
import numpy as np
from PIL import Image, ImageFilter

from data_prep.convert import SAVE_OPTIONS
from data_prep.recipe import Encoding, Recipe, Transform
from data_prep.sources import open_source
from data_prep.writer import ShardPlan, write_shard

LSUN_ASPECT = 4 / 3
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """What goes in (shorter side as a multiple of the target) and what is asked for."""

    name: str
    scale: int
    transform: Transform
    encoding: Encoding
    share: float  # of the images, so that slow cases take no longer than fast ones


CASES = [
    Case(name="LSUN JPEG, bytes kept", scale=1, transform="source", encoding="webp", share=1.0),
    Case(name="LSUN JPEG -> crop -> JPEG", scale=1, transform="ddpm", encoding="jpeg", share=1.0),
    Case(name="LSUN JPEG -> crop -> WebP", scale=1, transform="ddpm", encoding="webp", share=0.5),
    Case(name="4x JPEG -> Lanczos -> JPEG", scale=4, transform="ddpm", encoding="jpeg", share=0.1),
    Case(name="4x JPEG -> BOX, bicubic -> WebP", scale=4, transform="adm", encoding="webp", share=0.1),
]


def main() -> None:
    """Measure all cases, print the table, write the figures."""
    parser = argparse.ArgumentParser(
        description="Images/s of data_prep beside a bare loop of Pillow's calls, one core."
    )
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--size", type=int, default=256, help="side of the squares that are made")
    parser.add_argument(
        "--folder", type=Path, help="photos to take the images from (default: coloured noise, smoothed)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side; the best are compared")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    results = [measure(case, options.images, options.size, options.folder, options.rounds) for case in CASES]
    print(f"{'images/s on one core':34}{'codec':>8}{'stored':>8}{'data_prep':>11}{'/ codec':>9}{'/ stored':>9}")
    for result in results:
        rates = f"{result['codec']:8.0f}{result['stored']:8.0f}{result['data_prep']:11.0f}"
        print(f"{result['case']:34}{rates}{result['to_codec']:9.2f}{result['to_stored']:9.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(case: Case, images: int, size: int, folder: Path | None, rounds: int) -> dict[str, Any]:
    """All sides in turns; images/s by the best turn of each, since whatever else the machine does only adds."""
    files = encoded_images(max(1, round(images * case.share)), size * case.scale, folder)
    with tempfile.TemporaryDirectory() as place:
        sides: list[Callable[[], object]] = [
            lambda: bare(files, case, size, Path(os.devnull)),
            lambda: bare(files, case, size, Path(place) / "bare"),
            shard_writer(files, case, size, Path(place)),
        ]
        for side in sides:
            side()  # once for the caches
        times = [[seconds(side) for side in sides] for _ in range(rounds)]
    codec, stored, ours = (len(files) / min(column) for column in zip(*times))
    return {
        "case": case.name,
        "codec": codec,
        "stored": stored,
        "data_prep": ours,
        "to_codec": ours / codec,
        "to_stored": ours / stored,
    }


def seconds(action: Callable[[], object]) -> float:
    """CPU time of this process: other programs on the machine do not count, nor does waiting for the disk."""
    started = time.process_time()
    action()
    return time.process_time() - started


def bare(files: Sequence[bytes], case: Case, size: int, path: Path) -> None:
    """Decode, transform and encode each image, and append it to the file at `path`."""
    with path.open("wb") as out:
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            if case.transform == "source":
                out.write(data)
                continue
            stream = io.BytesIO()
            bare_transform(image, case.transform, size).save(stream, case.encoding, **SAVE_OPTIONS[case.encoding])
            out.write(stream.getvalue())


def bare_transform(image: Image.Image, transform: Transform, size: int) -> Image.Image:
    """The fewest calls that give the transform's pixels."""
    if transform == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


def shard_writer(files: Sequence[bytes], case: Case, size: int, place: Path) -> Callable[[], int]:
    """data_prep's writing of one shard, from an LMDB of these files."""
    room = 2 * sum(map(len, files)) + 2**26
    with lmdb.open(str(place / "lmdb"), map_size=room) as database, database.begin(write=True) as transaction:
        for number, data in enumerate(files):
            transaction.put(hashlib.sha1(b"%d" % number).hexdigest().encode(), data)
    plan = ShardPlan(number=0, first_key=0, source=open_source(str(place / "lmdb")))
    recipe = Recipe(image_size=size, transform=case.transform, encoding=case.encoding)
    staging = place / "staging"
    staging.mkdir()
    return lambda: write_shard(plan, recipe, place, staging)


def encoded_images(count: int, shorter: int, folder: Path | None) -> list[bytes]:
    """JPEGs of quality 75 with a shorter side of `shorter` and LSUN's usual proportions; a few, repeated."""
    shape = (round(shorter * LSUN_ASPECT), shorter)
    if folder is None:
        pictures = [smooth_noise(shape, seed) for seed in range(8)]
    else:
        pictures = [Image.open(path).convert("RGB").resize(shape) for path in sorted(folder.iterdir())]
    return [jpeg(pictures[i % len(pictures)]) for i in range(count)]


def smooth_noise(shape: tuple[int, int], seed: int) -> Image.Image:
    """Noise blurred until a JPEG of it takes about as many bytes as a photo's."""
    pixels = np.random.default_rng(SEED + seed).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))


def jpeg(picture: Image.Image) -> bytes:
    """Its file."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=75)
    return stream.getvalue()


if __name__ == "__main__":
    main()
