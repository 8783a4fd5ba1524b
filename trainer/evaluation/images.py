"""Real images for a network: out of the run's shards, or files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from trainer.config import ModelConfig
from trainer.data.decode import decode
from trainer.data.order import sample_ids
from trainer.data.shards import ShardedDataset
from trainer.errors import ConfigError, DataError


class ShardImages:
    """`count` images of a dataset, or all of it: a subset is drawn at random but always the same, none twice."""

    def __init__(self, folder: Path, model: ModelConfig, count: int | None) -> None:
        self.dataset = ShardedDataset(folder)
        manifest = self.dataset.manifest
        if (manifest.image_size, manifest.channels) != (model.image_size, model.channels):
            raise DataError(
                f"{folder}: images of {manifest.image_size} pixels and {manifest.channels} channels, the network has "
                f"{model.image_size} and {model.channels}"
            )
        if count is not None and count > len(self.dataset):
            raise ConfigError(f"--images {count}: {folder} holds {len(self.dataset)}")
        self.count = count or len(self.dataset)

    def ids(self, numbers: range) -> list[int]:
        """Sample ids of the images with these numbers, 0..count-1."""
        positions = np.arange(numbers.start, numbers.stop)
        return [int(sample) for sample in sample_ids(positions, len(self.dataset), seed=0)]

    def load(self, numbers: range) -> torch.Tensor:
        """(B, C, H, W) float32 in [-1, 1]. Raises DataError that names a damaged one."""
        manifest = self.dataset.manifest
        images = [decode(self.dataset.read(i), manifest.image_size, manifest.mode) for i in self.ids(numbers)]
        return torch.from_numpy(np.stack(images)).float() / 127.5 - 1


def load_files(paths: list[Path], model: ModelConfig) -> torch.Tensor:
    """Image files, cropped at the centre to a square and resized (Lanczos): (B, C, H, W) float32 in [-1, 1].

    Raises DataError that names a file which is no image.
    """
    mode = "L" if model.channels == 1 else "RGB"
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert(mode)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: not an image that can be read ({error})") from error
        fitted = ImageOps.fit(upright, (model.image_size, model.image_size), Image.Resampling.LANCZOS)
        images.append(np.atleast_3d(np.asarray(fitted)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
