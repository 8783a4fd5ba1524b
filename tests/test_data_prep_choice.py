"""Promises on which files of a folder or an archive are images, of which split, and that the rest is counted."""

import os
import re
from pathlib import Path

import pytest

from data_prep.errors import InputError
from data_prep.format import UNLABELLED, load_manifest
from data_prep.sources import Source, Wanted, open_source
from data_prep.sources.rules import BY_PRODUCT, MASK, MEDIA, PACKED, SIDECAR, SPECIAL
from tests.data_prep_harness import data_prep, error_line, file_of, noise, packed
from tests.test_data_prep_lmdb import lsun
from tests.test_data_prep_parquet import write as write_parquet
from tests.test_data_prep_tfrecords import write as write_tfrecords

PNG = file_of(noise(16, 16, seed=0), "PNG")
WORDS = ("read", "written", "rejected", "left out")
VALIDATION = "images of split validation"


def make(place: Path, kind: str, names: list[str], contents: dict[str, bytes] | None = None) -> Path:
    """A folder, zip or tar of files of these names: images, unless `contents` says otherwise."""
    files = dict.fromkeys(names, PNG) | (contents or {})
    return packed(place / {"folder": "in", "zip": "in.zip", "tar": "in.tar"}[kind], files)


def labels_of(source: Source) -> dict[str, str | None]:
    """The class of each image by its name."""
    labels = [source.label(i) for i in range(len(source.names))]
    return {name: None if label == UNLABELLED else source.classes[label] for name, label in zip(source.names, labels)}


anywhere = pytest.mark.parametrize("kind", ["folder", "zip", "tar"])


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (".DS_Store", BY_PRODUCT),
        ("cat/._a.png", BY_PRODUCT),
        ("__MACOSX/cat/a.png", BY_PRODUCT),
        ("cat/@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg", BY_PRODUCT),
        ("#recycle/a.png", BY_PRODUCT),
        ("$RECYCLE.BIN/S-1-5-21/$R1ABC.jpg", BY_PRODUCT),
        ("System Volume Information/a.png", BY_PRODUCT),
        ("lost+found/a.png", BY_PRODUCT),
        ("cat/Thumbs.db", BY_PRODUCT),
        ("Desktop.ini", BY_PRODUCT),
        (".ipynb_checkpoints/a.png", BY_PRODUCT),
        ("cat/notes.txt", SIDECAR),
        ("a.JSON", SIDECAR),
        ("metadata.csv", SIDECAR),
        ("metadata.jsonl", SIDECAR),
        ("README", SIDECAR),
        ("LICENSE.md", SIDECAR),
        ("annotations/a.xml", SIDECAR),
        ("cat/clip.MOV", MEDIA),
        ("more.tar.gz", PACKED),
        ("more.rar", PACKED),
        ("cat/a_mask.png", MASK),
        ("cat/a.seg.png", MASK),
        ("cat/a-depth.tiff", MASK),
    ],
)
@anywhere
def test_what_is_no_image_by_its_name_is_left_out_and_counted(tmp_path: Path, kind: str, name: str, rule: str) -> None:
    """It changes neither classes nor order nor fingerprint."""
    clean = ["cat/a.png", "dog/b.jpg", "dog/no_suffix"]
    source = open_source(str(make(tmp_path / "1", kind, clean, {name: b"no image"})))
    alone = open_source(str(make(tmp_path / "2", kind, clean)))
    assert source.names == alone.names
    assert labels_of(source) == labels_of(alone)
    assert source.left_out == {rule: 1}
    assert not alone.left_out
    if kind != "tar":  # where an archive's images lie counts
        assert source.fingerprint == alone.fingerprint


def test_the_top_of_a_disk_is_read_though_lost_and_found_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path, "folder", ["a.png", "lost+found/b.png", "pets/c.png"])
    scandir = os.scandir

    def closed(name: str) -> None:
        def listed(path: str | Path) -> object:
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", listed)

    closed("lost+found")
    source = open_source(str(root))
    assert source.names == ["a.png", "pets/c.png"]
    assert source.left_out == {BY_PRODUCT: 1}
    closed("pets")
    with pytest.raises(InputError, match=r"pets: cannot be listed \(Permission denied\)"):
        open_source(str(root))


