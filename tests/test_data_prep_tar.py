"""Promises of tar archives and of `.npy` files as sources: no image is merged, lost or taken from elsewhere."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_prep.errors import InputError, Reject
from data_prep.format import UNLABELLED, load_manifest
from data_prep.inspection.dataset import Dataset
from data_prep.recipe import Recipe
from data_prep.sources import open_source
from data_prep.sources.rules import BY_PRODUCT, MASK, SIDECAR
from data_prep.tar_headers import list_members
from data_prep.write.convert import convert
from tests.data_prep_harness import data_prep, file_of, noise, npy_of, pixels_of_noise, write_tar


def png(seed: int = 0, side: int = 8) -> bytes:
    return file_of(noise(side, side, seed=seed), "PNG")


def test_dotted_odd_and_repeated_names_are_all_read(tmp_path: Path) -> None:
    names = [
        "a.1.jpg",
        "a.2.jpg",
        "ünï-日本.png",
        "what?#1.png",
        "d/" + "l" * 150 + ".png",
        "no_suffix",
        "x.png",
        "x.png",
    ]
    files = [(name, png(i)) for i, name in enumerate(names)]
    source = open_source(str(write_tar(tmp_path / "in.tar", files, tarfile.PAX_FORMAT)))
    assert [(name, source.read(i)) for i, name in enumerate(source.names)] == files
    assert "2 webdataset keys hold several images ('a' holds 2)" in source.notice


def test_webdatasets_own_writer_is_read_with_its_labels(tmp_path: Path) -> None:
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for i in range(3):
                key, image = f"{i:04d}", np.asarray(noise(8, 8, seed=10 * shard + i))
                writer.write({"__key__": key, "png": image, "cls": 2 - i, "txt": "a bed", "json": {"label": 7}})
    source = open_source(str(tmp_path))
    assert list(source.names) == [f"{shard}.tar/{i:04d}.png" for shard in range(2) for i in range(3)]
    assert source.classes == ["0", "1", "2"]
    assert source.notice is None
    for i, seed in enumerate([0, 1, 2, 10, 11, 12]):
        assert source.label(i) == 2 - i % 3
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(source.read(i)))), np.asarray(noise(8, 8, seed)))
    part = pickle.loads(pickle.dumps(source.part(2, 5)))  # noqa: S301 - our own, on its way to a worker
    assert [(part.read(i), part.label(i)) for i in range(3)] == [(source.read(i), source.label(i)) for i in range(2, 5)]


def test_the_label_of_the_whole_name_goes_before_that_of_the_key(tmp_path: Path) -> None:
    files = [("a.1.png", png()), ("a.2.png", png()), ("a.2.cls", b"5"), ("a.cls", b" 3\n"), ("b.png", png())]
    source = open_source(str(write_tar(tmp_path / "in.tar", files)))
    assert list(source.names) == ["a.1.png", "a.2.png", "b.png"]
    assert [source.label(i) for i in range(3)] == [3, 5, UNLABELLED]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (['{"label": 1}', '{"label": 0}', '{"caption": "x"}'], ["0", "1"], [1, 0, UNLABELLED]),
        (['{"label": "owl"}', '{"label": "cat"}', "[]"], ["cat", "owl"], [1, 0, UNLABELLED]),
    ],
)
def test_labels_come_from_json(tmp_path: Path, labels: list[str], classes: list[str], expected: list[int]) -> None:
    files = [
        (f"{i}{end}", data)
        for i, text in enumerate(labels)
        for end, data in ((".png", png()), (".json", text.encode()))
    ]
    source = open_source(str(write_tar(tmp_path / "in.tar", files)))
    assert (source.classes, [source.label(i) for i in range(3)]) == (classes, expected)


def test_an_image_without_extension_beside_one_of_its_name_is_an_image(tmp_path: Path) -> None:
    files = [("a", png(1)), ("a.png", png(2)), ("a.txt", b"caption")]
    source = open_source(str(write_tar(tmp_path / "in.tar", files)))
    assert [source.read(i) for i in range(len(source.names))] == [png(1), png(2)]


def test_without_label_files_folders_are_classes(tmp_path: Path) -> None:
    source = open_source(str(write_tar(tmp_path / "in.tar", [("dog/1.png", png()), ("cat/1.png", png())])))
    assert (source.classes, [source.label(i) for i in range(2)]) == (["cat", "dog"], [1, 0])


def test_what_goes_with_an_image_or_is_no_image_by_its_name_is_left_out(tmp_path: Path) -> None:
    """Content decides only where a name says nothing."""
    files = [("a.png", png()), ("a.dat", b"1"), ("b.dat", b"1"), ("README.md", b"#"), (".DS_Store", b"x")]
    path = write_tar(tmp_path / "in.tar", files)
    source = open_source(str(path))
    assert list(source.names) == ["a.png", "b.dat"]
    assert source.left_out == {SIDECAR: 2, BY_PRODUCT: 1}
    assert data_prep(path, tmp_path / "out", "--size", 8, "--max-reject-fraction", 0.5, "--workers", 1) == 0
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["name"], reject["reason"]) for reject in rejects] == [("b.dat", "not an image")]


def test_pictures_that_go_with_an_image_are_no_images(tmp_path: Path) -> None:
    """As the stream of tars reads them: webdataset's fields of a sample; numbers alone name images of their own."""
    names = ["0.jpg", "0.seg.png", "0.depth.png", "0.2.png", "1.seg.png", "1.rgb.png"]
    source = open_source(str(write_tar(tmp_path / "in.tar", [(name, png()) for name in names])))
    assert list(source.names) == ["0.jpg", "0.2.png", "1.seg.png", "1.rgb.png"]
    assert source.left_out == {MASK: 2}


