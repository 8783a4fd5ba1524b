"""Promises under faults: one clear line, nothing half-written under a final name, nothing of others overwritten."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_prep.errors import DataPrepError
from data_prep.format import sha256_of
from data_prep.output import claimed, whole_file
from data_prep.recipe import Recipe
from data_prep.sources import open_source
from data_prep.write.build import plan_shards
from data_prep.write.disk import Room, check_room
from data_prep.write.transforms import TRANSFORMS
from data_prep.write.writer import load_result, write_shard
from tests.data_prep_harness import (
    BIG_OPTIONS,
    PHOTO_OPTIONS,
    bytes_of,
    children_of,
    command,
    data_prep,
    error_line,
    failing_run,
    is_alive,
    wait_until,
)


def test_a_second_run_on_the_same_folder_is_refused(
    photos: Path, tmp_path: Path, one_error_line: Callable[[], str]
) -> None:
    with claimed(tmp_path):
        assert data_prep(photos, tmp_path, *PHOTO_OPTIONS) == 2
    assert "another run" in one_error_line()
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 0


def test_what_a_stopped_worker_left_is_removed(tmp_path: Path) -> None:
    with claimed(tmp_path) as staging:
        (staging / "shard-000000.tar.tmp-1").touch()
    assert not any(tmp_path.rglob("*.tmp-*"))


def test_small_images_do_not_each_take_a_call_to_the_kernel(tmp_path: Path) -> None:
    def calls() -> int:
        return int(re.search(r"syscw: (\d+)", Path("/proc/self/io").read_text())[1])

    with claimed(tmp_path) as staging:
        before = calls()
        with whole_file(tmp_path / "shard-000000.tar", staging) as stream:
            for _ in range(100):
                stream.write(bytes(10_000))
        assert calls() - before < 10
    assert (tmp_path / "shard-000000.tar").stat().st_size == 1_000_000


def test_foreign_files_are_never_overwritten(photos: Path, tmp_path: Path, one_error_line: Callable[[], str]) -> None:
    (tmp_path / "shard-000000.tar").write_text("mine")
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS) == 2
    assert "shard-000000.tar" in one_error_line()
    assert bytes_of(tmp_path).keys() == {"shard-000000.tar"}
    (tmp_path / "shard-000000.tar").rename(tmp_path / "thesis.txt")
    (tmp_path / ".staging").mkdir()
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS) == 2
    assert "thesis.txt" in one_error_line()


def test_too_many_rejects_end_without_a_manifest(
    photos: Path, tmp_path: Path, one_error_line: Callable[[], str]
) -> None:
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS[:-1], 0.1, "--workers", 1) == 1
    line = one_error_line()
    assert "2 of 12 images rejected" in line
    assert "--max-reject-fraction 0.1" in line
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "manifest.json").exists()


def test_nothing_written_is_an_error_whatever_the_fraction(tmp_path: Path, one_error_line: Callable[[], str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"junk")
    assert data_prep(tmp_path / "in", tmp_path / "out", "--max-reject-fraction", 1, "--workers", 1) == 1
    assert "1 of 1 images rejected" in one_error_line()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--size", "0"], "--size 0"),
        (["--size", "big"], "--size: 'big' is no side in pixels; give a number such as 256"),
        (["--size", "24x16"], "--size: 24x16 is not supported, as images are square; give one side, such as 24"),
        (["--shard-samples", "0"], "--shard-samples 0"),
        (["--workers", "0"], "--workers 0"),
        (["--max-reject-fraction", "1.5"], "--max-reject-fraction 1.5"),
        (["--format", "tiff"], "--format"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_options_are_named(
    photos: Path, tmp_path: Path, one_error_line: Callable[[], str], arguments: list[str], named: str
) -> None:
    assert data_prep(photos, tmp_path / "out", *arguments) == 2
    assert named in one_error_line()
    assert not (tmp_path / "out").exists()


def test_output_inside_the_source_is_refused(photos: Path, one_error_line: Callable[[], str]) -> None:
    assert data_prep(photos, photos / "out", *PHOTO_OPTIONS) == 2
    assert "source folder" in one_error_line()


def test_a_file_that_cannot_be_completed_never_gets_its_name(
    photos: Path, prepared_photos: Path, tmp_path: Path
) -> None:
    limit = 15_000  # bytes: enough for a shard of one image, not for one of five
    line = failing_run(
        *(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert re.search(r"shard-00000[01].tar: cannot be written \(File too large\)", line)  # the first two both fail
    assert [path.name for path in tmp_path.iterdir()] == [".staging"]
    assert not any(tmp_path.rglob("*.tmp-*"))
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS) == 0
    assert bytes_of(tmp_path) == bytes_of(prepared_photos)


def test_full_disk_is_one_line_and_leaves_no_part_of_a_file(
    photos: Path,
    prepared_photos: Path,
    mounted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    one_error_line: Callable[[], str],
) -> None:
    place = mounted("size=36k")
    monkeypatch.setattr(
        "data_prep.write.build.check_room", lambda *_: Room(needed=0, free=0)
    )  # the disk fills up later
    assert data_prep(photos, place / "out", *PHOTO_OPTIONS, "--workers", 1) == 1
    line = one_error_line()
    assert "No space left on device" in line
    assert "make room and run again" in line
    for path in (place / "out").glob("shard-*"):
        assert sha256_of(path) == sha256_of(prepared_photos / path.name)
    assert not (place / "out" / "manifest.json").exists()
    assert not any(place.rglob("*.tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=1m", place], check=True)
    assert data_prep(photos, place / "out", *PHOTO_OPTIONS, "--workers", 1) == 0
    assert bytes_of(place / "out") == bytes_of(prepared_photos)


def failing_fsync(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """What the kernel says when the last bytes of the file `name` are to go to the disk."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(f"{name}.tmp-"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr("data_prep.output.os.fsync", fsync)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, *(pytest.param(n, marks=pytest.mark.slow) for n in (errno.EDQUOT, errno.EROFS, errno.EIO))]
)
@pytest.mark.parametrize("name", ["begun.json", "names.jsonl", "index.npy", "contact_sheet.png", "manifest.json"])
def test_a_disk_that_fails_at_any_file_is_one_line_and_the_run_can_go_on(
    photos: Path,
    prepared_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_error_line: Callable[[], str],
    name: str,
    number: int,
) -> None:
    if name != "begun.json":  # for the sake of time, all shards are there already
        assert data_prep(photos, tmp_path, *PHOTO_OPTIONS[:-1], 0, "--workers", 1) == 1
        one_error_line()
        for path in [tmp_path / other for other in ("names.jsonl", "rejects.jsonl", "index.npy")]:
            path.unlink()
    with monkeypatch.context() as patch:
        failing_fsync(patch, name, number)
        assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 1
    line = one_error_line()
    assert f"{name}: cannot be written ({os.strerror(number)})" in line
    assert line.endswith("make room and run again to go on from here") == (number in (errno.ENOSPC, errno.EDQUOT))
    assert not any(tmp_path.rglob(f"{name}*"))
    assert not (tmp_path / "manifest.json").exists()
    if number == errno.ENOSPC:
        assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 0
        assert bytes_of(tmp_path) == bytes_of(prepared_photos)


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000000.json"])
def test_a_disk_that_is_full_at_a_shard_leaves_no_part_of_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (plan, *_) = plan_shards(open_source(str(photos)), 5, {})
    with claimed(tmp_path) as staging:
        failing_fsync(monkeypatch, name, errno.ENOSPC)
        with pytest.raises(DataPrepError, match=rf"{name}: cannot be written \(No space left on device\); make room"):
            write_shard(plan, Recipe(image_size=32), tmp_path, staging)
        assert not any(tmp_path.rglob(f"{name}*"))
        assert load_result(plan, tmp_path, staging) is None


