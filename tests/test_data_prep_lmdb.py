"""Promises of LSUN's LMDB as a source."""

import hashlib
import json
import pickle
import re
import stat
import struct
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from data_prep.errors import InputError, Reject
from data_prep.format import load_manifest
from data_prep.inspection.dataset import Dataset
from data_prep.sources import open_source
from tests.data_prep_harness import command, data_prep, error_line, file_of, names_of, noise

SIDE = 16


def lsun(folder: Path, values: list[bytes]) -> Path:
    """As LSUN's export writes it: 40 hexadecimal digits -> an encoded image."""
    with lmdb.open(str(folder), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(hashlib.sha1(b"%d" % number).hexdigest().encode("ascii"), value)
    return folder


def keys(count: int) -> list[str]:
    return [hashlib.sha1(b"%d" % number).hexdigest() for number in range(count)]


@pytest.mark.parametrize("name", ["bedroom_train_lmdb", "airplane"])  # scenes and objects
def test_values_are_read_by_their_keys_whatever_they_are_encoded_as(tmp_path: Path, name: str) -> None:
    values = [file_of(noise(16, 20, seed=i), encoding) for i, encoding in enumerate(["JPEG", "WEBP", "PNG"] * 3)]
    source = open_source(str(lsun(tmp_path / name, values)))
    expected = dict(zip(keys(9), values))
    assert (source.kind, source.classes) == ("lmdb", [])
    assert list(source.names) == sorted(expected)
    assert [source.read(i) for i in range(9)] == [expected[key] for key in sorted(expected)]
    part = pickle.loads(pickle.dumps(source.part(4, 7)))  # noqa: S301 - our own, on its way to a worker
    assert [part.read(i) for i in range(3)] == [source.read(i) for i in range(4, 7)]


def test_a_dataset_is_made_of_it_by_several_workers(tmp_path: Path) -> None:
    values = [file_of(noise(16, 16 + i, seed=i), "JPEG", quality=75) for i in range(10)]
    values[3] = values[3][:200]
    options = ["--size", SIDE, "--transform", "source", "--shard-samples", 3, "--max-reject-fraction", 0.2]
    root = lsun(tmp_path / "church_outdoor_train_lmdb", values)
    assert data_prep(root, tmp_path / "out", *options, "--workers", 2) == 0
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.source["kind"], manifest.samples, manifest.rejected) == ("lmdb", 9, 1)
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert reject["name"] == keys(10)[3]
    dataset = Dataset.open(tmp_path / "out")
    by_key = dict(zip(keys(10), values))
    for row, name in zip(dataset.index, names_of(dataset.folder)):
        tar = dataset.path_of(row["shard"]).read_bytes()
        assert tar[row["offset"] : row["offset"] + row["length"]] == by_key[name]


def test_the_database_is_not_touched(tmp_path: Path) -> None:
    root = lsun(tmp_path / "tower", [file_of(noise(16, 16, seed=0), "PNG")])
    (root / "lock.mdb").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in root.iterdir()}
    root.chmod(stat.S_IRUSR | stat.S_IXUSR)
    open_source(str(root)).read(0)
    open_source(str(root / "data.mdb")).read(0)
    assert {path.name: path.stat().st_mtime_ns for path in root.iterdir()} == before


def test_any_key_has_a_name(tmp_path: Path) -> None:
    root = tmp_path / "odd"
    found = {b"a.1.jpg": b"1", b"\xff\xfe": b"2", "日本".encode(): b"3", b"../up": b"4"}
    with lmdb.open(str(root)) as database, database.begin(write=True) as transaction:
        for key, value in found.items():
            transaction.put(key, value)
    source = open_source(str(root))
    assert [source.read(i) for i in range(4)] == [found[key] for key in sorted(found)]
    assert json.loads(json.dumps(source.names)) == source.names


def test_the_fingerprint_follows_keys_and_lengths_not_the_place(tmp_path: Path) -> None:
    def fingerprint(name: str, values: list[bytes]) -> str:
        return open_source(str(lsun(tmp_path / name, values))).fingerprint

    first = fingerprint("a", [b"one", b"two"])
    assert first == fingerprint("b", [b"one", b"two"])
    assert first != fingerprint("c", [b"one", b"three"])
    assert first != fingerprint("d", [b"one"])


