"""Several datasets as one, with a common numbering of samples and shards."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.datasets.dataset import Dataset
from trainer.data.datasets.indexed import IndexedDataset


class JoinedDatasets(Dataset):
    """Samples of dataset k begin at `id_starts[k]`."""

    def __init__(self, datasets: Sequence[IndexedDataset]) -> None:
        self.datasets = list(datasets)
        self.where = " + ".join(dataset.where for dataset in datasets)
        self.shards = [shard for dataset in datasets for shard in dataset.shards]
        self.id_starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        self.bounds = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self.image_size = datasets[0].image_size
        self.cond = datasets[0].cond
        fingerprints = [dataset.fingerprint for dataset in datasets]
        self.fingerprint = hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self.id_starts[-1])

    @property
    def channels(self) -> int:
        """Number of channels, the same for all datasets."""
        return self.datasets[0].channels

    def decode_into(self, out: npt.NDArray[np.uint8], sample: int) -> None:
        """Decode an image to `out` by the dataset that holds it."""
        dataset, own = self._find(sample)
        dataset.decode_into(out, own)

    def further(self, sample: int) -> dict[str, Any]:
        """What `cond` names, by the dataset that holds the sample; labels are that dataset's own numbers."""
        dataset, own = self._find(sample)
        return dataset.further(own)

    def key(self, sample: int) -> str:
        """Key of a sample in its tar."""
        dataset, own = self._find(sample)
        return dataset.key(own)

    def describe(self, sample: int) -> str:
        """Location of a sample, for messages."""
        dataset, own = self._find(sample)
        return dataset.describe(own)

    def close(self) -> None:
        """Close the files of all datasets."""
        for dataset in self.datasets:
            dataset.close()

    def _find(self, sample: int) -> tuple[IndexedDataset, int]:
        number = int(np.searchsorted(self.id_starts, sample, side="right")) - 1
        return self.datasets[number], sample - int(self.id_starts[number])
