"""Labels that published datasets keep in a file beside their images: EDM's and StyleGAN's `dataset.json`, ProGAN's
`*-rxx.labels`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.errors import InputError
from data_prep.sources.base import classes_of_values

JSON_NAME = "dataset.json"
MAX_JSON_BYTES = 1 << 30


def is_labels_json(data: bytes) -> bool:
    """Whether this is such a `dataset.json`: an object with `labels`, which may be null."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "labels" in content


def labels_of_json(data: bytes, names: Sequence[str], where: str) -> tuple[list[str], list[int]]:
    """The class names and the label of each of `names`, from `{"labels": [["00000/img00000000.png", 6], ...]}`.

    An image that is not listed has no label, and none has where `labels` is null. Raises InputError, which begins with
    `where`, for anything else but class numbers.
    """
    listed = json.loads(data)["labels"] or []
    try:
        numbers = {name.replace("\\", "/"): label for name, label in listed}
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: `labels` must be a list of [name, class number]") from error
    wrong = next((label for label in numbers.values() if type(label) is not int or label < 0), None)
    if wrong is not None:
        raise InputError(f"{where}: {json.dumps(wrong)} is no class number; remove the file to do without labels")
    return classes_of_values([numbers.get(name) for name in names])


def labels_of_progan(records: Path, count: int) -> tuple[list[str], list[int]] | None:
    """The class names and the label of each of `count` records of `NAME-r08.tfrecords`, from `NAME-rxx.labels`.

    That is an array of (count, classes) with a single 1 in each row, as `np.save` writes it, or of (count,) numbers;
    None where there is no such file. Raises InputError where it is something else.
    """
    prefix, separator, _ = records.name.rpartition("-r")
    path = records.with_name(f"{prefix}-rxx.labels")
    if not separator or not path.is_file():
        return None
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not an array of labels ({error})") from error
    if not isinstance(values, np.ndarray) or values.ndim not in (1, 2) or len(values) != count:
        shape = getattr(values, "shape", "no array")
        raise InputError(f"{path}: {shape}; there are {count} records, so it should be ({count}, classes)")
    if values.ndim == 2:
        if not (((values == 0) | (values == 1)).all() and (values.sum(axis=1) == 1).all()):
            raise InputError(f"{path}: has rows without a single 1; remove it to do without labels")
        return [str(number) for number in range(values.shape[1])], values.argmax(axis=1).tolist()
    if not np.issubdtype(values.dtype, np.integer) or (len(values) and values.min() < 0):
        raise InputError(f"{path}: {values.dtype} that are no class numbers; remove it to do without labels")
    return classes_of_values(values.tolist())
