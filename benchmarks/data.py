"""The stream beside bare decoding, webdataset's own pipeline and a torch image folder; and a large index.

    python benchmarks/data.py [--images 2000] [--size 256] [--rounds 7] [--workers 1] [--kinds "jpeg 75 4:2:0" ...]

The same images, made on the spot, as JPEG (quality 75, 4:2:0: like LSUN), as JPEG 95 4:4:4 and as lossless WebP, each
contender in a process of its own and in turns (turns.py). What counts are images per second of CPU time, the loader
processes' included: per core, and other programs on the machine do not matter much; by the clock stands beside it.
Then an index of 3,033,042 samples (LSUN bedroom): time and memory to open it, and time to the first batch's ids at any
position.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import io
import json
import platform
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from benchmarks.turns import Contender, Run, compare, load
from data_prep.format import INDEX_DTYPE, Manifest, ShardRecord, sha256_of
from trainer.data import decode as decode_module
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.decode import decode
from trainer.data.orders.lanes import LanesOrder
from trainer.data.orders.order import GlobalOrder, Order
from trainer.data.orders.windowed import WindowedOrder
from trainer.data.stream.stream import BatchLayout, MicroBatchPlan, micro_batches

BATCH = 64
SHARD = 500
LSUN_BEDROOM = 3_033_042
KINDS: dict[str, dict[str, Any]] = {
    "jpeg 75 4:2:0": {"format": "JPEG", "quality": 75},
    "jpeg 95 4:4:4": {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
    "webp lossless": {"format": "WEBP", "lossless": True, "method": 0, "quality": 0},
}
EXTENSIONS = {"JPEG": "jpg", "WEBP": "webp"}


def pictures(count: int, size: int) -> Iterable[Image.Image]:
    """Smooth colours with edges and a little noise: about as hard to decode as photos."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
        yield Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_dataset(folder: Path, images: list[bytes], size: int, extension: str, mode: str = "RGB") -> None:
    """A dataset in data_prep's format, written by webdataset, so that both read the same files."""
    folder.mkdir()
    index = np.zeros(len(images), INDEX_DTYPE)
    records = []
    for first in range(0, len(images), SHARD):
        path = folder / f"shard-{first // SHARD:06d}.tar"
        part = images[first : first + SHARD]
        with wds.TarWriter(str(path), mtime=0) as writer:
            for key, encoded in enumerate(part, start=first):
                writer.write({"__key__": f"{key:09d}", extension: encoded})
        records.append(
            ShardRecord(name=path.name, samples=len(part), bytes=path.stat().st_size, sha256=sha256_of(path))
        )
        offset = 0
        for key, encoded in enumerate(part, start=first):
            index[key] = (first // SHARD, offset + 512, len(encoded), zlib.crc32(encoded), -1, key)
            offset += 512 + -(-len(encoded) // 512) * 512
    write_manifest(folder, index, records, size, mode)


def write_manifest(folder: Path, index: np.ndarray, records: list[ShardRecord], size: int, mode: str = "RGB") -> None:
    """What a reader needs besides the shards."""
    np.save(folder / "index.npy", index)
    manifest = Manifest(
        image_size=size,
        mode=mode,
        encoding="source",
        transform="source",
        samples=len(index),
        rejected=0,
        classes=[],
        source={},
        shards=records,
        index_sha256=sha256_of(folder / "index.npy"),
        names_sha256="0" * 64,
    )
    (folder / "manifest.json").write_text(manifest.to_json())


class ImageFolder(TorchDataset[torch.Tensor]):
    """The loader that most people start with: one file an image, Pillow."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.paths[number]) as image:
            pixels = np.asarray(image.convert("RGB"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def bare_decode(folder: Path, size: int) -> Run:
    """Bytes in memory to pixels that nobody keeps, by the decoder that the stream uses."""
    images = encoded_images(folder)
    return lambda: sum(decode(encoded, size, "RGB", crop=True).ndim == 3 for encoded in images)


def bare_pillow(folder: Path, _: int) -> Run:
    """The same by Pillow, without any check."""
    images = encoded_images(folder)
    return lambda: sum(np.asarray(Image.open(io.BytesIO(encoded))).ndim == 3 for encoded in images)


def our_stream(folder: Path, _: int, workers: int) -> Run:
    """Reading, crc32, decoding, batches, the order."""
    torch.set_num_threads(1)
    dataset = ShardedDataset(folder / "shards")
    layout = BatchLayout.plan(BATCH, 1, None)

    def run() -> int:
        plan = MicroBatchPlan(
            layout, order=GlobalOrder(len(dataset), 0), rank=0, first_step=0, last_step=len(dataset) // BATCH
        )
        stream = micro_batches(dataset, plan, workers=workers, prefetch=4, pin_memory=False)
        return sum(len(batch["image"]) for batch in stream)

    return run


def plain_webdataset(folder: Path, _: int, workers: int) -> Run:
    """`.decode("pil")` as its documentation has it; no shuffling."""
    torch.set_num_threads(1)
    urls = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    extension = sorted((folder / "files").iterdir())[0].suffix[1:]

    def run() -> int:
        pipeline = (
            wds.WebDataset(urls, shardshuffle=False, empty_check=False)
            .decode("pil")
            .to_tuple(extension)
            .map(_pixels_of_fields)
            .batched(BATCH, collation_fn=_stacked)
        )
        return sum(len(batch) for batch in wds.WebLoader(pipeline, batch_size=None, num_workers=workers))

    return run


def _pixels_of_fields(fields: tuple[Image.Image]) -> np.ndarray:
    return np.asarray(fields[0].convert("RGB"))


def _stacked(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))


def image_folder(folder: Path, _: int, workers: int) -> Run:
    """A file an image, shuffled."""
    torch.set_num_threads(1)
    dataset = ImageFolder(sorted((folder / "files").iterdir()))
    return lambda: sum(len(batch) for batch in DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers))


def encoded_images(folder: Path) -> list[bytes]:
    """All files of the benchmark."""
    return [path.read_bytes() for path in sorted((folder / "files").iterdir())]


def contenders(folder: Path, size: int, workers: int) -> dict[str, Contender]:
    """Each goes once through all images."""
    found = {
        "bare decode": Contender(make=bare_decode, arguments=(folder, size)),
        "bare Pillow": Contender(make=bare_pillow, arguments=(folder, size)),
    }
    makers: dict[str, Callable[..., Run]] = {
        "ours": our_stream,
        "webdataset": plain_webdataset,
        "image folder": image_folder,
    }
    for loaders in dict.fromkeys([0, workers]):
        for name, make in makers.items():
            label = f"{name}, {loaders} loader{'s' * (loaders > 1)}" if loaders else name
            found[label] = Contender(make=make, arguments=(folder, size, loaders))
    return found


def measure_kind(kind: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rates of all contenders for one encoding."""
    options = KINDS[kind]
    images = []
    for picture in tqdm(pictures(arguments.images, arguments.size), kind, arguments.images, disable=None, leave=False):
        stream = io.BytesIO()
        picture.save(stream, **options)
        images.append(stream.getvalue())
    extension = EXTENSIONS[options["format"]]
    write_dataset(folder / "shards", images, arguments.size, extension)
    (folder / "files").mkdir()
    for number, encoded in enumerate(images):
        (folder / "files" / f"{number:06d}.{extension}").write_bytes(encoded)
    results = compare(
        contenders(folder, arguments.size, arguments.workers), reference="bare decode", rounds=arguments.rounds
    )
    kib = sum(map(len, images)) / len(images) / 1024
    return [{"kind": kind, "KiB": kib, **asdict(result)} for result in results]


def open_large_index(folder: str) -> None:
    """In a process of its own: open the index, go to any position, and print what that cost."""
    private = private_bytes()
    started = time.perf_counter()
    dataset = ShardedDataset(Path(folder), origin="file://nowhere")
    opened = time.perf_counter() - started
    sizes = [shard.samples for shard in dataset.shards]
    makers: dict[str, Callable[[], Order]] = {
        "global": lambda: GlobalOrder(len(dataset), 1),
        "windowed": lambda: WindowedOrder(sizes, window=16, seed=1),
        "lanes": lambda: LanesOrder(sizes, lanes=64, global_batch=512, window=16, seed=1),
    }
    resumed = {}
    for name, make in makers.items():
        started = time.perf_counter()
        make().ids(np.arange(10**10, 10**10 + 512))
        resumed[name] = time.perf_counter() - started
    [dataset.index[sample] for sample in range(0, len(dataset), 500)]
    report = {"seconds_to_open": opened, "seconds_to_resume": resumed, "private_bytes": private_bytes() - private}
    print(json.dumps(report))


def private_bytes() -> int:
    """Memory of this process alone: not the index's pages, which all processes of a node share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return 1024 * int(fields["Anonymous"])


def measure_index(folder: Path, samples: int) -> dict[str, Any]:
    """A synthetic index of LSUN bedroom's size; the shards themselves are not there."""
    folder.mkdir()
    index = np.zeros(samples, INDEX_DTYPE)
    index["shard"] = np.arange(samples) // 4096
    index["key"] = np.arange(samples)
    counts = np.bincount(index["shard"]).tolist()
    digests = [f"{number:064x}" for number in range(len(counts))]
    records = [
        ShardRecord(name=f"shard-{n:06d}.tar", samples=count, bytes=1, sha256=digest)
        for n, (count, digest) in enumerate(zip(counts, digests))
    ]
    write_manifest(folder, index, records, 256)
    command = [sys.executable, __file__, "--open-index", str(folder)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of the contenders that have some")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/data.json"))
    parser.add_argument("--open-index", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open_index:
        open_large_index(arguments.open_index)
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows = []
        for number, kind in enumerate(arguments.kinds):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            rows += measure_kind(kind, arguments, folder)
        large = measure_index(Path(temporary) / "large", LSUN_BEDROOM)
    fast = "simplejpeg" if decode_module.simplejpeg is not None else "Pillow (simplejpeg is not installed)"
    about = f"{platform.processor() or platform.machine()}, {load()}, JPEGs by {fast}"
    print_tables(rows, large, f"{arguments.images} images of {arguments.size}²; {about}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "arguments": vars(arguments), "rows": rows, "index": large}
    arguments.json.write_text(json.dumps(content, default=str, indent=1) + "\n")


def print_tables(rows: list[dict[str, Any]], large: dict[str, Any], about: str) -> None:
    """For a person; "of bare" is the ratio that counts, with the lowest and the highest of all rounds."""
    print(about)
    print(f"{'':<16}{'':<24}{'KiB':>5}{'img/CPU s':>11}{'img/s':>8}{'of bare':>9}")
    for row in rows:
        rates = f"{row['per_cpu_second']:>11,.0f}{row['per_second']:>8,.0f}{row['ratio']:>9.2f}"
        spread = f"  {row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f}"
        print(f"{row['kind']:<16}{row['name']:<24}{row['KiB']:>5.0f}{rates}{spread}")
    resumed = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in large["seconds_to_resume"].items())
    memory = f"{large['private_bytes'] / 1e6:.0f} MB a process"
    print(f"index of {LSUN_BEDROOM:,}: opened in {large['seconds_to_open']:.2f} s, {memory}; resumed after: {resumed}")


if __name__ == "__main__":
    main()
