"""Output formats for samples: single files, one array as for ADM's evaluator, or WebDataset shards."""

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import webdataset as wds
from einops import rearrange
from numpy.lib import format as npy_format
from PIL import Image
from typing_extensions import override

from trainer.data.images import Pixels
from trainer.drawing.work import Work
from trainer.engine.processes.collectives import together
from trainer.telemetry.files import write_whole
from trainer.telemetry.pictures import as_png, grid, save_png

OutputFormat = Literal["folder", "npz", "tar"]
SHARD_SAMPLES = 2048
_LARGEST_GRID = 64

Labels = Callable[[range], list[int]]
"""The classes of the samples with these numbers."""


class Output(ABC):
    """Batches are written by any rank, in any order, as parts; `finish` makes the final files of them, which are
    complete where `marker` exists.

    labels: which are written beside the samples, None for none.
    """

    def __init__(self, work: Work, labels: Labels | None, marker: str) -> None:
        self.work = work
        self.labels = labels
        self.marker = work.folder / marker

    def missing(self, batches: list[range]) -> list[range]:
        """This rank's share of the missing batches. Collective."""
        return [] if self._is_complete() else self.work.missing(batches)

    def write(self, numbers: range, images: Pixels) -> None:
        """Store a batch, (B, C, H, W) uint8."""
        self.work.save(numbers, {"images": images})

    def finish(self, batches: list[range]) -> None:
        """Combine all batches, and discard the parts. Collective."""
        if not self._is_complete():
            self._combine(batches)
        self.work.discard_parts()

    @abstractmethod
    def _combine(self, batches: list[range]) -> None:
        """Make the final files. Collective."""

    def _is_complete(self) -> bool:
        """As rank 0 sees it, on all ranks."""
        return together(f"{self.marker}: cannot be read", self.marker.exists, only_rank=0)[0]

    def _parts(self, batches: list[range]) -> Iterator[tuple[int, Pixels]]:
        """Number of the first image of each part, and the part."""
        for numbers in batches:
            yield numbers.start, self.work.load(numbers)["images"]


class FolderOutput(Output):
    """FOLDER/000000.png, ... and grid.png, a picture of the first 64; labels.json, a list, where there are labels.
    Without parts: more images may be added later.
    """

    def __init__(self, work: Work, labels: Labels | None = None) -> None:
        super().__init__(work, labels, "grid.png")

    @override
    def missing(self, batches: list[range]) -> list[range]:
        return self.work.missing(batches, lambda numbers: all(self._path(number).exists() for number in numbers))

    @override
    def write(self, numbers: range, images: Pixels) -> None:
        for number, image in zip(numbers, images, strict=True):
            save_png(self._path(number), rearrange(image, "c h w -> h w c"))

    @override
    def finish(self, batches: list[range]) -> None:
        self._combine(batches)

    @override
    def _combine(self, batches: list[range]) -> None:
        def write_grid() -> None:
            if self.labels is not None:
                write_whole(self.work.folder / "labels.json", json.dumps(self.labels(range(batches[-1].stop))) + "\n")
            images = []
            for number in range(min(batches[-1].stop, _LARGEST_GRID)):
                with Image.open(self._path(number)) as image:
                    images.append(np.atleast_3d(np.asarray(image)))
            save_png(self.marker, grid(rearrange(np.stack(images), "n h w c -> n c h w")))

        together(f"{self.work.folder}: cannot be written", write_grid, only_rank=0)

    def _path(self, number: int) -> Path:
        return self.work.folder / f"{number:06d}.png"


class NpzOutput(Output):
    """FOLDER/samples.npz with an array "arr_0", (N, H, W, 3) uint8: as read by ADM's evaluator.py; where there are
    labels they are "arr_1", (N,) int64, as ADM's programs have them.
    """

    def __init__(self, work: Work, labels: Labels | None = None) -> None:
        super().__init__(work, labels, "samples.npz")

    @override
    def _combine(self, batches: list[range]) -> None:
        """On rank 0, batch by batch, since the whole array may exceed the memory."""

        def assemble() -> None:
            fresh = self.marker.with_suffix(".tmp")
            count = batches[-1].stop
            with zipfile.ZipFile(fresh, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    for first, images in self._parts(batches):
                        if first == 0:
                            shape = (count, *images.shape[2:], 3)
                            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                            npy_format.write_array_header_1_0(member, header)
                        colour = np.broadcast_to(images, (len(images), 3, *images.shape[2:]))
                        member.write(rearrange(colour, "n c h w -> n h w c").tobytes())
                if self.labels is not None:
                    with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                        npy_format.write_array(member, np.array(self.labels(range(count)), dtype=np.int64))
            fresh.replace(self.marker)

        together(f"{self.marker}: cannot be written", assemble, only_rank=0)


class TarOutput(Output):
    """FOLDER/samples-000000.tar, ...: PNG images in WebDataset shards of 2,048; a sample's key is its index, its label,
    if it has one, the member "cls".
    """

    def __init__(self, work: Work, labels: Labels | None = None) -> None:
        super().__init__(work, labels, "samples-complete")

    @override
    def _combine(self, batches: list[range]) -> None:
        """The ranks divide the shards."""
        accelerator = self.work.accelerator
        shards = range(0, batches[-1].stop, SHARD_SAMPLES)

        def assemble() -> None:
            for first in shards[accelerator.process_index :: accelerator.num_processes]:
                self._write_shard(range(first, min(first + SHARD_SAMPLES, batches[-1].stop)), batches)

        together(f"{self.work.folder}: a shard cannot be written", assemble)
        together(f"{self.marker}: cannot be written", self.marker.touch, only_rank=0)

    def _write_shard(self, numbers: range, batches: list[range]) -> None:
        path = self.work.folder / f"samples-{numbers.start // SHARD_SAMPLES:06d}.tar"
        fresh = path.with_suffix(".tmp")
        overlapping = [batch for batch in batches if batch.start < numbers.stop and batch.stop > numbers.start]
        with wds.TarWriter(str(fresh), mtime=0, encoder=False) as shard:
            for first, images in self._parts(overlapping):
                for number, image in enumerate(images, start=first):
                    if number in numbers:
                        sample = {"__key__": f"{number:09d}", "png": as_png(rearrange(image, "c h w -> h w c"))}
                        if self.labels is not None:
                            sample["cls"] = str(*self.labels(range(number, number + 1))).encode()
                        shard.write(sample)
        fresh.replace(path)


OUTPUTS: dict[OutputFormat, type[FolderOutput] | type[NpzOutput] | type[TarOutput]] = {
    "folder": FolderOutput,
    "npz": NpzOutput,
    "tar": TarOutput,
}
