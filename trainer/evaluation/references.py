"""References for feature metrics: real images, or a published file of images or statistics."""

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange

from trainer.config import Config
from trainer.data.orders.order import sample_ids
from trainer.errors import ConfigError, DataError
from trainer.evaluation.images import open_images
from trainer.features.frechet import Gaussian


@dataclass(frozen=True, kw_only=True)
class ReferenceRequest:
    """`path`: a folder of shards or an .npz; None for the run's training images, or, with `held_out`, those excluded by
    its data.holdout; `images`: size of a random subset, or None for all.
    """

    path: Path | None
    held_out: bool
    images: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceImages:
    """`count` images; `pixels` returns (B, C, H, W) uint8 by their indices, `fingerprint` identifies them."""

    name: str
    fingerprint: str
    count: int
    pixels: Callable[[range], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceStatistics:
    """Mean and covariance of features, from a file; the file does not include the number of images."""

    name: str
    fingerprint: str
    distribution: Gaussian

    def gaussian(self) -> Gaussian:
        """Mean (D,) and covariance (D, D)."""
        return self.distribution


def open_reference(
    request: ReferenceRequest, config: Config, *, most: int | None, statistics: bool
) -> ReferenceImages | ReferenceStatistics:
    """Open the requested reference; at most `most` images, where the request has no number. `statistics`: of an .npz,
    use mean and covariance rather than images.

    Raises ConfigError or DataError with the file's name and what is expected.
    """
    if request.path is not None and request.held_out:
        raise ConfigError("--held-out: goes with the run's own images, not with --reference")
    if request.path is not None and request.path.suffix == ".npz":
        return _open_npz(request.path, request.images, config, most=most, statistics=statistics)
    images = open_images(config, request.path, held_out=request.held_out, count=request.images)
    if request.images is None and most is not None and images.count > most:
        images = open_images(config, request.path, held_out=request.held_out, count=most)
    which = " held out" if request.held_out else ""
    return ReferenceImages(
        name=f"{request.path or config.data.where}{which}",
        fingerprint=images.dataset.fingerprint,
        count=images.count,
        pixels=images.pixels,
    )


def _open_npz(
    path: Path, count: int | None, config: Config, *, most: int | None, statistics: bool
) -> ReferenceImages | ReferenceStatistics:
    try:
        with path.open("rb") as stream:
            fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()
        with np.load(path, allow_pickle=False) as stored:
            names = set(stored.files)
            if statistics and {"mu", "sigma"} <= names:
                return ReferenceStatistics(
                    name=str(path), fingerprint=fingerprint, distribution=_gaussian(path, stored["mu"], stored["sigma"])
                )
            if "arr_0" in names:
                images = _images(path, stored["arr_0"], config)
                return _subset(path, fingerprint, images, count, most)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no .npz that can be read ({error})") from error
    wanted = "mu and sigma, or images as arr_0" if statistics else "images as arr_0 (mu and sigma do for fid alone)"
    raise DataError(f"{path}: should hold {wanted}; holds {', '.join(sorted(names)) or 'nothing'}")


def _gaussian(path: Path, mean: npt.NDArray[np.float64], covariance: npt.NDArray[np.float64]) -> Gaussian:
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise DataError(f"{path}: mu should be (D,) and sigma (D, D); they are {mean.shape} and {covariance.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path}: mu or sigma holds a value that is not finite")
    return Gaussian(mean=torch.from_numpy(mean).double(), covariance=torch.from_numpy(covariance).double())


def _images(path: Path, images: npt.NDArray[np.uint8], config: Config) -> npt.NDArray[np.uint8]:
    side = config.model.image_size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] not in ((side, side, 1), (side, side, 3)):
        raise DataError(
            f"{path}: arr_0 should be (N, {side}, {side}, 3) uint8, as the run's images are; "
            f"it is {images.shape} {images.dtype}"
        )
    return images


def _subset(
    path: Path, fingerprint: str, images: npt.NDArray[np.uint8], wanted: int | None, most: int | None
) -> ReferenceImages:
    if wanted is not None and wanted > len(images):
        raise ConfigError(f"--images {wanted}: there are {len(images)} in {path}")
    count = wanted or min(len(images), most or len(images))

    def pixels(numbers: range) -> torch.Tensor:
        chosen = sample_ids(np.arange(numbers.start, numbers.stop), len(images), seed=0)
        return rearrange(torch.from_numpy(images[chosen]), "n h w c -> n c h w")

    return ReferenceImages(name=str(path), fingerprint=fingerprint, count=count, pixels=pixels)