def test_an_incomplete_download_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LMDB maps the file, and reading behind its end would kill the process."""
    root = lsun(tmp_path / "kitchen", [np.random.default_rng(i).bytes(5000) for i in range(50)])
    whole = (root / "data.mdb").read_bytes()
    (root / "data.mdb").write_bytes(whole[: len(whole) // 2 // 4096 * 4096])
    assert data_prep(root, tmp_path / "out") == 2
    assert "the download is incomplete" in error_line(capsys)
    (root / "data.mdb").write_bytes(b"<html>404</html>" * 1000)
    assert data_prep(root, tmp_path / "out") == 2
    assert "not a readable LMDB" in error_line(capsys)


PAGE = 4096
BRANCH, LEAF = 1, 2


def pages_of(data: bytes, kind: int) -> list[int]:
    """The numbers of the pages of a kind, by LMDB's page header: its own number, padding, flags."""
    headers = [struct.unpack_from("<QHH", data, at) for at in range(0, len(data), PAGE)]
    return [page for page, (own, _, flags) in enumerate(headers) if own == page > 1 and flags == kind]


@pytest.mark.parametrize("kind", [BRANCH, LEAF], ids=["branch", "leaf"])
def test_a_hole_in_the_tree_is_one_line(tmp_path: Path, kind: int) -> None:
    """LMDB ends a process that comes to such a page."""
    root = lsun(tmp_path / "dining_room", [bytes(100)] * 200)
    data = bytearray((root / "data.mdb").read_bytes())
    page = pages_of(data, kind)[-1]
    data[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    (root / "data.mdb").write_bytes(data)
    done = subprocess.run(
        command(root, tmp_path / "out", "--size", SIDE), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*data\.mdb: (damaged|cannot be read) \(.*\).*\n", done.stderr)
    assert not (tmp_path / "out").exists()


def test_keys_that_cannot_be_reached_are_told_not_left_out(tmp_path: Path) -> None:
    root = lsun(tmp_path / "bridge", [bytes(100)] * 200)
    data = bytearray((root / "data.mdb").read_bytes())
    page = pages_of(data, LEAF)[0]
    lower = struct.unpack_from("<H", data, page * PAGE + 12)[0]
    struct.pack_into("<H", data, page * PAGE + 12, lower - 2)  # one entry less
    (root / "data.mdb").write_bytes(data)
    with pytest.raises(InputError, match=r"damaged \(199 of 200 keys can be reached\); fetch it again"):
        open_source(str(root))


def test_a_hole_in_a_value_is_a_reject(tmp_path: Path) -> None:
    values = [file_of(noise(64, 64, seed=i), "PNG") for i in range(3)]  # each on pages of its own
    root = lsun(tmp_path / "church", values)
    data = (root / "data.mdb").read_bytes()
    at = data.index(values[1][-4000:-3000])
    (root / "data.mdb").write_bytes(data[:at] + bytes(1000) + data[at + 1000 :])
    assert data_prep(root, tmp_path / "out", "--size", SIDE, "--max-reject-fraction", 0.5) == 0
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert (reject["name"], reject["reason"]) == (keys(2)[1], "truncated or corrupt")


def test_a_folder_of_databases_names_one(tmp_path: Path) -> None:
    lsun(tmp_path / "bridge_train_lmdb", [b"x"])
    with pytest.raises(InputError, match=r"holds 1 LMDBs; give one of them, such as .*bridge_train_lmdb"):
        open_source(str(tmp_path))


def test_a_huge_value_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.reading.MAX_FILE_BYTES", 10)
    with pytest.raises(Reject, match="file too large"):
        open_source(str(lsun(tmp_path / "a", [b"x" * 11]))).read(0)


@pytest.mark.parametrize("module", ["lmdb", "pyarrow.parquet", "google_crc32c"])
def test_a_missing_library_is_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "data.mdb").touch()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.tfrecords").write_bytes(bytes(100))
    file = {"lmdb": "data.mdb", "pyarrow.parquet": "a.parquet", "google_crc32c": "a.tfrecords"}[module]
    with pytest.raises(InputError, match=rf"this source needs {module}: pip install 'ddpm-trainer\[sources\]'"):
        open_source(str(tmp_path / file))


def test_all_values_are_read_in_one_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lsun(tmp_path / "classroom", [b"x" * i for i in range(1, 9)])
    begun = []
    real = lmdb.open

    class Counted:
        def __init__(self, *arguments: object, **options: object) -> None:
            self.environment = real(*arguments, **options)

        def __getattr__(self, name: str) -> object:
            if name == "begin":
                begun.append(name)
            return getattr(self.environment, name)

    monkeypatch.setattr("lmdb.open", Counted)
    source = open_source(str(root))
    assert {len(source.read(i)) for i in range(8)} == set(range(1, 9))
    assert len(begun) == 1


def test_a_fault_while_reading_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def get(self, _key: bytes) -> bytes:
            raise lmdb.CorruptedError("page 3")

    source = open_source(str(lsun(tmp_path / "tower", [b"x"])))
    monkeypatch.setattr("data_prep.sources.lmdb._transaction", lambda _root: Failing())
    with pytest.raises(InputError, match=r"data\.mdb: cannot be read \(page 3"):
        source.read(0)
