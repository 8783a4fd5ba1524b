"""Promises on folders: links are followed by the names that the user gave, and one kind of source lies in each."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import InputError
from data_prep.sources import Wanted, open_source
from data_prep.sources.rules import LINK, SIDECAR
from tests.test_data_prep_choice import PNG, labels_of, make
from tests.test_data_prep_parquet import write as write_parquet


def test_linked_folders_are_read_and_told_of(tmp_path: Path) -> None:
    names = ["cat/1.png", "dog/2.png"]
    make(tmp_path / "disk", "folder", names)
    (tmp_path / "curated").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "curated" / name).symlink_to(tmp_path / "disk" / "in" / name)
    source = open_source(str(tmp_path / "curated"))
    assert labels_of(source) == {"cat/1.png": "cat", "dog/2.png": "dog"}
    assert source.read(1) == PNG
    assert source.notice == "reads linked folders: cat, dog"


def test_rings_end_and_nothing_is_read_twice(tmp_path: Path) -> None:
    root = make(tmp_path, "folder", ["cat/1.png", "dog/2.png"])
    elsewhere = make(tmp_path / "elsewhere", "folder", ["3.png"])
    (root / "cat" / "top").symlink_to(root)
    (root / "up").symlink_to("..")
    (root / "latest").symlink_to("dog")
    (root / "other").symlink_to(elsewhere)
    (root / "others").symlink_to(elsewhere.parent)
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "itself").symlink_to("itself")
    source = open_source(str(root))
    assert source.names == ["cat/1.png", "dog/2.png", "other/3.png", "other/itself"]
    assert source.left_out == {LINK: 5}
    assert "leaves out linked folders: latest, others, up and 2 more" in source.notice


@pytest.mark.parametrize("given", ["datasets--me--pets", "datasets--me--pets/snapshots/abc"])
@pytest.mark.parametrize("kind", ["images", "parquet", "tar"])
def test_the_hubs_cache_is_read_by_the_names_of_its_links(tmp_path: Path, given: str, kind: str) -> None:
    root = tmp_path / "datasets--me--pets"
    for number, (split, count) in enumerate([("train", 2), ("test", 1)]):
        if kind == "images":
            blobs = {f"{split}/{i}.png": PNG for i in range(count)}
        elif kind == "parquet":
            name = f"data/{split}-00000-of-00001.parquet"
            blobs = {name: write_parquet(tmp_path / "a", [PNG] * count).read_bytes()}
        else:
            inside = make(tmp_path / "b", "tar", [f"{i}.png" for i in range(count)])
            blobs = {f"{split}-000.tar": inside.read_bytes()}
        for i, (name, data) in enumerate(blobs.items()):
            blob, link = root / "blobs" / f"{number}{i}", root / "snapshots" / "abc" / name
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(data)
            link.symlink_to(os.path.relpath(blob, link.parent))
    train, test = open_source(str(tmp_path / given)), open_source(str(tmp_path / given), Wanted(split="test"))
    assert (len(train.names), len(test.names)) == (2, 1)
    assert [train.read(i) for i in range(2)] == [PNG, PNG]


def test_of_several_snapshots_the_branchs_is_read(tmp_path: Path) -> None:
    for revision in ("abc", "def"):
        make(tmp_path / "snapshots" / revision, "folder", [f"{revision}.png"])
    (tmp_path / "blobs").mkdir()
    with pytest.raises(InputError, match=r"holds 2 snapshots; give one of them, such as .*abc"):
        open_source(str(tmp_path))
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("def\n")
    assert open_source(str(tmp_path)).names == ["in/def.png"]


# Several kinds in one folder


@pytest.mark.parametrize("archive", ["b.zip", "more/b.zip", "b.tar", "more/b.tar", "more/b.parquet"])
def test_archives_beside_or_below_images_are_refused(tmp_path: Path, archive: str) -> None:
    root = make(tmp_path, "folder", ["a.png"])
    (root / archive).parent.mkdir(exist_ok=True)
    if archive.endswith("parquet"):
        write_parquet(root / archive, [PNG])
    else:
        make(tmp_path / "2", archive[-3:], ["b.png"]).rename(root / archive)
    with pytest.raises(InputError, match=f"holds {archive} and a.png; give a folder of one kind"):
        open_source(str(root))


def test_archives_of_two_kinds_or_several_zips_are_refused(tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        make(tmp_path, "zip", ["1.png"]).rename(tmp_path / name)
    with pytest.raises(InputError, match=r"holds 2 zips; give one of them, such as .*a\.zip"):
        open_source(str(tmp_path))
    (tmp_path / "b.zip").unlink()
    assert open_source(str(tmp_path)).names == ["1.png"]
    make(tmp_path, "tar", ["1.png"])
    with pytest.raises(InputError, match=r"holds in\.tar and a\.zip; give a folder of one kind"):
        open_source(str(tmp_path))


def test_what_img2dataset_leaves_beside_its_tars_is_no_data_set(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        contents = {f"{shard}0.txt": b"a cat", f"{shard}0.json": b'{"url": "x"}'}
        make(tmp_path, "tar", [f"{shard}0.jpg"], contents).rename(tmp_path / f"{shard}.tar")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
        pq.write_table(pa.table({"url": ["x"], "key": [f"{shard}0"]}), tmp_path / f"{shard}.parquet")
    source = open_source(str(tmp_path))
    assert (source.kind, source.names) == ("tar", ["00000.tar/000000.jpg", "00001.tar/000010.jpg"])
    assert source.left_out == {SIDECAR: 2 * (2 + 1)}
    assert [source.further(i) for i in range(2)] == [{"txt": b"a cat"}] * 2


def test_img2datasets_numbered_folders_are_no_classes(tmp_path: Path) -> None:
    root = make(tmp_path, "folder", ["00000/0.jpg", "00001/1.jpg"], {"00000/0.txt": b"a cat"})
    for shard in ("00000", "00001"):
        pq.write_table(pa.table({"url": ["x"]}), root / f"{shard}.parquet")
    source = open_source(str(root))
    assert (source.names, source.classes) == (["00000/0.jpg", "00001/1.jpg"], [])
    assert source.left_out == {SIDECAR: 2}
    assert [source.further(i) for i in range(2)] == [{"txt": b"a cat"}, {}]


def test_prepared_data_are_not_prepared_again(dataset: Path) -> None:
    with pytest.raises(InputError, match=r"is prepared already; data\.path = .* trains on it"):
        open_source(str(dataset))
