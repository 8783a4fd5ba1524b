"""How far the samples of each class are from the real images of that class."""

import numpy as np
import numpy.typing as npt

from trainer.drawing.cascade import Cascade
from trainer.engine.processes.division import map_over_ranks
from trainer.errors import ConfigError, DataError
from trainer.evaluation.feature_sets import FeatureSet
from trainer.evaluation.references import ReferenceImages
from trainer.features.kernel_distance import squared_mmd
from trainer.sampling.request import batches_of

_MOST = 5000  # samples, and images, of a class: its kernel has the square of them
_LABELS = 256  # read at a time

Classes = npt.NDArray[np.int64]
"""Of each sample or image its class, (N,)."""


def classes_of_samples(cascade: Cascade) -> Classes:
    """Raises ConfigError where samples have no classes."""
    labels = cascade.labels(range(cascade.base.sampling.count))
    if labels is None:
        raise ConfigError("--per-class: goes with a network that takes labels; this one takes none", agreed=True)
    return np.array(labels, dtype=np.int64)


def classes_of_images(reference: ReferenceImages) -> Classes:
    """Of a reference that was opened with labels; the ranks divide the reading. Collective. Raises DataError on all of
    them where one cannot be read.
    """
    assert reference.labels is not None
    what = f"{reference.name}: labels cannot be read"
    parts, _ = map_over_ranks(batches_of(reference.count, _LABELS), reference.labels, what=what, kind=DataError)
    return np.array([label for part in parts for label in part], dtype=np.int64)


def distances_by_class(
    samples: FeatureSet, reference: FeatureSet, *, drawn: Classes, real: Classes
) -> dict[int, float]:
    """The kernel distance (trainer/features/kernel_distance.py) of each class that has two samples and two images, of
    at most 5,000 of each: unbiased, so that classes of different numbers can be compared, and as often below 0 as above
    where there is no difference. A Fréchet distance of the few images of a class would tell their number.

    drawn, real: the classes of the samples and of the images. Collective, the same on all ranks.
    """
    x, y = samples.rows(), reference.rows()

    def rows(classes: Classes, label: int) -> npt.NDArray[np.int64]:
        return np.flatnonzero(classes == label)[:_MOST]

    labels = [
        label
        for label in np.intersect1d(drawn, real).tolist()
        if min(len(rows(drawn, label)), len(rows(real, label))) >= 2
    ]
    if not labels:
        raise DataError("--per-class: no class has two samples and two images of the reference", agreed=True)
    found, _ = map_over_ranks(
        labels,
        lambda label: squared_mmd(x[rows(drawn, label)], y[rows(real, label)]),
        what="the features: cannot be compared",
    )
    return dict(zip(labels, found, strict=True))
