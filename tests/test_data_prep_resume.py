"""Promises of a run that is stopped, repeated or given again: the same bytes whatever happens, or a refusal."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.format import sha256_of
from tests.data_prep_harness import (
    BIG_OPTIONS,
    PHOTO_OPTIONS,
    bytes_of,
    children_of,
    command,
    data_prep,
    error_line,
    is_alive,
    wait_until,
)


def test_bytes_do_not_depend_on_the_number_of_workers(prepared_photos: Path, photos: Path, tmp_path: Path) -> None:
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 3) == 0
    assert bytes_of(tmp_path) == bytes_of(prepared_photos)


@pytest.mark.parametrize("results", [0, 8])
def test_kill_9_then_rerun_gives_the_bytes_of_an_uninterrupted_run(
    big: Path, prepared_big: Path, tmp_path: Path, results: int
) -> None:
    staging = tmp_path / ".staging"
    with subprocess.Popen(command(big, tmp_path, *BIG_OPTIONS)) as run:
        wait_until(lambda: len(list(staging.glob("shard-*.json"))) >= results and any(staging.glob("*.tar.tmp-*")))
        workers = children_of(run.pid)
        run.kill()
    assert not (tmp_path / "manifest.json").exists()
    wait_until(lambda: not any(is_alive(worker) for worker in workers))
    done = [path.name for path in staging.glob("shard-*.json")]
    before = {name: (tmp_path / name).with_suffix(".tar").stat().st_mtime_ns for name in done}
    assert results <= len(done) < 24
    for path in tmp_path.glob("*.tar"):
        assert sha256_of(path) == sha256_of(prepared_big / path.name)  # whole, or not there

    assert data_prep(big, tmp_path, *BIG_OPTIONS) == 0
    assert bytes_of(tmp_path) == bytes_of(prepared_big)
    assert before == {name: (tmp_path / name).with_suffix(".tar").stat().st_mtime_ns for name in done}  # not again


def test_a_lost_tar_is_written_again_on_resume(photos: Path, prepared_photos: Path, tmp_path: Path) -> None:
    strict = [*PHOTO_OPTIONS[:-1], "0"]
    assert data_prep(photos, tmp_path, *strict, "--workers", 1) == 1  # complete but for the manifest
    (tmp_path / "shard-000000.tar").unlink()
    os.truncate(tmp_path / "shard-000001.tar", 512)
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 0
    assert bytes_of(tmp_path) == bytes_of(prepared_photos)


@pytest.mark.parametrize("damaged", ["shard-000000.tar", ".staging/shard-000000.json"])
def test_what_changed_in_an_unfinished_folder_is_written_again_on_resume(
    photos: Path, prepared_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    strict = [*PHOTO_OPTIONS[:-1], "0"]
    assert data_prep(photos, tmp_path, *strict, "--workers", 1) == 1  # complete but for the manifest
    untouched = (tmp_path / "shard-000001.tar").stat().st_mtime_ns
    content = bytearray((tmp_path / damaged).read_bytes())
    content[1500 if damaged.endswith(".tar") else -20] ^= 1
    (tmp_path / damaged).write_bytes(content)
    capsys.readouterr()
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 0
    assert f"{tmp_path / 'shard-000000.tar'}: changed since it was written" in capsys.readouterr().out
    assert bytes_of(tmp_path) == bytes_of(prepared_photos)
    assert (tmp_path / "shard-000001.tar").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe"])
def test_a_note_of_what_was_begun_that_cannot_be_read_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    strict = [*PHOTO_OPTIONS[:-1], "0"]
    assert data_prep(photos, tmp_path, *strict, "--workers", 1) == 1
    (tmp_path / ".staging" / "begun.json").write_bytes(content)
    capsys.readouterr()
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS) == 2
    assert re.search(r"^error: .*begun\.json: cannot be read \(.*\); remove .* and run again$", error_line(capsys))


def test_rerun_of_a_finished_dataset_does_nothing_and_says_so(
    photos: Path, prepared_photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {path: path.stat().st_mtime_ns for path in prepared_photos.iterdir()}
    (prepared_photos / ".staging").mkdir()  # as a run leaves it that is killed right after the manifest
    assert data_prep(photos, prepared_photos, *PHOTO_OPTIONS) == 0
    out = capsys.readouterr().out
    assert "already finished" in out
    assert "rejected  2" in out
    assert {path: path.stat().st_mtime_ns for path in prepared_photos.iterdir()} == times


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--size", "31"], "--size 32"),
        (["--transform", "area"], "--transform 'ddpm'"),
        (["--format", "png"], "--format 'webp'"),
        (["--mode", "L"], "--mode 'RGB'"),
        (["--shard-samples", "6"], "--shard-samples 5"),
        (["--upscale"], "--upscale False"),
    ],
)
def test_other_parameters_are_refused_by_name(
    photos: Path, prepared_photos: Path, one_error_line: Callable[[], str], changed: list[str], named: str
) -> None:
    before = bytes_of(prepared_photos)
    assert data_prep(photos, prepared_photos, *PHOTO_OPTIONS, *changed) == 2
    assert named in one_error_line()
    assert bytes_of(prepared_photos) == before


def test_other_parameters_and_sources_are_refused_in_an_unfinished_folder(
    photos: Path, big: Path, tmp_path: Path, one_error_line: Callable[[], str]
) -> None:
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS[:-1], 0, "--workers", 1) == 1
    one_error_line()
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--size", 31) == 2
    assert "--size 32" in one_error_line()
    assert data_prep(big, tmp_path, *PHOTO_OPTIONS) == 2
    assert "source" in one_error_line()


def test_a_run_is_not_resumed_with_other_codecs(
    photos: Path,
    prepared_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_error_line: Callable[[], str],
) -> None:
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS[:-1], 0, "--workers", 1) == 1  # complete but for the manifest
    one_error_line()
    with monkeypatch.context() as patch:
        patch.setattr("PIL.features.version", lambda feature: "0.0" if feature == "webp" else None)
        assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 2
        assert re.search(r"made with the libraries '.*', this run says 'Pillow .*, libwebp 0\.0'", one_error_line())
        assert data_prep(photos, prepared_photos, *PHOTO_OPTIONS) == 0  # finished is finished
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 0
    assert bytes_of(tmp_path) == bytes_of(prepared_photos)
    assert "libwebp" not in (tmp_path / "manifest.json").read_text()


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from data_prep.write import build
from data_prep import cli

name, when, *arguments = sys.argv[1:]
whole_file = build.whole_file

@contextmanager
def killing(path, staging):
    with whole_file(path, staging) as stream:
        yield stream
        if (path.name, when) == (name, "written"):
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    if (path.name, when) == (name, "named"):
        os.kill(os.getpid(), signal.SIGKILL)

build.whole_file = killing
sys.exit(cli.main(arguments))
"""


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("index.npy", "written"),
        ("manifest.json", "named"),
        *(
            pytest.param(name, when, marks=pytest.mark.slow)
            for name, when in (
                ("names.jsonl", "written"),
                ("rejects.jsonl", "named"),
                ("index.npy", "named"),
                ("contact_sheet.png", "written"),
                ("contact_sheet.png", "named"),
                ("manifest.json", "written"),
            )
        ),
    ],
)
def test_kill_9_while_merging_then_rerun_gives_the_bytes_of_an_uninterrupted_run(
    photos: Path, prepared_photos: Path, tmp_path: Path, name: str, when: str
) -> None:
    arguments = [name, when, photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1]
    run = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], timeout=60, check=False)
    assert run.returncode == -signal.SIGKILL
    assert any(tmp_path.rglob(f"{name}.tmp-*")) == (when == "written")
    assert (tmp_path / name).exists() == (when == "named")
    assert (tmp_path / "manifest.json").exists() == ((name, when) == ("manifest.json", "named"))
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 0
    assert bytes_of(tmp_path) == bytes_of(prepared_photos)


def test_a_damaged_finished_dataset_is_not_called_finished(
    photos: Path, tmp_path: Path, one_error_line: Callable[[], str]
) -> None:
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 0
    (tmp_path / "shard-000001.tar").unlink()
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS) == 2
    assert "shard-000001.tar: missing" in one_error_line()


@pytest.mark.parametrize("content", [None, b"<html>\n", b"[1]\n", b"\xff\n"])
def test_a_finished_dataset_whose_rejects_cannot_be_read_is_one_line(
    photos: Path, prepared_photos: Path, tmp_path: Path, one_error_line: Callable[[], str], content: bytes | None
) -> None:
    copy = Path(shutil.copytree(prepared_photos, tmp_path / "copy"))
    (copy / "rejects.jsonl").unlink()
    if content is not None:
        (copy / "rejects.jsonl").write_bytes(content)
    assert data_prep(photos, copy, *PHOTO_OPTIONS) == 2
    assert "rejects.jsonl: cannot be read" in one_error_line()