@anywhere
def test_masks_lie_in_a_folder_of_their_own(tmp_path: Path, kind: str) -> None:
    names = ["JPEGImages/a.jpg", "JPEGImages/b.jpg", "SegmentationClass/a.png", "SegmentationClass/b.png"]
    source = open_source(str(make(tmp_path, kind, names)))
    assert (source.names, source.classes, source.left_out) == (names[:2], [], {MASK: 2})


@anywhere
def test_names_like_masks_without_their_image_are_images(tmp_path: Path, kind: str) -> None:
    names = ["a_mask.png", "b.seg.png", "masks/carnival.jpg", "masks/venice.jpg", "people/anna.jpg"]
    assert open_source(str(make(tmp_path, kind, names))).names == names


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("training_set", "validation_set"),
        ("train2017", "val2017"),
        ("Train", "Valid"),
        ("data/images/train", "data/images/dev"),
    ],
)
@anywhere
def test_folders_called_after_splits_are_splits_and_no_classes(tmp_path: Path, kind: str, train: str, val: str) -> None:
    names = [f"{train}/cat/1.png", f"{train}/dog/2.png", f"{val}/dog/3.png", "README.md"]
    path = make(tmp_path, kind, names)
    source = open_source(str(path))
    assert labels_of(source) == {names[0]: "cat", names[1]: "dog"}
    assert source.left_out == {SIDECAR: 1, VALIDATION: 1}
    assert "split" in source.notice
    assert "train 2, validation 1" in source.notice
    held_out = open_source(str(path), Wanted(split="validation"))
    assert labels_of(held_out) == {names[2]: "dog"}
    assert held_out.classes == source.classes  # or a dog of one split would be a cat of the other
    both = open_source(str(path), Wanted(split="all"))
    assert sorted(both.names) == sorted(names[:3])
    assert both.classes == ["cat", "dog"]
    with pytest.raises(InputError, match=r"has no split test; it has train, validation"):
        open_source(str(path), Wanted(split="test"))


@anywhere
def test_a_split_without_class_folders_has_no_labels(tmp_path: Path, kind: str) -> None:
    """ImageNet's val is one heap."""
    path = make(tmp_path, kind, ["train/n01/1.png", "train/n02/2.png", "val/3.png", "val/4.png"])
    assert open_source(str(path)).classes == ["n01", "n02"]
    assert labels_of(open_source(str(path), Wanted(split="validation"))) == {"val/3.png": None, "val/4.png": None}


@anywhere
def test_a_part_beside_splits_is_left_out_and_alone_a_class(tmp_path: Path, kind: str) -> None:
    names = ["test/1.png", "train/2.png", "unlabeled/3.png", "teaser.png"]
    source = open_source(str(make(tmp_path / "1", kind, names)))
    assert source.names == ["train/2.png"]
    assert source.left_out == {"images of split test": 1, "images outside the splits": 2}
    source = open_source(str(make(tmp_path / "2", kind, names[1:3])))
    assert source.classes == ["train", "unlabeled"]


@anywhere
def test_file_names_tell_splits_where_all_do(tmp_path: Path, kind: str) -> None:
    names = ["test-0001.png", "train-0001.png", "train-0002.png"]
    path = make(tmp_path / "1", kind, names)
    assert open_source(str(path)).names == names[1:]
    assert open_source(str(path), Wanted(split="test")).names == names[:1]
    names = [*names, "trains.png"]
    assert open_source(str(make(tmp_path / "2", kind, names))).names == names


@pytest.mark.parametrize(
    "names",
    [
        ["bus/1.png", "car/2.png", "train/3.png"],
        ["test/1.png", "test/2.png"],
        ["train 1.png", "train 2.png"],
        ["test/cat/1.png", "test/dog/2.png"],
    ],
)
@anywhere
def test_a_class_or_a_single_folder_called_train_or_test_is_no_split(
    tmp_path: Path, kind: str, names: list[str]
) -> None:
    path = make(tmp_path, kind, names)
    assert open_source(str(path)).names == names
    with pytest.raises(InputError, match="has no split validation"):
        open_source(str(path), Wanted(split="validation"))