def test_an_output_on_a_read_only_disk_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error_line: Callable[[], str]
) -> None:
    def mkdir(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert data_prep(photos, tmp_path / "out", *PHOTO_OPTIONS) == 1
    assert one_error_line() == f"error: {tmp_path / 'out'}: cannot be written (Read-only file system)"


def test_too_little_room_is_told_before_anything_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error_line: Callable[[], str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("data_prep.write.disk.shutil.disk_usage", lambda _: usage._replace(free=25_000))
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 2
    assert " kB, 25.0 kB are free; make room or give a folder on another disk" in one_error_line()
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--size", 31, "--workers", 1) == 0  # so it holds nothing to that


def test_the_estimate_is_what_will_be_written(big: Path, prepared_big: Path) -> None:
    source = open_source(str(big))
    plans = plan_shards(source, 5, {})
    room = check_room(plans, Recipe(image_size=64), prepared_big)
    written = sum(path.stat().st_size for path in prepared_big.glob("shard-*"))
    assert 0.7 * written < room.needed < 1.1 * written  # each tar is padded to 10 KiB, which it does not count
    part = check_room(plans[3:9], Recipe(image_size=64), prepared_big)
    assert part.needed == pytest.approx(room.needed * 6 / 24, rel=0.05)


def test_read_only_output_is_one_line(photos: Path, mounted: Callable[[str], Path]) -> None:
    assert "Read-only file system" in failing_run(photos, mounted("ro") / "out", *PHOTO_OPTIONS)


@pytest.mark.parametrize("seconds", [0.1, 0.2])  # while the workers import what they need
def test_ctrl_c_is_one_line_and_ends_the_workers(big: Path, tmp_path: Path, seconds: float) -> None:
    run_it = command(big, tmp_path, *BIG_OPTIONS)
    # Background jobs of a shell are started deaf to SIGINT, and so would be what these tests start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(run_it, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        signal.signal(signal.SIGINT, before)
        wait_until(lambda: bool(children_of(run.pid)))
        time.sleep(seconds)
        workers = children_of(run.pid)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does it: to the workers too
        _, stderr = run.communicate(timeout=60)
    assert (run.returncode, stderr) == (130, "error: interrupted; run again to go on from here\n")
    assert not any(is_alive(worker) for worker in workers)


def test_a_dying_worker_is_one_line_and_the_run_can_go_on(big: Path, prepared_big: Path, tmp_path: Path) -> None:
    with subprocess.Popen(command(big, tmp_path, *BIG_OPTIONS), stderr=subprocess.PIPE, text=True) as run:
        wait_until(lambda: any(tmp_path.glob(".staging/*.tar.tmp-*")))
        os.kill(children_of(run.pid)[0], signal.SIGKILL)
        _, stderr = run.communicate(timeout=60)
    assert run.returncode == 1
    assert len(stderr.splitlines()) == 1, stderr
    assert "a worker process died" in stderr
    assert data_prep(big, tmp_path, *BIG_OPTIONS) == 0
    assert bytes_of(tmp_path) == bytes_of(prepared_big)


def test_an_image_for_which_memory_does_not_do_is_one_line_that_names_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here while the room is estimated; the workers call the same function."""

    def exhausted(_: Image.Image, __: int) -> Image.Image:
        raise MemoryError

    monkeypatch.setitem(TRANSFORMS, "ddpm", exhausted)
    assert data_prep(photos, tmp_path / "out", *PHOTO_OPTIONS, "--transform", "ddpm") == 1
    assert "bird/0.png: not enough memory for this image" in error_line(capsys)
