"""The work of a loader process: from positions and ids to micro-batches of pixels."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.datasets.dataset import Dataset
from trainer.data.orders.order import Order
from trainer.data.stream.batch_memory import BatchMemory, Slot, own_memory
from trainer.errors import DataError, SampleError

_MOST_REPLACEMENTS = 63

Planned = tuple[npt.ArrayLike, npt.ArrayLike]  # positions and ids of a micro-batch, (B,) integers each


class ReadAndDecode:
    """A map from positions and ids to a micro-batch.

    For a damaged sample SampleError is raised, with shard and member; or, with `replace_by`, it is replaced by the next
    undamaged sample of that order: the same one on any number of ranks and after any restart.
    """

    def __init__(self, dataset: Dataset, *, replace_by: Order | None = None) -> None:
        self.dataset = dataset
        self.replace_by = replace_by

    def __call__(self, planned: Planned) -> dict[str, Any]:
        """positions, ids: (B,) integers. Returns position, id, label: (B,) int64; image: (B, C, H, W) uint8, in memory
        (B, H, W, C), as decoders write it; faults: messages, one for each damaged sample that was skipped.
        """
        image = own_memory(self.shape(len(np.asarray(planned[0]))))
        return as_tensors({**self.into(image.numpy(), planned), "image": image})

    def shape(self, samples: int) -> tuple[int, int, int, int]:
        """Shape of the pixels of that many images, as decoders write them: (samples, H, W, C)."""
        return samples, self.dataset.image_size, self.dataset.image_size, self.dataset.channels

    def into(self, pixels: npt.NDArray[np.uint8], planned: Planned) -> dict[str, Any]:
        """Decode into `pixels`, (B, H, W, C) uint8, contiguous. Returns the other fields, as arrays."""
        positions, ids = (np.array(values, dtype=np.int64) for values in planned)
        faults: list[str] = []
        for slot, (position, sample) in enumerate(zip(positions.tolist(), ids.tolist())):
            try:
                self.dataset.decode_into(pixels[slot], sample)
            except SampleError as error:
                if self.replace_by is None:
                    raise
                faults.append(str(error))
                ids[slot] = self._decode_later(pixels[slot], position, self.replace_by, faults)
        return {"position": positions, "id": ids, "label": self.dataset.labels(ids), "faults": faults}

    def _decode_later(self, out: npt.NDArray[np.uint8], position: int, order: Order, faults: list[str]) -> int:
        """Decode the first undamaged sample after the damaged one, which the last of `faults` describes. Returns the
        id.
        """
        damaged = faults[-1]
        for later in range(1, _MOST_REPLACEMENTS + 1):
            sample = int(order.ids([position + later])[0])
            try:
                self.dataset.decode_into(out, sample)
            except SampleError as error:
                faults.append(str(error))
            else:
                return sample
        raise DataError(f"{damaged}; nor is one of the {_MOST_REPLACEMENTS} whole that follow in the order")


class FillSlots:
    """`ReadAndDecode` into reusable memory: batches are sent to the trainer as arrays and slots."""

    def __init__(self, decode: ReadAndDecode, memory: BatchMemory) -> None:
        self.decode = decode
        self.memory = memory

    def __call__(self, planned: Planned) -> dict[str, Any]:
        """A batch to be completed by `as_tensors`."""
        taken = self.memory.take()
        if taken is None:
            image = own_memory(self.memory.shape)
            return {**self.decode.into(image.numpy(), planned), "image": image}
        slot, pixels = taken
        return {**self.decode.into(pixels, planned), "image": slot}


def as_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as returned by `ReadAndDecode`, from arrays and a slot or a tensor of (B, H, W, C)."""
    image = batch["image"]
    image = image.tensor() if isinstance(image, Slot) else image
    small = {name: torch.from_numpy(batch[name]) for name in ("position", "id", "label")}
    return {**small, "image": image.permute(0, 3, 1, 2), "faults": batch["faults"]}
