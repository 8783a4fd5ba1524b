"""References for feature metrics: real images, or a published file of images or statistics."""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """`count` images; `pixels` returns (B, C, H, W) uint8 by their indices, `labels` their classes, where the reference
    has any and they were asked for; `fingerprint` identifies them.
    """

    name: str
    fingerprint: str
    count: int
    pixels: Callable[[range], torch.Tensor]
    labels: Callable[[range], list[int]] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceStatistics:
    """Mean and covariance of features, from a file; the file does not include the number of images."""

    name: str
    fingerprint: str
    distribution: Gaussian


def open_reference(
    request: ReferenceRequest,
    config: Config,
    *,
    most: int | None,
    statistics: tuple[str, str] | None,
    labelled: bool = False,
) -> ReferenceImages | ReferenceStatistics:
    """Open the requested reference; at most `most` images, where the request has no number. `statistics`: of an .npz,
    use the mean and covariance of these names rather than images; `labelled`: the images' classes are needed.

    Raises ConfigError or DataError with the file's name and what is expected.
    """
    if request.path is not None and request.held_out:
        raise ConfigError("--held-out: goes with the run's own images, not with --reference")
    if request.path is not None and request.path.suffix == ".npz":
        return _open_npz(request.path, request.images, config, most=most, statistics=statistics, labelled=labelled)
    cond = ["label"] if labelled else []
    images = open_images(config, request.path, held_out=request.held_out, count=request.images, cond=cond)
    if request.images is None and most is not None and images.count > most:
        images = open_images(config, request.path, held_out=request.held_out, count=most, cond=cond)
    which = " held out" if request.held_out else ""
    return ReferenceImages(
        name=f"{request.path or config.data.where}{which}",
        fingerprint=images.dataset.fingerprint,
        count=images.count,
        pixels=images.pixels,
        labels=(lambda numbers: images.cond(numbers)["label"].tolist()) if labelled else None,
    )


def _open_npz(
    path: Path,
    count: int | None,
    config: Config,
    *,
    most: int | None,
    statistics: tuple[str, str] | None,
    labelled: bool,
) -> ReferenceImages | ReferenceStatistics:
    try:
        with path.open("rb") as stream:
            fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()
        with np.load(path, allow_pickle=False) as stored:
            names = set(stored.files)
            if statistics is not None and names.issuperset(statistics):
                return ReferenceStatistics(
                    name=str(path), fingerprint=fingerprint, distribution=_gaussian(path, stored, statistics)
                )
            wanted = {"arr_0", "arr_1"} if labelled else {"arr_0"}
            if wanted <= names:
                images = _images(path, stored["arr_0"], config)
                labels = _labels(path, stored["arr_1"], len(images)) if labelled else None
                return _subset(path, fingerprint, images, labels, count=count, most=most)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: no .npz that can be read ({error})") from error
    needed = "images as arr_0" + (" and their classes as arr_1" if labelled else "")
    if statistics is not None:
        needed = f"{' and '.join(statistics)}, or {needed}"
    elif not labelled:
        needed += " (mu and sigma do for fid alone, mu_s and sigma_s for sfid)"
    raise DataError(f"{path}: should hold {needed}; holds {', '.join(sorted(names)) or 'nothing'}")


def _gaussian(path: Path, stored: Mapping[str, npt.NDArray[Any]], names: tuple[str, str]) -> Gaussian:
    mean, covariance = (stored[name] for name in names)
    mu, sigma = names
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise DataError(f"{path}: {mu} should be (D,) and {sigma} (D, D); they are {mean.shape} and {covariance.shape}")
    if not all(np.issubdtype(values.dtype, np.floating) for values in (mean, covariance)):
        raise DataError(f"{path}: {mu} and {sigma} should be floats; they are {mean.dtype} and {covariance.dtype}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path}: {mu} or {sigma} holds a value that is not finite")
    return Gaussian(mean=torch.from_numpy(mean).double(), covariance=torch.from_numpy(covariance).double())


def _images(path: Path, images: npt.NDArray[np.uint8], config: Config) -> npt.NDArray[np.uint8]:
    side = config.model.image_size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] not in ((side, side, 1), (side, side, 3)):
        raise DataError(
            f"{path}: arr_0 should be (N, {side}, {side}, 3) uint8, as the run's images are; "
            f"it is {images.shape} {images.dtype}"
        )
    return images


def _labels(path: Path, labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: arr_1 should be ({count},) integers; it is {labels.shape} {labels.dtype}")
    return labels


def _subset(
    path: Path,
    fingerprint: str,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None,
    *,
    count: int | None,
    most: int | None,
) -> ReferenceImages:
    if count is not None and count > len(images):
        raise ConfigError(f"--images {count}: there are {len(images)} in {path}")

    def chosen(numbers: range) -> npt.NDArray[np.int64]:
        return sample_ids(np.arange(numbers.start, numbers.stop), len(images), seed=0)

    return ReferenceImages(
        name=str(path),
        fingerprint=fingerprint,
        count=count or min(len(images), most or len(images)),
        pixels=lambda numbers: rearrange(torch.from_numpy(images[chosen(numbers)]), "n h w c -> n c h w"),
        labels=None if labels is None else lambda numbers: labels[chosen(numbers)].tolist(),
    )
