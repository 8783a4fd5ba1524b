"""Promises of CIFAR-10 as a source: both versions give the same images, and no pickle runs anything."""

import io
import os
import pickle
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.format import load_manifest
from data_prep.inspection.dataset import Dataset
from data_prep.sources import Wanted, open_source
from tests.data_prep_harness import command, data_prep, error_line

ROWS = 6  # of 10,000 to a batch
WORDS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


def batch_of(number: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (ROWS, 3072), dtype=np.uint8), rng.integers(0, 10, ROWS).tolist()


def python_2_pickle(pixels: np.ndarray, labels: list[int], name: str) -> bytes:
    """The original's own opcodes: Python 2 strings as keys, and numpy's names of that time."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value  # BINSTRING

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n" + b"(" + text(b"u1") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t" + text(b"b") + b"tR"
    shape = b"(" + integer(len(pixels)) + integer(3072) + b"t"
    array += b"(" + integer(1) + shape + dtype + b"I00\n" + text(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    items = text(b"data") + array + text(b"labels") + numbers + text(b"batch_label") + text(name.encode())
    return b"\x80\x02}(" + items + b"u."


def python_3_pickle(pixels: np.ndarray, labels: list[int], name: str) -> bytes:
    batch = {b"batch_label": name.encode(), b"labels": labels, b"data": pixels, b"filenames": [b"x.png"] * ROWS}
    return pickle.dumps(batch, protocol=2)


def write_python(folder: Path, dump=python_2_pickle) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate([*TRAIN, "test_batch"]):
        (folder / name).write_bytes(dump(*batch_of(number), name))
    meta = {b"num_cases_per_batch": ROWS, b"label_names": [word.encode() for word in WORDS], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    (folder / "readme.html").write_text("<html>")
    return folder


def write_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate([*TRAIN, "test_batch"]):
        pixels, labels = batch_of(number)
        rows = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels))
        (folder / f"{name}.bin").write_bytes(rows)
    (folder / "batches.meta.txt").write_text("\n".join([*WORDS, ""]))
    return folder


def archived(folder: Path) -> Path:
    path = folder.parent / f"{folder.name}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    return path


MAKERS = {
    "python 2": lambda root: write_python(root / "cifar-10-batches-py"),
    "python 3": lambda root: write_python(root / "cifar-10-batches-py", python_3_pickle),
    "python unpacked into": lambda root: write_python(root / "in" / "cifar-10-batches-py").parent,
    "python archive": lambda root: archived(write_python(root / "cifar-10-batches-py")),
    "binary": lambda root: write_binary(root / "cifar-10-batches-bin"),
    "binary archive": lambda root: archived(write_binary(root / "cifar-10-batches-bin")),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("split", "numbers"), [("train", range(5)), ("test", [5])])
def test_every_version_gives_every_pixel_and_label(tmp_path: Path, maker: str, split: str, numbers: range) -> None:
    source = open_source(str(MAKERS[maker](tmp_path)), Wanted(split=split))
    assert (source.kind, list(source.classes), len(source.names)) == ("cifar10", WORDS, ROWS * len(numbers))
    for batch, number in enumerate(numbers):
        pixels, labels = batch_of(number)
        for row in range(ROWS):
            i = batch * ROWS + row
            image = np.asarray(source.read(i))
            np.testing.assert_array_equal(image, pixels[row].reshape(3, 32, 32).transpose(1, 2, 0))
            assert source.label(i) == labels[row]


def test_the_versions_are_the_same_dataset(tmp_path: Path) -> None:
    prints = set()
    for number, maker in enumerate(MAKERS.values()):
        (tmp_path / str(number)).mkdir()
        prints.add(open_source(str(maker(tmp_path / str(number)))).fingerprint)
    assert len(prints) == 1


def test_a_dataset_is_made_of_it(tmp_path: Path) -> None:
    archive = MAKERS["python archive"](tmp_path)
    options = ["--size", 32, "--shard-samples", 4, "--workers", 2, "--split", "test"]
    assert data_prep(archive, tmp_path / "out", *options) == 0
    pixels, labels = batch_of(5)
    dataset = Dataset.open(tmp_path / "out")
    assert load_manifest(tmp_path / "out").classes == WORDS
    assert dataset.index["label"].tolist() == labels
    for i in range(ROWS):
        expected = pixels[i].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(dataset.read(i)), expected)


class Bomb:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["data_batch_3", "batches.meta"])
def test_a_malicious_pickle_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int, place: str
) -> None:
    folder = write_python(tmp_path / "cifar-10-batches-py")
    mark = tmp_path / "pwned"
    for number, bomb in enumerate([Bomb(os.system, f"touch {mark}"), Bomb(open, str(mark), "w"), Bomb(eval, "1")]):
        (folder / place).write_bytes(pickle.dumps({b"data": bomb, b"labels": [], b"label_names": bomb}, protocol))
        assert data_prep(folder, tmp_path / f"out{number}") == 2
        line = error_line(capsys)
        assert place in line
        assert "which has no place in a data set" in line
        assert not mark.exists()


OBJECTS = (1,), "O", b"A" * 8  # an array of one object, whose address is in the bytes


@pytest.mark.parametrize("place", ["data_batch_3", "batches.meta"])
@pytest.mark.parametrize("bomb", [Bomb(np.ndarray, *OBJECTS), Bomb(np.dtype, "O")], ids=["ndarray", "dtype"])
def test_numpy_is_not_called_on_a_pickles_word(tmp_path: Path, place: str, bomb: Bomb) -> None:
    """In a process of its own: looking at such an array ends it by a signal."""
    folder = write_python(tmp_path / "cifar-10-batches-py")
    (folder / place).write_bytes(pickle.dumps({b"data": bomb, b"labels": [0], b"label_names": bomb}, 2))
    done = subprocess.run(command(folder, tmp_path / "out"), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: .*{place}: cannot be read as CIFAR-10's pickle .*\n", done.stderr)


class Array(np.ndarray):
    """Pickled with whatever state it is told."""

    state: tuple = ()

    def __reduce__(self) -> tuple:
        return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize(
    "state",
    [
        (1, (2, 3072), np.dtype("u1"), False, bytes(3072)),
        (1, (2, -3072), np.dtype("u1"), False, bytes(6144)),
        (1, (2, 3072), "O", False, bytes(6144)),
        (1, (1, 1), np.dtype("u1"), False, [1]),
        (1, (True, 2), np.dtype("u1"), False, bytes(2)),
        None,
    ],
)
def test_an_array_whose_parts_contradict_each_other_is_refused(tmp_path: Path, state: tuple | None) -> None:
    folder = write_python(tmp_path / "cifar-10-batches-py")
    array = np.zeros(0).view(Array)
    array.state = (state,) if state is None else state
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": array, b"labels": [0, 1]}, 2))
    with pytest.raises(InputError, match=r"data_batch_2: .*do not belong together"):
        open_source(str(folder))


@pytest.mark.parametrize("names", [7, b"airplane", [b"airplane", 1], {b"airplane": 0}])
def test_class_names_that_are_no_words_are_refused(tmp_path: Path, names: object) -> None:
    folder = write_python(tmp_path / "cifar-10-batches-py")
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, 2))
    with pytest.raises(InputError, match=r"batches\.meta .*should be a list of words"):
        open_source(str(folder))


@pytest.mark.parametrize(
    "call",
    [
        (np.ndarray, (2,), b"b"),
        (np.dtype, (0,), b"b"),
    ],
)
def test_numpys_own_constructor_is_admitted_only_as_numpy_uses_it(tmp_path: Path, call: tuple) -> None:
    folder = write_python(tmp_path / "cifar-10-batches-py")
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=2)
    pickler.dump({b"data": Bomb(np.empty(0).__reduce__()[0], *call), b"labels": []})
    (folder / "data_batch_1").write_bytes(stream.getvalue())
    with pytest.raises(InputError, match=r"data_batch_1: .*an array that numpy did not write"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1], 2), "not a batch"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, 2), "an array of 'f8'"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.int64), b"labels": [0, 1]}, 2), "not a batch"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, 2), "should be 2 integers"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, 2), "labels outside 0..9"),
        (b"\x80\x02}(", "cannot be read as CIFAR-10's pickle"),
        (b"", "cannot be read as CIFAR-10's pickle"),
    ],
)
def test_a_file_that_is_no_batch_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_python(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_4").write_bytes(content)
    with pytest.raises(InputError, match=f"data_batch_4.*{message}"):
        open_source(str(folder))


def test_missing_and_cut_batches_are_named(tmp_path: Path) -> None:
    folder = write_binary(tmp_path / "bin")
    (folder / "data_batch_2.bin").write_bytes(bytes(3072))
    with pytest.raises(InputError, match=r"data_batch_2\.bin is cut"):
        open_source(str(folder))
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(InputError, match="has no data_batch_2"):
        open_source(str(folder))


def test_an_archive_writes_nothing_and_follows_no_link(tmp_path: Path) -> None:
    archive = tmp_path / "cifar.tar.gz"
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    with tarfile.open(archive, "w:gz") as tar:
        for number, name in enumerate(TRAIN):
            data = python_2_pickle(*batch_of(number), name)
            member = tarfile.TarInfo(f"../../{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    assert len(open_source(str(archive)).names) == 5 * ROWS
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="has no test_batch"):
        open_source(str(archive), Wanted(split="test"))


def test_other_compressed_archives_and_splits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match="compressed and not CIFAR-10"):
        open_source(str(archived(tmp_path / "in")))
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    with pytest.raises(InputError, match=r"not a readable \.tar\.gz"):
        open_source(str(tmp_path / "broken.tar.gz"))
    with pytest.raises(InputError, match="has no split validation; it has train, test"):
        open_source(str(write_python(tmp_path / "py")), Wanted(split="validation"))
