"""Real images for evaluation: from the run's dataset, other shards, or image files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from trainer.config import Config, ModelConfig
from trainer.data.datasets.dataset import Dataset
from trainer.data.images import from_uint8, read_images
from trainer.data.orders.order import sample_ids
from trainer.data.training_data import open_training_data
from trainer.errors import ConfigError, DataError


class RealImages:
    """`count` images of a dataset, or all: a random subset without repetition, the same one every time."""

    def __init__(self, dataset: Dataset, ids: npt.NDArray[np.int64], count: int | None) -> None:
        if count is not None and count > len(ids):
            raise ConfigError(f"--images {count}: there are {len(ids)} in {dataset.where}")
        self.dataset = dataset
        self.count = count or len(ids)
        self._ids = ids

    def ids(self, numbers: range) -> list[int]:
        """Sample ids of the images with these indices, 0..count-1."""
        places = sample_ids(np.arange(numbers.start, numbers.stop), len(self._ids), seed=0)
        return [int(sample) for sample in self._ids[places]]

    def load(self, numbers: range) -> torch.Tensor:
        """(B, C, H, W) float32 in [-1, 1]. Raises DataError with the name of a damaged image."""
        return from_uint8(self.pixels(numbers))

    def cond(self, numbers: range) -> dict[str, torch.Tensor]:
        """What a network takes of these images that is conditioned on them: label, (B,) int64, where it was opened."""
        if "label" not in self.dataset.cond:
            return {}
        return {"label": torch.tensor([self.dataset.further(sample)["label"] for sample in self.ids(numbers)])}

    def pixels(self, numbers: range) -> torch.Tensor:
        """(B, C, H, W) uint8; errors as `load`."""
        return read_images(self.dataset, self.ids(numbers))[0]


def open_images(
    config: Config, folder: Path | None, *, held_out: bool, count: int | None, cond: Sequence[str] = ()
) -> RealImages:
    """Images from `folder`, or (None) from the run's training dataset.

    held_out: only those excluded from training by the run's data.holdout; cond: what is read with them, as by
    `data.cond`. Raises ConfigError or DataError.
    """
    if folder is not None and held_out:
        raise ConfigError("--held-out: goes with the run's own images, not with --data")
    changes: dict[str, Any] = {"cond": list(cond)}
    if folder is not None:
        changes |= {"path": str(folder), "mixture": [], "holdout": 0.0, "order": "global"}
    data = config.data.model_copy(update=changes)
    opened = open_training_data(config.model_copy(update={"data": data}), index_folder=None)
    if not held_out:
        return RealImages(opened.dataset, np.setdiff1d(np.arange(len(opened.dataset)), opened.held_out), count)
    if not len(opened.held_out):
        raise ConfigError("--held-out: the run has data.holdout = 0, so it was trained on all images")
    return RealImages(opened.dataset, opened.held_out, count)


def load_files(paths: list[Path], model: ModelConfig) -> torch.Tensor:
    """Image files, centre-cropped to a square and resized (Lanczos): (B, C, H, W) float32 in [-1, 1].

    Raises DataError with the name of a file that is no image.
    """
    mode = "L" if model.channels == 1 else "RGB"
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"{path}: has more than 8 bits a channel ({image.mode}); convert it to 8 bits")
                upright = ImageOps.exif_transpose(image).convert(mode)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: not an image that can be read ({error})") from error
        fitted = ImageOps.fit(upright, (model.image_size, model.image_size), Image.Resampling.LANCZOS)
        images.append(np.atleast_3d(np.asarray(fitted)))
    return from_uint8(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
