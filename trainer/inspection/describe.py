"""Description of a checkpoint: counters, identity, tensors by kind, statistics."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trainer.engine.checkpointing.checkpoints import is_weights, open_verified
from trainer.engine.run_folder import flat
from trainer.engine.state.tensor_files import TensorReader
from trainer.inspection import folders
from trainer.inspection.listing import written_by
from trainer.inspection.tensors import is_finite, statistics
from trainer.inspection.text import size, table


def open_whole(path: Path) -> tuple[TensorReader, dict[str, Any]]:
    """A reader of tensors and the manifest of a checkpoint, after verifying every byte.

    Raises CheckpointError where it is damaged, or of an unknown format version.
    """
    folders.check(path)
    return open_verified(path)


def unusable_weights(path: Path) -> list[str]:
    """Reasons why weights or averages in an undamaged folder are unusable, for example NaN; empty if none is.

    Raises CheckpointError as `open_whole`.
    """
    reader, _ = open_verified(path)
    kinds = {name: name.partition("/")[0] for name in reader.shapes}
    names = [name for name, kind in kinds.items() if is_weights(kind)]
    bad = [name for name in names if not is_finite(reader, name)]
    return [f"{bad[0]} holds NaN or infinity ({len(bad)} of {len(names)} tensors of weights do)"] if bad else []


def describe(path: Path, *, tensors: bool) -> dict[str, Any]:
    """The description as plain values; with `tensors`, statistics of each tensor, which reads all of them.

    Raises CheckpointError as `open_whole`.
    """
    reader, manifest = open_whole(path)
    about = {
        "checkpoint": str(path),
        **{name: manifest[name] for name in ("step", "strategy", "world_size", "format_version", "trainer_version")},
        "files": {record.name: record.bytes for record in manifest["files"]},
        "state": manifest["state"],
        "identity": manifest["identity"],
        "kinds": _kinds(reader),
    }
    if tensors:
        about["tensors"] = {
            name: {"shape": list(shape), **asdict(statistics(reader, name))} for name, shape in reader.shapes.items()
        }
    return about


def as_text(about: dict[str, Any]) -> str:
    """The result of `describe` as text."""
    lines = [
        f"{about['checkpoint']}: verified",
        f"  step {about['step']}, written by {written_by(about['strategy'], about['world_size'])}, "
        f"format {about['format_version']}, trainer {about['trainer_version']}",
        f"  {len(about['files'])} parts, {size(sum(about['files'].values()))}",
        "state",
        *(f"  {name}: {value}" for name, value in flat(about["state"]).items()),
        "identity",
        *(f"  {name}: {value}" for name, value in about["identity"].items()),
        "tensors",
        *table(
            ["kind", "tensors", "elements", "size", "largest"],
            [
                [kind, f"{one['tensors']:,}", f"{one['elements']:,}", size(one["bytes"]), one["largest"]]
                for kind, one in about["kinds"].items()
            ],
        ),
    ]
    if "tensors" in about:
        lines += table(["tensor", "shape", "norm", "min", "max", "NaN"], list(_rows(about["tensors"])))
    return "\n".join(lines)


def shape_text(shape: list[int] | torch.Size) -> str:
    """A shape as text: 128 x 3 x 3 x 3."""
    return " x ".join(map(str, shape)) or "scalar"


def _kinds(reader: TensorReader) -> dict[str, dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {}
    for name, shape in reader.shapes.items():
        kind, _, tensor = name.partition("/")
        one = kinds.setdefault(kind, {"tensors": 0, "elements": 0, "bytes": 0, "largest": "", "_": -1})
        one["tensors"] += 1
        one["elements"] += shape.numel()
        one["bytes"] += shape.numel() * reader.read(name, 0, 1).element_size()
        if shape.numel() > one["_"]:
            one["largest"], one["_"] = f"{tensor} {shape_text(shape)}", shape.numel()
    return {kind: {name: value for name, value in one.items() if name != "_"} for kind, one in kinds.items()}


def _rows(tensors: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    for name, one in tensors.items():
        figures = [f"{one[figure]:.6g}" for figure in ("norm", "minimum", "maximum")]
        yield [name, shape_text(one["shape"]), *figures, str(one["nans"])]
