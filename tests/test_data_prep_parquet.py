"""Promises of Hugging Face's parquet as a source; the files are written by pyarrow."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import InputError, Reject
from data_prep.format import UNLABELLED, load_manifest
from data_prep.inspection.dataset import Dataset
from data_prep.sources import Wanted, open_source
from data_prep.sources.parquet import ROWS_AT_ONCE
from tests.data_prep_harness import data_prep, file_of, noise

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(
    path: Path,
    values: list[bytes | None],
    *,
    labels: list | None = None,
    names: list[str] | None = None,
    paths: list[str | None] | None = None,
    column: str = "image",
    rows_to_a_group: int = 4,
) -> Path:
    """As `datasets` writes it: {bytes, path} structs, labels as integers, their names in the schema's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": v, "path": p} for v, p in zip(values, paths or [f"{i}.jpg" for i in range(len(values))])]
    columns = {"id": pa.array(range(len(values))), column: pa.array(structs, IMAGE)}
    if labels is not None:
        columns["label"] = pa.array(labels)
    table = pa.table(columns)
    if names:
        features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows_to_a_group)
    return path


def jpegs(count: int, first: int = 0) -> list[bytes]:
    return [file_of(noise(16, 20, seed=first + i), "JPEG") for i in range(count)]


def test_every_row_is_read_in_any_order(tmp_path: Path) -> None:
    values = jpegs(3 * ROWS_AT_ONCE + 5)
    source = open_source(str(write(tmp_path / "a.parquet", values, rows_to_a_group=2 * ROWS_AT_ONCE + 3)))
    assert (source.kind, source.classes, len(source.names)) == ("parquet", [], len(values))
    assert [source.read(i) for i in range(len(values))] == values
    for i in (40, 3, 52, 2, 1, 35, 34):
        assert source.read(i) == values[i]
    part = pickle.loads(pickle.dumps(source.part(30, 50)))  # noqa: S301 - our own, on its way to a worker
    assert [part.read(i) for i in range(20)] == values[30:50]
    assert list(part.names) == [f"{i}.jpg" for i in range(30, 50)]


def test_class_names_come_from_the_metadata(tmp_path: Path) -> None:
    labels = [1, 0, 1, None]
    source = open_source(str(write(tmp_path / "a.parquet", jpegs(4), labels=labels, names=["cat", "dog", "owl"])))
    assert source.classes == ["cat", "dog", "owl"]
    assert [source.label(i) for i in range(4)] == [1, 0, 1, UNLABELLED]


@pytest.mark.parametrize(
    ("values", "classes", "expected"),
    [([2, 0, -1], ["0", "1", "2"], [2, 0, UNLABELLED]), (["owl", "cat", None], ["cat", "owl"], [1, 0, UNLABELLED])],
)
def test_labels_without_metadata_are_numbers_or_words(tmp_path: Path, values, classes, expected) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", jpegs(3), labels=values)))
    assert (source.classes, [source.label(i) for i in range(3)]) == (classes, expected)


def test_a_repository_is_read_by_splits(tmp_path: Path) -> None:
    data = tmp_path / "repo" / "data"
    files = {"train-00000-of-00002": 5, "train-00001-of-00002": 4, "test-00000-of-00001": 3}
    first = dict(zip(files, (0, 5, 9)))
    for name, count in files.items():
        write(data / f"{name}.parquet", jpegs(count, first[name]), column="img")
    (tmp_path / "repo" / "README.md").write_text("# CelebA-HQ")
    train = open_source(str(tmp_path / "repo"))
    assert [train.read(i) for i in range(9)] == jpegs(9)
    assert "reads 2 of 3 files: split train" in train.notice
    test = open_source(str(tmp_path / "repo"), Wanted(split="test"))
    assert [test.read(i) for i in range(3)] == jpegs(3, 9)
    with pytest.raises(InputError, match="has no split validation; it has test, train"):
        open_source(str(tmp_path / "repo"), Wanted(split="validation"))


