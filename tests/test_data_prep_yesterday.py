"""Sources that earlier versions prepared, or were killed in: the same names, labels and identity, so that they go on.

The identities were noted with the version before rules told which files are images.
"""

import json
import tarfile
from pathlib import Path

import pytest

from data_prep.sources import open_source
from data_prep.sources.base import fingerprint_of
from tests.data_prep_harness import packed

LABELS = json.dumps({"labels": [["00000/a.png", 1], ["00001/b.png", 0]]}).encode()
WEBDATASET = {
    "0.jpg": b"0",
    "0.cls": b"2",
    "0.txt": b"an owl",
    "1.1.png": b"1",
    "1.2.png": b"2",
    "1.json": b'{"label": 1}',
    "bare": b"3",
}
FILES: dict[str, dict[str, bytes]] = {
    "flat": {"a.png": b"1", "b.JPG": b"22", "no_suffix": b"333", "x.dat": b"4", ".hidden.png": b"5"},
    "classes": {"cat/1.png": b"1", "dog/2.png": b"22", "dog/deep/3.png": b"3"},
    "wrapped": {"pets/cat/1.png": b"1", "pets/dog/2.png": b"22"},
    "one split": {"test/cat/1.png": b"1", "test/dog/2.png": b"22"},
    "a class called train": {"car/1.png": b"1", "train/2.png": b"22"},
    "labelled": {"00000/a.png": b"1", "00001/b.png": b"22", "dataset.json": LABELS},
    "climbing": {"cat/1.png": b"1", "dog/2.png": b"2", "../up.png": b"3"},
    "webdataset": WEBDATASET,
}
CASES = [
    *[("folder", name) for name in FILES if name not in ("climbing", "webdataset")],
    *[("zip", name) for name in FILES if name != "webdataset"],
    *[("tar", name) for name in ("classes", "one split", "climbing", "webdataset")],
    ("tars", "webdataset"),
]
EXPECTED = {
    "folder flat": "02ffd0af508cc525",
    "folder classes": "00c6d9512d00798d",
    "folder wrapped": "6c402d9a661579be",
    "folder one split": "29bbc1fd8ae50311",
    "folder a class called train": "f0ea175f0560dbc5",
    "folder labelled": "f97107ab9f4ae488",
    "zip flat": "6bf683fed6a72de5",
    "zip classes": "507fc952b3bf1af5",
    "zip wrapped": "ad17bd9fd2a4d5fd",
    "zip one split": "bb408594dc69c2cc",
    "zip a class called train": "e8ab840bf336d62c",
    "zip labelled": "19884305bd78e1f6",
    "zip climbing": "61443b6d55678df6",
    "tar classes": "9664ce4a7855aa3c",
    "tar one split": "10324d941d680a45",
    "tar climbing": "8f96397ce30f3dae",
    "tar webdataset": "5e0b510976a157bf",
    "tars webdataset": "6a5f22f890ab06ae",
}


def make(root: Path, kind: str, files: dict[str, bytes]) -> Path:
    if kind == "tars":
        for title in ("train.tar", "train-2.tar"):
            packed(root / title, files, form=tarfile.USTAR_FORMAT)
        return root
    return packed(root / {"folder": "in", "zip": "in.zip", "tar": "in.tar"}[kind], files, form=tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_earlier_source_is_the_same(tmp_path: Path, kind: str, name: str) -> None:
    source = open_source(str(make(tmp_path, kind, FILES[name])))
    labels = [source.label(i) for i in range(len(source.names))]
    identity = fingerprint_of([source.names, labels, source.classes, [source.kind, source.fingerprint]])
    assert identity[:16] == EXPECTED[f"{kind} {name}"]
