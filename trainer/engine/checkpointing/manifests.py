"""Validation of a checkpoint's manifest: types and ranges of fields are checked before use; it is untrusted input."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.engine.checkpointing import sealed
from trainer.engine.checkpointing.sealed import MANIFEST_NAME, DamagedError

FORMAT_VERSION = 2
_MOST_DIMENSIONS = 8  # far above those of any layer; torch allows more
_MOST_ELEMENTS = 2**48  # of one tensor

_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "trainer_version": (lambda value: isinstance(value, str), "a string"),
    "step": (lambda value: type(value) is int and value >= 0, "a whole number from 0 on"),
    "world_size": (lambda value: type(value) is int and value > 0, "a whole number from 1 on"),
    "strategy": (lambda value: isinstance(value, str), "a string"),
    "state": (lambda value: isinstance(value, dict), "an object"),
    "identity": (lambda value: isinstance(value, dict), "an object"),
    "tensors": (lambda value: isinstance(value, dict) and all(map(_is_shape, value.values())), "names and shapes"),
}
_COUNTERS = ("position", "updates")


def read(folder: Path) -> dict[str, Any]:
    """Like `sealed.read_manifest`, with the type of every field that is used later checked.

    A manifest of another format version is returned unchecked: only its "format_version" may be used.
    """
    manifest = sealed.read_manifest(folder)
    if type(manifest.get("format_version")) is not int:
        raise DamagedError(f"{MANIFEST_NAME}: {_wrong(manifest, 'format_version', 'a whole number')}")
    if manifest["format_version"] == FORMAT_VERSION:
        for field, (is_right, right) in _FIELDS.items():
            if field not in manifest or not is_right(manifest[field]):
                raise DamagedError(f"{MANIFEST_NAME}: {_wrong(manifest, field, right)}")
        for counter in _COUNTERS:
            value = manifest["state"].get(counter)
            if type(value) is not int or value < 0:
                raise DamagedError(f"{MANIFEST_NAME}: state: {_wrong(manifest['state'], counter, 'a whole number')}")
    return manifest


def read_unproven(folder: Path) -> dict[str, Any]:
    """The manifest's content, not verified; empty where it cannot be read."""
    try:
        content = json.loads(sealed.read_file(folder / MANIFEST_NAME))
    except (DamagedError, OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _wrong(content: dict[str, Any], field: str, right: str) -> str:
    return f"{field}: should be {right}" if field in content else f"{field}: missing; should be {right}"


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= _MOST_DIMENSIONS
        and all(type(size) is int and 0 <= size <= _MOST_ELEMENTS for size in shape)
        and math.prod(shape) <= _MOST_ELEMENTS
    )
