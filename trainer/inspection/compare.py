"""Comparison of two checkpoints, independent of the strategies and numbers of ranks that wrote them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.inspection.describe import open_whole, shape_text
from trainer.inspection.listing import written_by
from trainer.inspection.tensors import difference
from trainer.inspection.text import table

_ABSENT = "-"


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Differences as plain values; "equal" where all tensors (bit for bit), counters and identities are equal.

    Raises CheckpointError where one is damaged or cannot be read.
    """
    (tensors, manifest), (other_tensors, other_manifest) = open_whole(one), open_whole(other)
    here, there = tensors.shapes, other_tensors.shapes
    common = [name for name in here if here[name] == there.get(name)]
    differences = {name: difference(tensors, other_tensors, name) for name in common}
    found: dict[str, Any] = {
        "state": _changed(_with_step(manifest), _with_step(other_manifest)),
        "identity": _changed(manifest["identity"], other_manifest["identity"]),
        "only_in_first": [name for name in here if name not in there],
        "only_in_second": [name for name in there if name not in here],
        "other_shape": {
            name: [list(here[name]), list(there[name])] for name in here if name in there and here[name] != there[name]
        },
        "different": {name: asdict(found) for name, found in differences.items() if not found.equal},
    }
    return {
        "first": _about(one, manifest),
        "second": _about(other, other_manifest),
        "equal": not any(found.values()),
        "equal_tensors": sum(found.equal for found in differences.values()),
        **found,
    }


def as_text(found: dict[str, Any]) -> str:
    """The result of `compare` as text."""
    lines = [f"{found[which]['checkpoint']} ({found[which]['written_by']})" for which in ("first", "second")]
    for section in ("state", "identity"):
        lines += [f"{section}: {name}: {a} | {b}" for name, (a, b) in found[section].items()]
    lines += [f"only in the first: {name}" for name in found["only_in_first"]]
    lines += [f"only in the second: {name}" for name in found["only_in_second"]]
    lines += [
        f"other shape: {name}: {shape_text(a)} | {shape_text(b)}" for name, (a, b) in found["other_shape"].items()
    ]
    lines += table(
        ["different", "max |difference|", "relative"],
        [[name, f"{one['largest']:.3g}", f"{one['relative']:.3g}"] for name, one in found["different"].items()],
    )
    lines.append(f"{found['equal_tensors']} tensors are equal bit for bit, {len(found['different'])} are not")
    lines.append("equal" if found["equal"] else "not equal")
    return "\n".join(lines)


def _about(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    return {"checkpoint": str(path), "written_by": written_by(manifest["strategy"], manifest["world_size"])}


def _with_step(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"step": manifest["step"], **manifest["state"]}


def _changed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [one.get(name, _ABSENT), other.get(name, _ABSENT)]
        for name in one | other
        if one.get(name, _ABSENT) != other.get(name, _ABSENT)
    }