def test_names_that_climb_and_links_are_rejected(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    path = write_tar(tmp_path / "in.tar", [("../up.png", png()), ("/root.png", png()), ("ok.png", png())])
    with tarfile.open(path, "a") as tar:
        for kind, target in ((tarfile.SYMTYPE, str(secret)), (tarfile.LNKTYPE, "ok.png")):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, target
            tar.addfile(link)
    source = open_source(str(path))
    got = []
    for i in range(len(source.names)):
        try:
            got.append(source.read(i))
        except Reject as reject:
            got.append(reject.reason)
    assert got == ["unsafe name", "unsafe name", png(), "link", "link"]
    assert data_prep(path, tmp_path / "deep" / "out", "--size", 8, "--max-reject-fraction", 1, "--workers", 1) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"secret.png", "in.tar", "deep"}
    assert load_manifest(tmp_path / "deep" / "out").samples == 1


def header_of(member: int) -> int:
    """Where the header of a member of 8x8 PNGs begins."""
    return member * (512 + -(-len(png()) // 512) * 512)


DAMAGE = {
    "cut at a header": (lambda data: data[: header_of(5)], "cut off at offset .*: no end-of-archive mark"),
    "cut in a header": (lambda data: data[: header_of(5) + 100], "cut off at offset .*: no end-of-archive mark"),
    "cut in a member": (lambda data: data[: header_of(5) + 600], "cut off: the member at offset .* goes on to"),
    "damaged header": (
        lambda data: data[: header_of(5)] + b"\xff" + data[header_of(5) + 1 :],
        "damaged header at offset",
    ),
    "hole": (
        lambda data: data[: header_of(5)] + bytes(1024) + data[header_of(5) + 1024 :],
        "zeros at offset .* where a header should be",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_archive_is_an_error_not_a_shorter_one(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "in.tar", [(f"{i}.png", png()) for i in range(10)])
    assert len(list_members(path)) == 10
    change, message = DAMAGE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=rf"in\.tar: {message}.*; restore the file$"):
        open_source(str(path))


def test_images_beside_archives_are_refused_not_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", png())])
    (tmp_path / "b.png").write_bytes(png())
    with pytest.raises(InputError, match=r"holds a\.tar and b\.png; give a folder of one kind"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("archive", ["a.tar", "a.parquet", "data/a.parquet", "a.tfrecords"])
@pytest.mark.parametrize("image", ["cats/0.png", "cats/black/1.JPG"])
def test_images_below_a_folder_of_archives_are_refused_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: str, image: str
) -> None:
    (tmp_path / archive).parent.mkdir(exist_ok=True)
    if archive == "a.tar":
        write_tar(tmp_path / archive, [("a.png", png())])
    elif archive == "a.tfrecords":
        monkeypatch.setattr("data_prep.sources.tfrecords.is_tfrecords", lambda path: path.suffix == ".tfrecords")
        (tmp_path / archive).touch()
    else:
        (tmp_path / archive).write_bytes(b"PAR1")
    (tmp_path / image).parent.mkdir(parents=True)
    (tmp_path / image).write_bytes(png())
    with pytest.raises(InputError, match=f"holds {archive} and {image}; give a folder of one kind"):
        open_source(str(tmp_path))


def test_gnu_tar_and_empty_archives(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "gnu.tar", [("l" * 200 + ".png", png())], tarfile.GNU_FORMAT)
    assert list(open_source(str(path)).names) == ["l" * 200 + ".png"]
    with pytest.raises(InputError, match=f"holds no images .left out: 1 {BY_PRODUCT}"):
        open_source(str(write_tar(tmp_path / "empty" / "a.tar", [("notes/.keep", b"")])))


def test_a_label_that_is_no_class_number_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "in.tar", [("a.png", png()), ("a.cls", b"20261122")])
    with pytest.raises(InputError, match="label 20261122: not a class number"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.json", b"{"),
        ("b.json", b'{"label": [1]}'),
        ("b.json", b"[" * 100_000),
        ("b.cls", b""),
        ("b.cls", b"a man\non a horse"),
        ("b.cls", b"\xff\xfe"),
    ],
)
def test_a_label_file_without_a_label_is_told_of_and_stops_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    path = write_tar(tmp_path / "in.tar", [("a.png", png()), ("a.cls", b"1"), ("b.png", png()), (name, content)])
    source = open_source(str(path))
    assert [source.label(i) for i in range(2)] == [1, UNLABELLED]
    assert source.notice == f"1 label files hold no label, such as 'in.tar: {name}'; their images have none"


def test_labels_may_be_words_but_not_among_numbers(tmp_path: Path) -> None:
    files = [("a.png", png()), ("a.cls", b"n0144"), ("b.png", png()), ("b.cls", "\ufeffn0107\r\n".encode())]
    source = open_source(str(write_tar(tmp_path / "in.tar", files)))
    assert (source.classes, source.label(0), source.label(1)) == (["n0107", "n0144"], 1, 0)
    mixed = open_source(str(write_tar(tmp_path / "mixed.tar", [*files[:3], ("b.cls", b"3")])))
    assert [mixed.label(i) for i in range(2)] == [UNLABELLED, 3]
    assert "1 label files hold a word where others hold a class number, such as 'n0144'" in mixed.notice


# .npy


RGB = pixels_of_noise(8, 12, seed=0)


def stored(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(convert(data, Recipe(image_size=8, encoding="png")).data)))


@pytest.mark.parametrize(
    "array",
    [RGB, RGB.transpose(2, 0, 1), RGB.transpose(2, 0, 1)[None], RGB[None], np.asfortranarray(RGB)],
    ids=["HWC", "CHW", "1CHW", "1HWC", "column-major"],
)
def test_npy_of_any_layout_is_read(array: np.ndarray) -> None:
    np.testing.assert_array_equal(stored(npy_of(array)), RGB[:, 2:10])


@pytest.mark.parametrize("array", [RGB[..., 0], RGB[None, ..., 0], RGB[..., :1]], ids=["HW", "1HW", "HW1"])
def test_grey_npy_is_read(array: np.ndarray) -> None:
    np.testing.assert_array_equal(stored(npy_of(array)), np.repeat(RGB[:, 2:10, :1], 3, axis=2))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy_of(RGB.astype(np.float32)), "unsupported pixels"),
        (npy_of(np.array([{"a": 1}], object), allow_pickle=True), "unsupported pixels"),
        (npy_of(RGB[None].repeat(2, axis=0)), "unsupported pixels"),
        (npy_of(np.zeros((3, 8, 3), np.uint8)), "unsupported pixels"),
        (npy_of(np.zeros((8, 8, 2), np.uint8)), "unsupported pixels"),
        (npy_of(np.zeros(8, np.uint8)), "unsupported pixels"),
        (npy_of(np.zeros((0, 8, 3), np.uint8)), "unsupported pixels"),
        (npy_of(RGB)[:-1], "truncated or corrupt"),
        (npy_of(RGB)[:40], "truncated or corrupt"),
        (npy_of(RGB).replace(b"(8, 12, 3)", b"(8, 12,99)"), "truncated or corrupt"),
        (npy_of(RGB[:7]), "smaller than --size 8"),
    ],
)
def test_other_npy_is_rejected_and_never_unpickled(data: bytes, reason: str) -> None:
    with pytest.raises(Reject, match=reason):
        stored(data)


def test_npy_with_fewer_bytes_than_its_shape_says_so() -> None:
    with pytest.raises(Reject) as caught:
        stored(npy_of(RGB)[:-1])
    assert caught.value.detail == ".npy of shape (8, 12, 3) in 287 bytes"


def test_a_folder_of_npy_is_a_dataset_with_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        np.save(tmp_path / "in" / name / "1.npy", pixels_of_noise(8, 8, seed=len(name)).transpose(2, 0, 1)[None])
    assert data_prep(tmp_path / "in", tmp_path / "out", "--size", 8, "--workers", 1) == 0
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.manifest.classes == ["cat", "dog"]
    np.testing.assert_array_equal(np.asarray(dataset.read(1)), pixels_of_noise(8, 8, seed=3))
