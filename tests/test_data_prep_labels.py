"""Labels from the files that published datasets bring along: EDM's dataset.json, ProGAN's .labels."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.format import UNLABELLED
from data_prep.inspection.dataset import Dataset
from data_prep.sources import Source, Wanted, open_source
from data_prep.sources.rules import SIDECAR
from tests.data_prep_harness import data_prep, file_of, noise, packed
from tests.test_data_prep_tfrecords import write

NAMES = [f"0000{folder}/img{number:08d}.png" for folder in range(2) for number in range(3)]


def edm(root: Path, kind: str, labels: object, *, extra: dict[str, object] | None = None) -> Path:
    """As EDM's dataset_tool.py leaves it: numbered folders that are no classes, and dataset.json."""
    files = {name: file_of(noise(8, 8, seed=seed), "PNG") for seed, name in enumerate(NAMES)}
    files["dataset.json"] = json.dumps({"labels": labels, **(extra or {})}).encode()
    return packed(root / ("cifar10.zip" if kind == "zip" else "in"), files)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_edms_labels_are_taken_and_their_file_is_no_image(tmp_path: Path, kind: str) -> None:
    labels = [[name, 5 - number] for number, name in enumerate(NAMES) if number != 2]
    path = edm(tmp_path / "a", kind, labels)
    source = open_source(str(path))
    assert list(source.names) == NAMES
    assert list(source.classes) == ["0", "1", "2", "3", "4", "5"]
    assert [source.label(i) for i in range(6)] == [5, 4, UNLABELLED, 2, 1, 0]
    part = source.part(3, 6)
    assert [part.label(i) for i in range(3)] == [2, 1, 0]
    assert data_prep(path, tmp_path / "out", "--size", 8, "--workers", 1) == 0
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.index["label"].tolist() == [5, 4, UNLABELLED, 2, 1, 0]
    assert dataset.manifest.rejected == 0


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_no_labels_are_none_and_others_make_another_source(tmp_path: Path, kind: str) -> None:
    """The numbered folders of EDM are not taken for classes."""
    without = open_source(str(edm(tmp_path / "a", kind, None)))
    assert list(without.names) == NAMES
    assert list(without.classes) == []
    found = [
        open_source(str(edm(tmp_path / name, kind, [[NAMES[0], label]]))).fingerprint
        for name, label in (("b", 1), ("c", 1), ("d", 2))
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_another_dataset_json_has_no_labels_and_is_left_out(tmp_path: Path, kind: str) -> None:
    path = edm(tmp_path / "a", kind, None)
    if kind == "folder":
        (path / "dataset.json").write_text('{"license": "CC0"}')
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("dataset.json", '["labels"]')
            archive.writestr(NAMES[0], b"x")
    source = open_source(str(path))
    assert "dataset.json" not in source.names
    assert source.left_out == {SIDECAR: 1}
    assert list(source.classes) == (["00000", "00001"] if kind == "folder" else [])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[NAMES[0], [0.1, 0.9]]], r"\[0\.1, 0\.9\] is no class number"),
        ([[NAMES[0], -1]], "-1 is no class number"),
        ([[NAMES[0], True]], "true is no class number"),
        ({"a": 1}, r"`labels` must be a list of \[name, class number\]"),
        ([[NAMES[0]]], r"`labels` must be a list of \[name, class number\]"),
        ([[NAMES[0], 10**9]], "label 1000000000: not a class number"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_that_are_no_class_numbers_are_named(tmp_path: Path, kind: str, labels: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(str(edm(tmp_path / "a", kind, labels)))


def test_progans_labels_are_those_of_its_records(tmp_path: Path) -> None:
    """One-hot float32 of all records, shared by the files of all resolutions."""
    for resolution in (2, 3):
        write(tmp_path, resolution, count=4)
    before = open_source(str(tmp_path), Wanted(size=8))
    assert (list(before.classes), [before.label(i) for i in range(4)]) == ([], [UNLABELLED] * 4)
    with (tmp_path / "celebahq-rxx.labels").open("wb") as stream:
        np.save(stream, np.eye(5, dtype=np.float32)[[3, 0, 1, 3]])
    source = open_source(str(tmp_path), Wanted(size=8))
    assert list(source.classes) == ["0", "1", "2", "3", "4"]
    assert [source.label(i) for i in range(4)] == [3, 0, 1, 3]
    assert [source.part(1, 3).label(i) for i in range(2)] == [0, 1]
    assert source.fingerprint != before.fingerprint
    assert data_prep(tmp_path, tmp_path.parent / "out", "--size", 8, "--workers", 1) == 0
    assert Dataset.open(tmp_path.parent / "out").index["label"].tolist() == [3, 0, 1, 3]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(5, dtype=np.float32)[:2], r"\(2, 5\); there are 3 records"),
        (np.zeros((3, 40), np.float32), "rows without a single 1"),
        (np.full((3, 2), np.nan, np.float32), "rows without a single 1"),
        (np.array([0.5, 1, 2]), "float64 that are no class numbers"),
        (np.array([{}, {}, {}], dtype=object), "not an array of labels"),
        (np.zeros((3, 1, 1)), r"\(3, 1, 1\); there are 3 records"),
    ],
)
def test_progan_labels_that_do_not_fit_are_named(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    write(tmp_path, 3)
    with (tmp_path / "celebahq-rxx.labels").open("wb") as stream:
        np.save(stream, labels, allow_pickle=True)
    with pytest.raises(InputError, match=rf"celebahq-rxx\.labels: .*{message}"):
        open_source(str(tmp_path / "celebahq-r03.tfrecords"))


def folder_or_zip(root: Path, kind: str, files: dict[str, bytes]) -> str:
    return str(packed(root / ("in.zip" if kind == "zip" else "in"), files))


def found(source: Source) -> list[str | None]:
    labels = [source.label(i) for i in range(len(source.names))]
    return [None if label == UNLABELLED else source.classes[label] for label in labels]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_lie_under_a_wrapper_with_names_relative_to_it(tmp_path: Path, kind: str) -> None:
    listed = json.dumps({"labels": [[name, 1] for name in NAMES[:4]]}).encode()
    files = {f"ffhq/{name}": b"x" for name in NAMES} | {"ffhq/dataset.json": listed, "LICENSE": b"CC0"}
    source = open_source(folder_or_zip(tmp_path / "a", kind, files))
    assert found(source) == ["1"] * 4 + [None] * 2
    assert list(source.classes) == ["0", "1"]
    assert source.left_out == {SIDECAR: 2}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_of_files_that_are_not_there_are_told_or_refused(tmp_path: Path, kind: str) -> None:
    path = edm(tmp_path / "a", kind, [[NAMES[0], 1], ["gone.png", 2], ["gone too.png", 2]])
    source = open_source(str(path))
    assert found(source) == ["1"] + [None] * 5
    assert "dataset.json: 2 of its 3 names are no file's, such as 'gone too.png'" in source.notice
    path = edm(tmp_path / "b", kind, [[name.replace("png", "jpg"), 1] for name in NAMES])
    with pytest.raises(
        InputError, match=r"dataset\.json: none of its 6 names is a file's .* --labels none does without"
    ):
        open_source(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text,label\na/1.png,x,owl\nb/2.png,y,cat\nb/3.png,z,\n"),
        ("metadata.csv", "\ufefffile_name,label\r\n./a/1.png,owl\r\nb\\2.png,cat\r\n"),
        ("metadata.jsonl", '{"file_name": "a/1.png", "label": "owl"}\n\n{"file_name": "b/2.png", "label": "cat"}'),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("wrapper", ["", "pets/"])
def test_hugging_faces_metadata_are_understood(
    tmp_path: Path, kind: str, wrapper: str, name: str, content: str
) -> None:
    files = {f"{wrapper}{image}": b"x" for image in ("a/1.png", "b/2.png", "b/3.png")}
    source = open_source(folder_or_zip(tmp_path / "1", kind, files | {wrapper + name: content.encode()}))
    assert (found(source), list(source.classes)) == (["owl", "cat", None], ["cat", "owl"])
    assert source.left_out == {SIDECAR: 1}
    other = content.replace("owl", "elk").encode()
    assert open_source(folder_or_zip(tmp_path / "2", kind, files | {wrapper + name: other})).fingerprint != (
        source.fingerprint
    )


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_metadata_may_have_numbers_captions_alone_or_be_damaged(tmp_path: Path, kind: str) -> None:
    files = {"a/1.png": b"x", "b/2.png": b"x"}
    for name, content, expected, notice in [
        ("metadata.csv", b"file_name,label\na/1.png,1\nb/2.png,10\n", ["1", "10"], None),
        ("metadata.csv", b"file_name,text\na/1.png,an owl\n", ["a", "b"], None),
        ("metadata.jsonl", b'{"file_name": "a/1.png", "text": "an owl"}', ["a", "b"], None),
        ("metadata.jsonl", b'{"file_name": "a/1.png", "la', ["a", "b"], "metadata.jsonl: cannot be read"),
        ("metadata.csv", b"\xff\xfef\0", ["a", "b"], "metadata.csv: cannot be read"),
    ]:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        source = open_source(folder_or_zip(place, kind, files | {name: content}))
        assert found(source) == expected
        assert source.left_out == {SIDECAR: 1}
        assert notice in source.notice if notice else source.notice is None


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_accented_letter_is_one_however_it_is_written(tmp_path: Path, kind: str) -> None:
    """A Mac's disk and its zips take letters apart, Linux keeps them together."""
    composed, apart = "caf\u00e9/1.png", "cafe\u0301/1.png"
    labels = json.dumps({"labels": [[composed, 3]]}).encode()
    assert found(open_source(folder_or_zip(tmp_path / "1", kind, {apart: b"x", "dataset.json": labels}))) == ["3"]


def test_class_folders_in_a_zip_of_windows(tmp_path: Path) -> None:
    names = ["pets\\cat\\1.png", "pets\\dog\\2.png", "pets\\"]
    source = open_source(folder_or_zip(tmp_path / "a", "zip", dict.fromkeys(names, b"x")))
    assert list(source.names) == ["pets/cat/1.png", "pets/dog/2.png"]
    assert found(source) == ["cat", "dog"]
    assert source.read(1) == b"x"


def test_without_labels_nothing_about_them_stops_a_run(tmp_path: Path) -> None:
    listed = [[NAMES[0], "no number"]]
    path = edm(tmp_path / "a", "folder", listed)
    source = open_source(str(path), Wanted(labels="none"))
    assert (list(source.names), found(source), list(source.classes)) == (NAMES, [None] * 6, [])
    part = pickle.loads(pickle.dumps(source.part(2, 4)))  # noqa: S301 - our own, on its way to a worker
    assert (part.names, part.label(0), part.read(1)) == (NAMES[2:4], UNLABELLED, source.read(3))
    out = tmp_path / "out"
    assert data_prep(path, out, "--size", 8, "--workers", 1, "--labels", "none") == 0
    assert Dataset.open(out).manifest.classes == []
    assert data_prep(path, out, "--size", 8, "--workers", 1) == 2


def test_what_is_prepared_with_labels_is_not_resumed_without(tmp_path: Path) -> None:
    path = edm(tmp_path / "a", "folder", [[name, 1] for name in NAMES])
    with_labels, without = open_source(str(path)), open_source(str(path), Wanted(labels="none"))
    assert with_labels.fingerprint != without.fingerprint
