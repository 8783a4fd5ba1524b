"""Labels from the files that published datasets bring along: EDM's dataset.json, ProGAN's .labels."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.dataset import Dataset
from data_prep.errors import InputError
from data_prep.format import UNLABELLED
from data_prep.sources import open_source
from data_prep.sources.rules import SIDECAR
from tests.data_prep_harness import data_prep, file_of, noise
from tests.test_data_prep_tfrecords import write

NAMES = [f"0000{folder}/img{number:08d}.png" for folder in range(2) for number in range(3)]


def edm(root: Path, kind: str, labels: object, *, extra: dict[str, object] | None = None) -> Path:
    """As EDM's dataset_tool.py leaves it: numbered folders that are no classes, and dataset.json."""
    files = {name: file_of(noise(8, 8, seed=seed), "PNG") for seed, name in enumerate(NAMES)}
    files["dataset.json"] = json.dumps({"labels": labels, **(extra or {})}).encode()
    root.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(root / "cifar10.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return root / "cifar10.zip"
    for name, content in files.items():
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "in" / name).write_bytes(content)
    return root / "in"


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
    before = open_source(str(tmp_path), size=8)
    assert (list(before.classes), [before.label(i) for i in range(4)]) == ([], [UNLABELLED] * 4)
    with (tmp_path / "celebahq-rxx.labels").open("wb") as stream:
        np.save(stream, np.eye(5, dtype=np.float32)[[3, 0, 1, 3]])
    source = open_source(str(tmp_path), size=8)
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