def test_a_row_without_bytes_never_opens_the_file_it_names(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    noise(16, 16, seed=0).save(secret)
    source = open_source(str(write(tmp_path / "a.parquet", [None, *jpegs(1)], paths=[str(secret), None])))
    assert list(source.names) == [str(secret), "a.parquet:0:1"]
    with pytest.raises(Reject, match="no bytes"):
        source.read(0)
    assert source.read(1) == jpegs(1)[0]


def test_a_dataset_is_made_of_it(tmp_path: Path) -> None:
    values = [file_of(noise(16, 16, seed=i), "PNG") for i in range(9)]
    write(tmp_path / "in" / "a.parquet", values, labels=[0, 1, 2] * 3, names=["a", "b", "c"])
    assert data_prep(tmp_path / "in", tmp_path / "out", "--size", 16, "--shard-samples", 2, "--workers", 2) == 0
    dataset = Dataset.open(tmp_path / "out")
    assert load_manifest(tmp_path / "out").classes == ["a", "b", "c"]
    assert dataset.index["label"].tolist() == [0, 1, 2] * 3
    for i in range(9):
        np.testing.assert_array_equal(np.asarray(dataset.read(i)), np.asarray(noise(16, 16, seed=i)))


def test_what_is_damaged_or_has_no_images_is_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.parquet", jpegs(8)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"cut\.parquet: not a readable parquet file"):
        open_source(str(tmp_path / "cut.parquet"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(InputError, match=r"has no column of \{bytes, path\}; its columns are text"):
        open_source(str(tmp_path / "text.parquet"))
    hole = bytearray(whole)
    hole[100:1000] = bytes(900)
    (tmp_path / "hole.parquet").write_bytes(hole)
    source = open_source(str(tmp_path / "hole.parquet"))
    with pytest.raises(InputError, match=r"hole\.parquet: row group 0 cannot be read") as caught:
        source.read(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("column", "labels"), [("picture", [0, 1]), ("image", None)])
def test_files_of_other_columns_are_refused(tmp_path: Path, column: str, labels: list[int] | None) -> None:
    write(tmp_path / "a.parquet", jpegs(2), labels=[0, 1])
    write(tmp_path / "b.parquet", jpegs(2), labels=labels, column=column)
    with pytest.raises(InputError, match=r"b\.parquet: has other columns of images or labels than a\.parquet"):
        open_source(str(tmp_path))


def test_a_second_file_without_images_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", jpegs(2))
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: has no column of \{bytes, path\}; its columns are id"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (pa.array(["owl", "cat", None], pa.large_string()), ["cat", "owl"], [1, 0, UNLABELLED]),
        (pa.array(["owl", "cat", None], pa.string_view()), ["cat", "owl"], [1, 0, UNLABELLED]),
        (pa.array(["owl", "cat", "owl"]).dictionary_encode(), ["cat", "owl"], [1, 0, 1]),
        (pa.array([2, 0, 2]).dictionary_encode(), ["0", "1", "2"], [2, 0, 2]),
        (pa.array([2, 0, 1], pa.uint8()), ["0", "1", "2"], [2, 0, 1]),
        (pa.array([True, False, None]), ["false", "true"], [1, 0, UNLABELLED]),
    ],
)
def test_labels_are_read_of_any_type(tmp_path: Path, labels: pa.Array, classes: list[str], expected: list[int]) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", jpegs(3), labels=labels)))
    assert (source.classes, [source.label(i) for i in range(3)]) == (classes, expected)
    assert source.notice is None


@pytest.mark.parametrize("labels", [pa.array([0.5, 1.0]), pa.array([[1], [2]]), pa.array([{"a": 1}, {"a": 2}])])
def test_a_column_that_holds_no_labels_is_told(tmp_path: Path, labels: pa.Array) -> None:
    path = write(tmp_path / "a.parquet", jpegs(2), labels=labels)
    source = open_source(str(path))
    assert (source.classes, source.label(0)) == ([], UNLABELLED)
    assert re.fullmatch(r"column label is of \S.*, which are no labels: the images have none", source.notice)
    assert open_source(str(path), Wanted(labels="none")).notice is None


def with_columns(path: Path, *names: str) -> Path:
    """Row i of column k holds `jpegs(1, 10 * k + i)`."""
    columns = {
        name: pa.array([{"bytes": data, "path": None} for data in jpegs(2, 10 * k)], IMAGE)
        for k, name in enumerate(names)
    }
    pq.write_table(pa.table(columns), path)
    return path


def test_of_several_columns_of_images_the_one_called_image_or_wanted_is_read(tmp_path: Path) -> None:
    path = with_columns(tmp_path / "a.parquet", "mask", "image")
    source = open_source(str(path))
    assert [source.read(i) for i in range(2)] == jpegs(2, 10)
    assert source.notice == "reads column image of mask, image; see --image-column"
    masks = open_source(str(path), Wanted(image_column="mask"))
    assert [masks.read(i) for i in range(2)] == jpegs(2)
    assert masks.fingerprint != source.fingerprint
    with pytest.raises(InputError, match="has no column of images text; it has mask, image"):
        open_source(str(path), Wanted(image_column="text"))
    path = with_columns(tmp_path / "b.parquet", "left", "right")
    with pytest.raises(InputError, match=r"has 2 columns of images; say --image-column left or right"):
        open_source(str(path))
    out = tmp_path / "out"
    assert data_prep(path, out, "--size", 16, "--workers", 1, "--image-column", "right") == 0
    assert data_prep(path, out, "--size", 16, "--workers", 1, "--image-column", "left") == 2


def test_an_image_in_a_struct_or_as_plain_bytes_is_read(tmp_path: Path) -> None:
    nested = pa.array([{"image": {"bytes": data, "path": "x.jpg"}, "id": 1} for data in jpegs(2)] + [None])
    pq.write_table(pa.table({"sample": nested}), tmp_path / "nested.parquet")
    source = open_source(str(tmp_path / "nested.parquet"))
    assert [source.read(i) for i in range(2)] == jpegs(2)
    assert list(source.names) == ["x.jpg", "x.jpg", "nested.parquet:0:2"]
    with pytest.raises(Reject, match="no bytes"):
        source.read(2)
    pq.write_table(pa.table({"jpg": jpegs(2), "txt": ["a", "b"]}), tmp_path / "plain.parquet")
    plain = open_source(str(tmp_path / "plain.parquet"))
    assert [plain.read(i) for i in range(2)] == jpegs(2)
    assert list(plain.names) == ["plain.parquet:0:0", "plain.parquet:0:1"]


def test_an_image_column_is_for_parquet(tmp_path: Path) -> None:
    noise(8, 8, seed=0).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="--image-column image is for parquet; this is folder"):
        open_source(str(tmp_path), Wanted(image_column="image"))
