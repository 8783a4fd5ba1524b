"""Preparing a dataset: data_prep beside the bare loop of decode -> transform -> encode, in turns within one run.

    python benchmarks/prepare.py [--images 600] [--size 256] [--folder PHOTOS] [--rounds 7] [--json FILE]

Each case takes the same encoded images, each side in a process of its own and in turns (turns.py). The bare loop is
what anybody would write: Pillow's calls and nothing checked; "codec" throws the result away and "stored" appends it to
one file, which somebody must. data_prep's side is `write_shard`: reading from an LMDB, every check, the transform, the
tar with its index, hashes and fsync. Seconds are CPU time, the kernel's included.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import lmdb
import numpy as np
from PIL import Image, ImageFilter

from benchmarks.turns import Contender, Result, Run, compare, load
from data_prep.recipe import Encoding, Recipe, Transform
from data_prep.sources import open_source
from data_prep.write.convert import SAVE_OPTIONS
from data_prep.write.memory import keep_freed_memory
from data_prep.write.writer import ShardPlan, write_shard

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
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/prepare.json"))
    options = parser.parse_args()
    results = {case.name: measure(case, options) for case in CASES}
    print(f"images per second of CPU time; {load()}")
    print(f"{'':34}{'codec':>8}{'stored':>8}{'data_prep':>11}{'/ codec':>9}{'':16}{'by the clock':>13}")
    for name, (codec, stored, ours) in results.items():
        rates = f"{codec.per_cpu_second:8.0f}{stored.per_cpu_second:8.0f}{ours.per_cpu_second:11.0f}"
        spread = f"  {ours.lowest_ratio:.2f} to {ours.highest_ratio:.2f}"
        print(f"{name:34}{rates}{ours.ratio:9.2f}{spread:16}{ours.per_second:13.0f}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"case": name, **asdict(result)} for name, found in results.items() for result in found]
    options.json.write_text(json.dumps({"about": load(), "rows": rows}, indent=1) + "\n")


def measure(case: Case, options: argparse.Namespace) -> list[Result]:
    """The two bare loops and data_prep."""
    files = encoded_images(max(1, round(options.images * case.share)), options.size * case.scale, options.folder)
    with tempfile.TemporaryDirectory() as place:
        sides = {
            "codec": Contender(make=bare_loop, arguments=(files, case, options.size, Path(os.devnull))),
            "stored": Contender(make=bare_loop, arguments=(files, case, options.size, Path(place) / "bare")),
            "data_prep": Contender(make=shard_writer, arguments=(files, case, options.size, Path(place))),
        }
        return compare(sides, reference="codec", rounds=options.rounds)


def bare_loop(files: Sequence[bytes], case: Case, size: int, path: Path) -> Run:
    """What anybody would write."""

    def run() -> int:
        bare(files, case, size, path)
        return len(files)

    return run


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


def shard_writer(files: Sequence[bytes], case: Case, size: int, place: Path) -> Run:
    """data_prep's writing of one shard, from an LMDB of these files, in a process that is set up as its workers are."""
    keep_freed_memory()
    room = 2 * sum(map(len, files)) + 2**26
    with lmdb.open(str(place / "lmdb"), map_size=room) as database, database.begin(write=True) as transaction:
        for number, data in enumerate(files):
            transaction.put(hashlib.sha1(b"%d" % number).hexdigest().encode(), data)
    plan = ShardPlan(number=0, first_key=0, source=open_source(str(place / "lmdb")), members={})
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
