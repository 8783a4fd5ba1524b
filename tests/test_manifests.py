"""Checkpoints of others, and of a disk that fails: one line, and the run falls back to what is whole."""

import errno
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.stored import flip, write_checkpoint
from trainer.engine.checkpointing import sealed
from trainer.engine.checkpointing.checkpoints import Checkpoints, open_verified, read_weights
from trainer.engine.processes.collectives import make_accelerator
from trainer.errors import CheckpointError
from trainer.inspection import folders, listing


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a manifest says, and the marker with it, as anybody can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMPLETE").write_text(hashlib.sha256(content).hexdigest())


def reseal_parts(folder: Path) -> None:
    """Let the manifest promise the parts as they are now."""
    records = [sealed.record_file(path) for path in sorted(folder.glob("part-*"))]
    reseal(folder, lambda manifest: manifest.update(files=[vars(record) for record in records]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 2 and 4."""
    for step in (2, 4):
        write_checkpoint(tmp_path / "run" / "checkpoints", {"model/w": torch.ones(4, 3)}, step=step)
    return tmp_path / "run"


def at(run: Path) -> Checkpoints:
    return Checkpoints(run / "checkpoints", make_accelerator())


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("state", None),
        ("identity", []),
        ("tensors", None),
        ("tensors", {"model/w": None}),
        ("tensors", {"model/w": [4, -3]}),
        ("tensors", {"model/w": [4.0, 3]}),
        ("tensors", {"model/w": [10**30, 3]}),
        ("tensors", {"model/w": [2**40, 2**40]}),
        ("tensors", {"model/w": [1] * 100}),
        ("step", "4"),
        ("step", -1),
        ("world_size", None),
        ("strategy", 7),
    ],
)
def test_a_manifest_that_says_what_none_can_is_damaged_and_fallen_back_from(run: Path, field: str, value: Any) -> None:
    reseal(newest(run), lambda manifest: manifest.update({field: value}))
    whole, damaged = at(run).find_verified()
    assert whole == run / "checkpoints" / "step-00000002"
    assert damaged[newest(run)].startswith(f"manifest.json: {field}")
    with pytest.raises(CheckpointError, match=f"manifest.json: {field}"):
        open_verified(newest(run))


@pytest.mark.parametrize("field", ["format_version", "trainer_version", "step", "state", "identity", "tensors"])
def test_a_field_that_is_left_out_is_named(run: Path, field: str) -> None:
    reseal(newest(run), lambda manifest: manifest.pop(field))
    (fault,) = folders.damages(newest(run))
    assert fault.startswith(f"manifest.json: {field}: missing")


def test_a_later_format_is_told_as_such_and_not_as_damage(run: Path) -> None:
    reseal(newest(run), lambda manifest: (manifest.clear(), manifest.update(format_version=3, files=[])))
    assert folders.damages(newest(run)) == []
    with pytest.raises(CheckpointError, match="format_version is 3, this program reads 2"):
        open_verified(newest(run))


def header(text: bytes, *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor(offsets: list[int], *, shape: tuple[int, ...] = (4, 3), dtype: str = "F32") -> bytes:
    return json.dumps({"model/w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HEADERS = {
    "empty file": b"",
    "a header of 2^60 bytes": header(b"{}", length=1 << 60),
    "a header as long as the file": header(b"{}", length=8),
    "a header of 64 MiB": header(b" " * (64 << 20)),
    "no JSON": header(b"{{{{"),
    "deeply nested": header(b"[" * 100_000),
    "negative offsets": header(tensor([-48, 0])) + bytes(48),
    "offsets beyond the file": header(tensor([0, 480])) + bytes(48),
    "backward offsets": header(tensor([48, 0])) + bytes(48),
    "another shape": header(tensor([0, 48], shape=(3, 4))) + bytes(48),
    "too few elements": header(tensor([0, 24], shape=(2, 3))) + bytes(24),
    "a number of elements that overflows": header(tensor([0, 48], shape=(2**40, 2**40))) + bytes(48),
    "no tensor": header(b"{}"),
    "integers": header(tensor([0, 48], dtype="I32")) + bytes(48),
    "a type of half a byte": header(tensor([0, 6], dtype="F4")) + bytes(6),
    "overlapping": header(
        json.dumps(
            {
                "model/w[0:12]": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]},
                "model/w[6:12]": {"dtype": "F32", "shape": [6], "data_offsets": [24, 48]},
            }
        ).encode()
    )
    + bytes(48),
    "a slice without end": header(
        json.dumps({f"model/w[0:{'9' * 5000}]": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]}}).encode()
    )
    + bytes(48),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.timeout(10)
def test_tensors_of_others_give_one_line(run: Path, kind: str) -> None:
    part = newest(run) / "part-00000-of-00001.safetensors"
    part.write_bytes(HEADERS[kind])
    reseal_parts(newest(run))
    with pytest.raises(CheckpointError) as fault:
        read_weights(newest(run), "model")
    assert str(fault.value).startswith(f"{newest(run)}: ")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told(run: Path, value: float) -> None:
    part = newest(run) / "part-00000-of-00001.safetensors"
    weights = torch.ones(4, 3)
    weights[3, 2] = value
    save_file({"model/w": weights}, part)
    reseal_parts(newest(run))
    with pytest.raises(CheckpointError, match="model/w: holds NaN or infinity"):
        read_weights(newest(run), "model")


def test_a_file_where_a_checkpoint_should_be_is_set_aside(run: Path) -> None:
    (run / "checkpoints" / "step-00000006").write_text("no folder")
    whole, damaged = at(run).recover()
    assert whole == newest(run)
    assert damaged == {run / "checkpoints" / "step-00000006": "manifest.json is missing"}
    aside = run / "checkpoints" / "quarantine"
    assert (aside / "step-00000006").read_text() == "no folder"
    assert (aside / "step-00000006.REASON").read_text() == "manifest.json is missing\n"
    (listed,) = listing.list_run(run, quick=False).set_aside
    assert (listed.where, listed.reason) == ("quarantine", "manifest.json is missing")


def test_a_file_where_a_checkpoint_should_be_is_listed(run: Path) -> None:
    (run / "checkpoints" / "step-00000006").write_text("no folder")
    *_, listed = listing.list_run(run, quick=True).checkpoints
    assert (listed.step, listed.faults) == (6, ["manifest.json is missing"])


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a disk fail where a file is opened."""
    really, failing = sealed._open, set[Path]()

    def fail(path: Path) -> Any:
        if path in failing:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return really(path)

    monkeypatch.setattr(sealed, "_open", fail)
    return failing.add


@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE", "part-00000-of-00001.safetensors"])
def test_what_cannot_be_read_is_fallen_back_from(run: Path, unreadable: Callable[[Path], None], name: str) -> None:
    unreadable(newest(run) / name)
    whole, damaged = at(run).recover()
    assert whole == run / "checkpoints" / "step-00000002"
    assert "Input/output error" in damaged[newest(run)]
    assert "Input/output error" in (run / "checkpoints/quarantine/step-00000004/REASON").read_text()


def test_where_nothing_else_is_whole_a_disk_that_fails_gives_no_checkpoint_up(
    run: Path, unreadable: Callable[[Path], None]
) -> None:
    unreadable(newest(run) / "manifest.json")
    flip(run / "checkpoints" / "step-00000002" / "part-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000004: cannot be verified: .*Input/output error"):
        at(run).recover()
    assert newest(run).is_dir()
    assert not (run / "checkpoints" / "quarantine").exists()
