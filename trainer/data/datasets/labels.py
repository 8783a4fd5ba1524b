"""Whether the labels of a dataset are what a network that takes classes may be trained on."""

from collections.abc import Mapping

import numpy as np

from data_prep.format import UNLABELLED
from trainer.data.datasets.indexed import IndexedDataset
from trainer.errors import DataError


def check_labels(datasets: Mapping[str, IndexedDataset], classes: int) -> None:
    """Check all labels of the datasets, which are named by their paths: each is from 0 to classes - 1, and the same
    label means the same in all of them.

    Raises DataError with the first sample that has no label or another one, or the first two datasets that disagree.
    """
    for dataset in datasets.values():
        _check_range(dataset, classes)
    _check_meaning(datasets)


def _check_range(dataset: IndexedDataset, classes: int) -> None:
    labels = dataset.index["label"]
    without = np.flatnonzero(labels == UNLABELLED)
    if len(without):
        raise DataError(
            f"{dataset.describe(int(without[0]))}: has no label, as {len(without)} of {len(labels)} samples have none; "
            "model.classes needs one of each"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"{dataset.describe(int(wrong[0]))}: has the label {labels[wrong[0]]}; with model.classes = {classes} it "
            f"should be from 0 to {classes - 1}"
        )


def _check_meaning(datasets: Mapping[str, IndexedDataset]) -> None:
    """Datasets whose classes have the same names in the same order agree; others must have no label in common."""
    seen: dict[int, str] = {}
    for path, dataset in datasets.items():
        for label in np.unique(dataset.index["label"]).tolist():
            other = seen.setdefault(label, path)
            theirs, ours = datasets[other].classes, dataset.classes
            if other != path and (theirs is None or theirs != ours):
                raise DataError(
                    f"data.mixture: the label {label} is {_name(theirs, label)} in {other} and {_name(ours, label)} in "
                    f"{path}; prepare them together, so that each class has one number"
                )


def _name(classes: list[str] | None, label: int) -> str:
    return repr(classes[label]) if classes is not None and label < len(classes) else "a class without a name"
