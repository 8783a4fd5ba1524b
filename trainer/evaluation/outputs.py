"""Output formats for samples: single files, one array as for ADM's evaluator, or WebDataset shards."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import webdataset as wds
from einops import rearrange
from numpy.lib import format as npy_format
from PIL import Image

from trainer.engine.processes.collectives import together
from trainer.evaluation.work import Work
from trainer.telemetry.files import write_whole
from trainer.telemetry.pictures import Pixels, grid, save_png

OutputFormat = Literal["folder", "npz", "tar"]
NPZ_NAME = "samples.npz"
SHARD_SAMPLES = 2048
_LARGEST_GRID = 64

Labels = Callable[[range], list[int]]
"""The classes of the samples with these numbers."""


class Output(Protocol):
    """Batches are written by any rank, in any order; `finish` makes the final files of them."""

    def missing(self, batches: list[range]) -> list[range]:
        """This rank's share of the missing batches. Collective."""

    def write(self, numbers: range, images: Pixels) -> None:
        """Store a batch, (B, C, H, W) uint8."""

    def finish(self, batches: list[range]) -> None:
        """Combine all batches. Collective."""


def make_output(kind: OutputFormat, work: Work, labels: Labels | None) -> Output:
    """The output format `kind`, in the work's folder; labels: which are written beside the samples, None for none."""
    kinds: dict[OutputFormat, type[FolderOutput] | type[NpzOutput] | type[TarOutput]]
    kinds = {"folder": FolderOutput, "npz": NpzOutput, "tar": TarOutput}
    return kinds[kind](work, labels)


class FolderOutput:
    """FOLDER/000000.png, ... and grid.png, a picture of the first 64; labels.json, a list, where there are labels."""

    def __init__(self, work: Work, labels: Labels | None = None) -> None:
        self.work = work
        self.labels = labels

    def missing(self, batches: list[range]) -> list[range]:
        """This rank's share of the batches with missing files. Collective."""
        return self.work.missing(batches, lambda numbers: all(self._path(number).exists() for number in numbers))

    def write(self, numbers: range, images: Pixels) -> None:
        """Write one PNG file per image."""
        for number, image in zip(numbers, images, strict=True):
            save_png(self._path(number), rearrange(image, "c h w -> h w c"))

    def finish(self, batches: list[range]) -> None:
        """Write grid.png and labels.json on rank 0. Collective."""

        def write_grid() -> None:
            if self.labels is not None:
                write_whole(self.work.folder / "labels.json", json.dumps(self.labels(range(batches[-1].stop))) + "\n")
            images = []
            for number in range(min(batches[-1].stop, _LARGEST_GRID)):
                with Image.open(self._path(number)) as image:
                    images.append(np.atleast_3d(np.asarray(image)))
            save_png(self.work.folder / "grid.png", grid(rearrange(np.stack(images), "n h w c -> n c h w")))

        together(f"{self.work.folder}: cannot be written", write_grid, only_rank=0)

    def _path(self, number: int) -> Path:
        return self.work.folder / f"{number:06d}.png"


class NpzOutput:
    """FOLDER/samples.npz with an array "arr_0", (N, H, W, 3) uint8: as read by ADM's evaluator.py; where there are
    labels they are "arr_1", (N,) int64, as ADM's programs have them.
    """

    def __init__(self, work: Work, labels: Labels | None = None) -> None:
        self.work = work
        self.labels = labels
        self.path = work.folder / NPZ_NAME

    def missing(self, batches: list[range]) -> list[range]:
        """This rank's share of the missing batches. Collective."""
        return [] if _is_finished(self.path) else self.work.missing(batches)

    def write(self, numbers: range, images: Pixels) -> None:
        """Store a batch as a part."""
        self.work.save(numbers, {"images": images})

    def finish(self, batches: list[range]) -> None:
        """Combine the parts on rank 0, batch by batch, since the whole array may exceed the memory. Collective."""

        def assemble() -> None:
            fresh = self.path.with_suffix(".tmp")
            count = batches[-1].stop
            with zipfile.ZipFile(fresh, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    for first, images in _in_order(self.work, batches):
                        if first == 0:
                            shape = (count, *images.shape[2:], 3)
                            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                            npy_format.write_array_header_1_0(member, header)
                        colour = np.broadcast_to(images, (len(images), 3, *images.shape[2:]))
                        member.write(rearrange(colour, "n c h w -> n h w c").tobytes())
                if self.labels is not None:
                    with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                        npy_format.write_array(member, np.array(self.labels(range(count)), dtype=np.int64))
            fresh.replace(self.path)

        if not _is_finished(self.path):
            together(f"{self.path}: cannot be written", assemble, only_rank=0)
        self.work.discard_parts()


class TarOutput:
    """FOLDER/samples-000000.tar, ...: PNG images in WebDataset shards of 2,048; a sample's key is its index, its label,
    if it has one, the member "cls".
    """

    def __init__(self, work: Work, labels: Labels | None = None) -> None:
        self.work = work
        self.labels = labels
        self.done = work.folder / "samples-complete"

    def missing(self, batches: list[range]) -> list[range]:
        """This rank's share of the missing batches. Collective."""
        return [] if _is_finished(self.done) else self.work.missing(batches)

    def write(self, numbers: range, images: Pixels) -> None:
        """Store a batch as a part."""
        self.work.save(numbers, {"images": images})

    def finish(self, batches: list[range]) -> None:
        """Write the shards, divided among the ranks. Collective."""
        accelerator = self.work.accelerator
        shards = range(0, batches[-1].stop, SHARD_SAMPLES)

        def assemble() -> None:
            for first in shards[accelerator.process_index :: accelerator.num_processes]:
                self._write_shard(range(first, min(first + SHARD_SAMPLES, batches[-1].stop)), batches)

        if not _is_finished(self.done):
            together(f"{self.work.folder}: a shard cannot be written", assemble)
            together(f"{self.done}: cannot be written", self.done.touch, only_rank=0)
        self.work.discard_parts()

    def _write_shard(self, numbers: range, batches: list[range]) -> None:
        path = self.work.folder / f"samples-{numbers.start // SHARD_SAMPLES:06d}.tar"
        fresh = path.with_suffix(".tmp")
        overlapping = [batch for batch in batches if batch.start < numbers.stop and batch.stop > numbers.start]
        with wds.TarWriter(str(fresh), mtime=0, encoder=False) as shard:
            for first, images in _in_order(self.work, overlapping):
                for number, image in enumerate(images, start=first):
                    if number in numbers:
                        sample = {"__key__": f"{number:09d}", "png": _as_png(image)}
                        if self.labels is not None:
                            sample["cls"] = str(*self.labels(range(number, number + 1))).encode()
                        shard.write(sample)
        fresh.replace(path)


def _is_finished(marker: Path) -> bool:
    """Whether the marker exists, as rank 0 sees it, on all ranks."""
    return together(f"{marker}: cannot be read", marker.exists, only_rank=0)[0]


def _in_order(work: Work, batches: list[range]) -> Iterator[tuple[int, Pixels]]:
    for numbers in batches:
        yield numbers.start, work.load(numbers)["images"]


def _as_png(image: Pixels) -> bytes:
    stream = io.BytesIO()
    pixels = rearrange(image, "c h w -> h w c")
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(stream, format="png")
    return stream.getvalue()
