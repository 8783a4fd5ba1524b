"""Copies of checkpoints elsewhere: whole or no copy at all, told when they fail, and enough to go on from."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from tests.copies_harness import bring_back, content, copies_of, copy_all, store
from tests.harness import assert_same_state, checkpoint, events, launch, overrides, write_config
from tests.stored import write_checkpoint
from trainer.engine.checkpointing.remote.mirror_folder import CopyFolder
from trainer.errors import CheckpointError


class Breaking(LocalFileSystem):
    """A disk whose n-th write fails, and that notes what was written."""

    protocol = "breaking"
    cachable = False
    fails_at: ClassVar[int] = 0
    written: ClassVar[list[str]] = []

    def put_file(self, lpath: str, rpath: str, **settings: Any) -> None:
        if len(self.written) + 1 == self.fails_at:
            self.written.append("failed")
            raise ConnectionError("the other side\nhung up")
        self.written.append(rpath)
        super().put_file(lpath, rpath, **settings)


@pytest.fixture
def breaking() -> Iterator[type[Breaking]]:
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    Breaking.fails_at, Breaking.written[:] = 0, []
    yield Breaking
    Breaking.fails_at = 0


def test_a_copy_is_the_checkpoint_and_old_ones_go(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "elsewhere"
    copies, lines = copies_of(run, place, keep=2, forever=(1,))
    copy_all(copies, run, 1, 2, 3, 4)
    assert sorted(path.name for path in place.iterdir()) == [f"step-{step:08d}" for step in (1, 3, 4)]
    assert content(place / "step-00000004") == content(checkpoint(run, 4))
    assert [event["step"] for event in events(run) if event["event"] == "copied"] == [1, 2, 3, 4]
    assert lines[-1].startswith(f"step 4: copied to {place}/step-00000004 in ")


def test_wherever_copying_breaks_off_there_is_no_copy_and_the_next_one_is(
    tmp_path: Path, breaking: type[Breaking]
) -> None:
    """Two parts, manifest, marker: four writes, the marker last."""
    for fails_at in range(1, 5):
        breaking.fails_at, breaking.written[:] = fails_at, []
        run, url = tmp_path / f"run{fails_at}", f"breaking://{tmp_path}/elsewhere{fails_at}"
        copies, lines = copies_of(run, url)
        copy_all(copies, run, 1)
        (line,) = lines
        assert "step 1: not copied to" in line
        assert "ConnectionError: the other side hung up; tried again with the next checkpoint" in line
        assert CopyFolder(url).steps() == []
        assert bring_back(tmp_path / f"other{fails_at}", url) is None
        copy_all(copies, run, 2)
        assert CopyFolder(url).steps() == [2]
        assert not (tmp_path / f"elsewhere{fails_at}" / "step-00000001").exists()  # the rest of the failed one
        assert Path(breaking.written[-1]).name == "COMPLETE"
    assert [event["event"] for event in events(run)] == ["copy_failed", "copied"]


def test_a_file_that_arrives_short_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(_: Any, source: str, target: str, **__: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:-1])

    run, place = tmp_path / "run", tmp_path / "elsewhere"
    copies, (lines) = copies_of(run, place)
    monkeypatch.setattr(LocalFileSystem, "put_file", cut_off)
    copy_all(copies, run, 1)
    assert "bytes arrived" in lines[0]
    assert CopyFolder(str(place)).steps() == []


def test_a_job_that_was_killed_before_it_copied_is_made_up_for(tmp_path: Path, breaking: type[Breaking]) -> None:
    """What is a copy already is not written again."""
    run, url = tmp_path / "run", f"breaking://{tmp_path}/elsewhere"
    copies, _ = copies_of(run, url)
    copy_all(copies, run, 1)
    before = list(breaking.written)
    again, lines = copies_of(run, url)
    copy_all(again, run, 1)
    assert breaking.written == before
    assert not lines
    copy_all(again, run, 2)
    assert CopyFolder(url).steps() == [1, 2]


def test_of_checkpoints_that_wait_the_newest_is_copied_and_all_needed_stay(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "elsewhere"
    copies, _ = copies_of(run, place)
    paths = [store(run, step) for step in (1, 2, 3)]
    copies.want(paths[0])
    copies.poll(0)
    copies.want(paths[1])
    copies.want(paths[2])
    assert [copies.needs(step) for step in (1, 2, 3)] == [True, False, True]
    copies.end()
    assert CopyFolder(str(place)).steps() == [1, 3]
    assert not any(copies.needs(step) for step in (1, 2, 3))


def test_when_the_run_was_taken_back_later_copies_are_no_copies_any_more(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "elsewhere"
    copies, _ = copies_of(run, place, keep=2)
    copy_all(copies, run, 1, 2, 3)
    shutil.rmtree(checkpoint(run, 2))
    store(run, 2, strategy="zero2")  # another one of that step
    copy_all(copies, run, 2)
    assert CopyFolder(str(place)).steps() == [2]
    assert content(place / "step-00000002") == content(checkpoint(run, 2))
    assert (place / "step-00000003" / "SUPERSEDED").exists()  # nothing is lost


def test_the_place_of_another_run_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    theirs = write_checkpoint(place, {"w": torch.zeros(2)}, step=1, ranks=2, identity={"seed": 4})
    before = content(theirs)
    run = tmp_path / "run"
    copies, (lines) = copies_of(run, place)
    copy_all(copies, run, 1, 2)
    assert len(lines) == 2
    assert "belongs to another run: seed: 4 in the checkpoint, 3 now" in lines[0]
    assert [path.name for path in place.iterdir()] == ["step-00000001"]
    assert content(theirs) == before
    with pytest.raises(CheckpointError, match="belongs to another run"):
        bring_back(tmp_path / "other", place)


def test_a_run_copies_in_the_background_and_goes_on_from_a_copy(tmp_path: Path, dataset: Path) -> None:
    """Its folder is lost after four of six steps; what comes out is the run that lost nothing."""
    whole, config = (write_config(tmp_path, dataset, name) for name in ("whole", "run"))
    place = tmp_path / "elsewhere"
    launch(2, "--config", str(whole))
    copied = overrides(checkpoint__copy_to=place)
    output = launch(2, "--config", str(config), *copied, *overrides(train__duration="4 steps"))
    assert f"step 4: copied to {place}/step-00000004" in output
    shutil.rmtree(tmp_path / "run")
    output = launch(2, "--config", str(config), *copied)
    assert "step 4 of 6" in output
    assert f"restored from {place}/step-00000004" in output
    assert_same_state(tmp_path / "whole", tmp_path / "run", 6)
    assert content(place / "step-00000006") == content(checkpoint(tmp_path / "run", 6))


@dataclass(frozen=True)
class DeadServer:
    """The first file that this rank copies does not arrive."""

    rank: int

    def inject(self) -> None:
        original = LocalFileSystem.put_file
        calls = 0

        def put_file(self: LocalFileSystem, source: str, target: str, **settings: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise ConnectionError("no route to host")
            original(self, source, target, **settings)

        LocalFileSystem.put_file = put_file


def test_a_copy_that_fails_on_one_rank_is_told_and_ends_nothing(tmp_path: Path, dataset: Path) -> None:
    config, place = write_config(tmp_path, dataset), tmp_path / "elsewhere"
    output = launch(
        2,
        "--config",
        str(config),
        *overrides(checkpoint__copy_to=place),
        fault=DeadServer(rank=1),  # type: ignore[arg-type]
    )
    assert f"step 2: not copied to {place}: ConnectionError: no route to host; tried again" in output
    told = [event["event"] for event in events(tmp_path / "run") if event["event"].startswith("cop")]
    assert told[0] == "copy_failed"
    assert set(told[1:]) == {"copied"}
    assert CopyFolder(str(place)).steps()[-1] == 6
    assert [step for step in (2, 4, 6) if checkpoint(tmp_path / "run", step).exists()] == [2, 4, 6]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("s3://bucket")
    yield "s3://bucket/run"
    server.stop()


def test_a_bucket_holds_copies_like_any_folder(tmp_path: Path, bucket: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    copies, lines = copies_of(run, bucket, keep=2)
    copy_all(copies, run, 1, 2, 3)
    assert all("copied to" in line for line in lines), lines
    assert CopyFolder(bucket).steps() == [2, 3]
    assert bring_back(other, bucket) == checkpoint(other, 3)
    assert content(checkpoint(other, 3)) == content(checkpoint(run, 3))
    shutil.rmtree(checkpoint(run, 2))
    store(run, 2, strategy="zero2")
    copy_all(copies, run, 2)
    assert CopyFolder(bucket).steps() == [2]
    copies, lines = copies_of(tmp_path / "third", "s3://nowhere/run")
    copy_all(copies, tmp_path / "third", 1)
    assert "not copied" in lines[0]
    assert not fsspec.filesystem("s3").exists("s3://nowhere")