@pytest.mark.parametrize("ending", ["tar", "zip", "parquet"])
@pytest.mark.parametrize("style", ["{}.{}", "cc3m-{}-0000.{}", "{}/0000.{}", "data/{}-00000-of-00001.{}"])
def test_names_of_archives_tell_splits(tmp_path: Path, ending: str, style: str) -> None:
    root = tmp_path / "in"
    for count, split in enumerate(["test", "train"], 1):
        path = root / style.format(split, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == "parquet":
            write_parquet(path, [PNG] * count)
        else:
            make(tmp_path / split, ending, [f"{i}.png" for i in range(count)]).rename(path)
    for split, count in {"train": 2, "test": 1}.items():
        source = open_source(str(root), Wanted(split=split))
        assert len(source.names) == count
        assert f"reads 1 of 2 files: split {split}" in source.notice
        assert source.left_out == {f"files of split {'test' if split == 'train' else 'train'}": 1}
    with pytest.raises(InputError, match="has no split validation; it has test, train"):
        open_source(str(root), Wanted(split="validation"))


def test_splits_are_for_sources_that_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lsun(tmp_path / "church", [PNG])
    assert data_prep(tmp_path / "church", tmp_path / "out", "--split", "val") == 2
    assert "--split validation is for sources that have splits; this is lmdb" in error_line(capsys)
    assert data_prep(tmp_path / "church", tmp_path / "out", "--split", "tran") == 2
    assert "--split: 'tran' is none of train, validation, test, all" in error_line(capsys)


def test_a_tar_of_a_folder_by_a_dot_is_read_as_one_without(tmp_path: Path) -> None:
    """`tar -cf in.tar .` writes `./` before each name."""
    labels = {"./dataset.json": b'{"labels": [["train/1.png", 4]]}'}
    source = open_source(str(make(tmp_path, "tar", ["./train/1.png", "./val/2.png"], labels)))
    assert labels_of(source) == {"./train/1.png": "4"}


def of_kind(kind: str, place: Path) -> tuple[Path, int, dict[str, int]]:
    """A source with one image that is none, how many things lie in it, and what of them is left out; one more, the
    caption of an image, goes with it.
    """
    litter = {"a/@eaDir/1.png": b"x", "a/notes.txt": b"x", "a/1.seg.png": PNG, "a/broken.png": b"<html>"}
    litter["a/2.txt"] = b"a caption"
    if kind in ("folder", "zip", "tar"):
        names = ["a/1.png", "a/2.png", "b/3.png"]
        return make(place, kind, names, litter), 7, {BY_PRODUCT: 1, SIDECAR: 1, MASK: 1}
    if kind == "parquet":
        write_parquet(place / "in" / "train.parquet", [PNG, PNG, b"<html>"])
        write_parquet(place / "in" / "test.parquet", [PNG])
        return place / "in", 4, {"files of split test": 1}
    if kind == "tfrecords":
        for resolution in (3, 4):
            write_tfrecords(place / "in", resolution, count=3)
        return place / "in", 4, {"files of other resolutions": 1}
    lsun(place / "in", [PNG, b"<html>", PNG])
    return place / "in", 3, {}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "parquet", "tfrecords", "lmdb"])
def test_read_is_written_rejected_and_left_out(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, things, left_out = of_kind(kind, tmp_path)
    if kind == "folder":
        os.mkfifo(path / "pipe.png")
        things, left_out = things + 1, left_out | {SPECIAL: 1}
        assert things + 1 == sum(len(files) for _, _, files in os.walk(path))
    out = tmp_path / "out"
    for _ in range(2):  # the second time it is finished already
        assert data_prep(path, out, "--size", 16, "--max-reject-fraction", 0.5, "--workers", 1) == 0
        printed, said = capsys.readouterr()
        found = {word: int(re.search(rf"^{word} +(\d+)", printed, re.MULTILINE)[1]) for word in WORDS}
        assert found["read"] == things == found["written"] + found["rejected"] + found["left out"]
        assert found["left out"] == sum(left_out.values())
        assert bool(re.search("^ +1  txt$", printed, re.MULTILINE)) == (kind in ("folder", "zip", "tar"))
        for rule, count in left_out.items():
            assert f"          {count} {rule}\n" in printed
            assert f"{count} {rule}" in said
    assert load_manifest(out).report.get("left_out", {}) == left_out
    assert data_prep("inspect", out) == 0
    assert f"left out  {sum(left_out.values())}\n" in capsys.readouterr().out
