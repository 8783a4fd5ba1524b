"""Copies of checkpoints brought back: the newest that is whole, and only those of this run."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from tests.copies_harness import IDENTITY, bring_back, content, copies_of, copy_all, store
from tests.harness import checkpoint, events
from tests.stored import flip, write_checkpoint
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.checkpointing.remote import mirror_folder as copy_folder
from trainer.engine.checkpointing.remote.mirror_folder import CopyFolder
from trainer.engine.checkpointing.remote.restore import restore_url
from trainer.engine.checkpointing.resume import find_checkpoint
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.run_folder import RunFolder
from trainer.errors import CheckpointError, ConfigError


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_folder, "_PATIENCE", copy_folder.Patience(attempts=1))


@pytest.mark.usefixtures("impatient")
def test_the_newest_copy_that_is_whole_is_brought_back(tmp_path: Path) -> None:
    run, place, other = tmp_path / "run", tmp_path / "elsewhere", tmp_path / "other"
    copies, _ = copies_of(run, place, keep=4)
    copy_all(copies, run, 1, 2, 3, 4)
    flip(place / "step-00000004" / "part-00001-of-00002.safetensors")
    flip(place / "step-00000003" / "manifest.json")
    (place / "step-00000002" / "COMPLETE").unlink()
    assert bring_back(other, place) == checkpoint(other, 1)
    assert content(checkpoint(other, 1)) == content(checkpoint(run, 1))
    refused = [event for event in events(other) if event["event"] == "copy_refused"]
    assert [event["step"] for event in refused] == [4, 3]
    assert "sha256" in refused[0]["reason"]
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["step-00000001"]
    flip(place / "step-00000001" / "part-00000-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no copy that is whole \(step 4: .*step 1: "):
        bring_back(tmp_path / "third", place)


@pytest.mark.usefixtures("impatient")
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    place, other = tmp_path / "elsewhere", tmp_path / "other"
    theirs = write_checkpoint(place, {"w": torch.zeros(2)}, step=1)
    (place / "evil").write_text("x")
    manifest = (theirs / "manifest.json").read_text().replace("part-00000-of-00001.safetensors", "../evil")
    (theirs / "manifest.json").write_text(manifest)
    (theirs / "COMPLETE").write_text(hashlib.sha256(manifest.encode()).hexdigest())
    with pytest.raises(CheckpointError, match=r"name '\.\./evil' should be that of a file in this folder"):
        bring_back(other, place)
    assert not (other / "checkpoints" / "evil").exists()


def test_a_url_brings_one_back_and_sets_aside_what_is_newer(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "elsewhere"
    copies, _ = copies_of(run, place)
    copy_all(copies, run, 1, 2)
    store(run, 3)
    checkpoints, folder = Checkpoints(run / "checkpoints", make_accelerator()), RunFolder(run, writes=True)
    url = f"file://{place}/step-00000002"
    assert restore_url(url, checkpoints, folder, IDENTITY, say=print) == checkpoint(run, 2)
    assert checkpoints.steps() == [1, 2]
    assert sorted(path.name for path in (run / "checkpoints" / "superseded").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]
    assert restore_url(f"file://{place}", checkpoints, folder, IDENTITY, say=print) == checkpoint(run, 2)
    with pytest.raises(CheckpointError, match="there is no complete copy"):
        restore_url(f"file://{place}/step-00000009", checkpoints, folder, IDENTITY, say=print)


def test_where_nobody_can_say_whether_there_is_a_copy_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> list[str]:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(LocalFileSystem, "ls", unreachable)
    with pytest.raises(CheckpointError, match=r"cannot be listed .*no route to host"):
        bring_back(tmp_path / "run", tmp_path / "elsewhere")


def test_a_new_run_is_not_mixed_with_an_old_one_s_copies(tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    write_checkpoint(place, {"w": torch.zeros(2)}, step=1)
    with pytest.raises(CheckpointError, match="holds copies of an earlier run"):
        find_checkpoint(
            Checkpoints(tmp_path / "checkpoints", make_accelerator()),
            RunFolder(tmp_path, writes=True),
            "none",
            copies=CopyFolder(str(place)),
            identity=IDENTITY,
            say=print,
        )
    with pytest.raises(ConfigError, match=r"checkpoint.copy_to = ftpx://host/run: "):
        CopyFolder("ftpx://host/run")
