"""The stream beside bare decoding, webdataset's own pipeline and a torch image folder; and what three million samples cost.

    python benchmarks/data.py [--images 2000] [--size 256] [--rounds 3] [--workers 0]

The same images, made on the spot, as JPEG (quality 75, 4:2:0: like LSUN), as JPEG 95 4:4:4 and as lossless WebP, each in turns within one
run. A rate is images per second of CPU time of this process (`--workers 0`), or of wall time with loader processes. Then an index
of 3,033,042 samples (LSUN bedroom): time and memory to open it, and time to the first batch's plan at any position.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
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

from data_prep.format import INDEX_DTYPE, Manifest, ShardRecord, sha256_of
from trainer.data import decode as decode_module
from trainer.data.decode import decode
from trainer.data.lanes import LanesOrder
from trainer.data.order import GlobalOrder, Order
from trainer.data.shards import ShardedDataset
from trainer.data.stream import BatchLayout, MicroBatchPlan, micro_batches
from trainer.data.windowed import WindowedOrder

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


def write_dataset(folder: Path, images: list[bytes], size: int, extension: str) -> None:
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
        records.append(ShardRecord(name=path.name, samples=len(part), bytes=path.stat().st_size, sha256=sha256_of(path)))
        offset = 0
        for key, encoded in enumerate(part, start=first):
            index[key] = (first // SHARD, offset + 512, len(encoded), zlib_crc32(encoded), -1, key)
            offset += 512 + -(-len(encoded) // 512) * 512
    write_manifest(folder, index, records, size)


def write_manifest(folder: Path, index: np.ndarray, records: list[ShardRecord], size: int) -> None:
    """What a reader needs besides the shards."""
    np.save(folder / "index.npy", index)
    manifest = Manifest(
        image_size=size,
        mode="RGB",
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
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
