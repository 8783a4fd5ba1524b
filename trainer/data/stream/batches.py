"""The work of a loader process, as stages of webdataset's pipeline: from planned micro-batches to samples and back.

A sample is a dictionary, as webdataset's: `__key__`, and its members by name, decoded: `image`, (H, W, C) uint8, and
what `dataset.cond` names. `position` and `id` are its place in the run and its number in the dataset. `faults` has a
message for each damaged sample that it stands for. The image lies in the memory of its micro-batch, `__memory__`.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.datasets.dataset import SECOND_IMAGES, Dataset
from trainer.data.orders.order import Order
from trainer.data.stream.batch_memory import BatchMemory, Slot, own_memory
from trainer.errors import DataError, SampleError

_MOST_REPLACEMENTS = 63
_APART = ("__memory__", "__key__", "image", "faults")  # what a sample's dictionary has besides members to be stacked

Planned = tuple[npt.ArrayLike, npt.ArrayLike]  # positions and ids of a micro-batch, (B,) integers each
Sample = dict[str, Any]


class ReadSamples:
    """The stage that reads, verifies and decodes the samples of planned micro-batches, in their order.

    For a damaged sample, or one without what `dataset.cond` names, SampleError is raised, with shard and member; or,
    with `replace_by`, it is replaced by the next undamaged sample of that order: the same one on any number of ranks
    and after any restart. memory: reusable, for the pixels; None for new memory each time.
    """

    def __init__(self, dataset: Dataset, *, replace_by: Order | None = None, memory: BatchMemory | None = None) -> None:
        self.dataset = dataset
        self.replace_by = replace_by
        self.memory = memory

    def __call__(self, planned: Iterable[Planned]) -> Iterator[Sample]:
        """Yield the samples of each micro-batch; see the module."""
        for positions, ids in planned:
            memory, pixels = self._take(len(np.asarray(positions)))
            for out, position, sample in zip(pixels, np.asarray(positions).tolist(), np.asarray(ids).tolist()):
                yield self._whole(memory, out, position, sample)

    def _take(self, samples: int) -> tuple[Slot | torch.Tensor, npt.NDArray[np.uint8]]:
        taken = self.memory.take() if self.memory is not None else None
        if taken is not None:
            return taken
        image = own_memory(pixels_shape(self.dataset, samples))
        return image, image.numpy()

    def _whole(self, memory: Slot | torch.Tensor, out: npt.NDArray[np.uint8], position: int, sample: int) -> Sample:
        """The planned sample, or the first undamaged one after it; its image is decoded to `out`."""
        faults: list[str] = []
        while True:
            try:
                self.dataset.decode_into(out, sample)
                further = self.dataset.further(sample)
            except SampleError as error:
                if self.replace_by is None:
                    raise
                if len(faults) == _MOST_REPLACEMENTS:
                    missing = f"nor is one of the {_MOST_REPLACEMENTS} whole that follow in the order"
                    raise DataError(f"{faults[0]}; {missing}") from error
                faults.append(str(error))
                sample = int(self.replace_by.ids([position + len(faults)])[0])
            else:
                return {
                    "__key__": self.dataset.key(sample),
                    "__memory__": memory,
                    "image": out,
                    "position": position,
                    "id": sample,
                    "faults": faults,
                    **further,
                }


def pixels_shape(dataset: Dataset, samples: int) -> tuple[int, int, int, int]:
    """Shape of the pixels of that many images, as decoders write them: (samples, H, W, C)."""
    return samples, dataset.image_size, dataset.image_size, dataset.channels


def batched(samples: Iterator[Sample], size: int) -> Iterator[dict[str, Any]]:
    """The stage that makes micro-batches of `size` samples each, see `collate`.

    webdataset's own reads one sample more before it hands a batch on, which would take memory for the next one.
    """
    for first in samples:
        yield collate([first, *itertools.islice(samples, size - 1)])


def collate(samples: list[Sample]) -> dict[str, Any]:
    """A micro-batch of its samples, to be completed by `as_tensors` in the trainer's process.

    Raises DataError where arrays or second images differ in shape.
    """
    faults = [fault for sample in samples for fault in sample["faults"]]
    return {**stacked(samples), "image": samples[0]["__memory__"], "faults": faults}


def stacked(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Members of several samples by name, as `as_tensors` takes them. Raises DataError where shapes differ."""
    names = [name for name in members[0] if name not in _APART]
    return {name: _stacked(name, [of_sample[name] for of_sample in members]) for name in names}


def _stacked(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], str):
        return values
    if not isinstance(values[0], np.ndarray):
        return np.array(values, dtype=np.int64)  # torch would take a file of its own in shared memory for each tensor
    shapes = sorted({value.shape for value in values})
    if len(shapes) > 1:
        raise DataError(f"data.cond = {name}: the samples of a batch have different shapes: {shapes[0]}, {shapes[1]}")
    return torch.from_numpy(np.stack(values))


def as_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch of `collate` as tensors: position, id, label: (B,) int64; image, low_res, source: (B, C, h, w)
    uint8, in memory (B, h, w, C), as decoders write them; array: (B, ...); caption: a list of strings; faults:
    messages, one for each damaged sample that was skipped.
    """
    found = {name: value.tensor() if isinstance(value, Slot) else value for name, value in batch.items()}
    arrays = {name: torch.from_numpy(value) for name, value in found.items() if isinstance(value, np.ndarray)}
    images = {name: found[name].permute(0, 3, 1, 2) for name in ("image", *SECOND_IMAGES) if name in found}
    return {**found, **arrays, **images}


def read_batch(dataset: Dataset, planned: Planned, *, replace_by: Order | None = None) -> dict[str, Any]:
    """One micro-batch, read in this process; returns and raises what the stages do."""
    return as_tensors(collate(list(ReadSamples(dataset, replace_by=replace_by)([planned]))))
