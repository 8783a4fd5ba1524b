"""`verify`: every corruption is found and named, and nothing is told of a dataset that contradicts itself."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.format import FormatError, load_manifest, sha256_of
from tests.data_prep_harness import bytes_of, data_prep, error_line

SIDE = 16
SHARDS = [f"shard-{i:06d}.tar" for i in range(3)]


def faults(folder: Path, capsys: pytest.CaptureFixture[str], *options: object) -> list[str]:
    """The lines of a verification that must fail."""
    capsys.readouterr()
    assert data_prep("verify", folder, *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    return lines


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def member_at(folder: Path, sample: int) -> int:
    return int(np.load(folder / "index.npy")[sample]["offset"])


@pytest.mark.parametrize("decode", ["none", "sample", "all"])
def test_a_whole_dataset_passes(whole_dataset: Path, capsys: pytest.CaptureFixture[str], decode: str) -> None:
    before = bytes_of(whole_dataset)
    assert data_prep("verify", whole_dataset, "--decode", decode, "--workers", 2) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{whole_dataset}: no fault found\n", "")
    assert bytes_of(whole_dataset) == before


def put(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


# What becomes of shard 1, given where the data of its third member begins; webdataset's answer is in the name.
CORRUPTIONS: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "cut at a header: fewer samples": (lambda data, at: data[: at - 512], "bytes instead of"),
    "cut in a member: raises": (lambda data, at: data[: at + 10], "bytes instead of"),
    "damaged header: fewer samples": (lambda data, at: put(data, at - 512, b"\xff"), "damaged header at offset"),
    "zeroed hole: fewer samples": (
        lambda data, at: put(data, at - 512, bytes(512)),
        "zeros at offset .* where a header",
    ),
    "flipped bit: passes": (lambda data, at: put(data, at + 30, bytes([data[at + 30] ^ 1])), "000000006 is damaged"),
    "flipped bit in the padding: passes": (lambda data, at: put(data, at - 513, b"\x01"), "in a header or padding"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_of_a_tar_is_one_line_that_names_it(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str], corruption: str
) -> None:
    change, message = CORRUPTIONS[corruption]
    at = member_at(dataset_copy, 6)
    edit(dataset_copy / SHARDS[1], lambda data: change(data, at))
    (line,) = faults(dataset_copy, capsys)
    assert SHARDS[1] in line
    assert "sha256 differs from the manifest's" in line
    assert re.search(message, line)


def test_missing_extra_and_swapped_shards_are_each_named(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset_copy / SHARDS[0]).rename(dataset_copy / "held")
    (dataset_copy / SHARDS[1]).rename(dataset_copy / SHARDS[0])
    (dataset_copy / "held").rename(dataset_copy / SHARDS[1])
    (dataset_copy / SHARDS[2]).rename(dataset_copy / "shard-000007.tar")
    lines = faults(dataset_copy, capsys)
    assert len(lines) == 4
    for name, message in [
        ("shard-000007.tar", "not in the manifest"),
        (SHARDS[0], f"holds what belongs into {SHARDS[1]}"),
        (SHARDS[1], f"holds what belongs into {SHARDS[0]}"),
        (SHARDS[2], "missing; the manifest lists 3 shards"),
    ]:
        assert any(f"{name}: {message}" in line for line in lines)


def stale_index(dataset_copy: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(dataset_copy / "index.npy", change(np.load(dataset_copy / "index.npy")))


def shifted(index: np.ndarray) -> np.ndarray:
    index["offset"][5] += 512
    return index


def relabelled(index: np.ndarray) -> np.ndarray:
    index["label"][5] = 2
    return index


def with_other_crc(index: np.ndarray) -> np.ndarray:
    index["crc32"][5] ^= 1
    return index


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (shifted, ["index.npy: sha256 differs", f"{SHARDS[1]}: member 000000005"]),
        (with_other_crc, ["index.npy: sha256 differs", f"{SHARDS[1]}: member 000000005 is damaged"]),
        (relabelled, ["index.npy: sha256 differs", "a label outside the manifest's 2 classes"]),
        (lambda index: index[:-1], ["index.npy: sha256 differs", "10 rows", f"{SHARDS[2]}: holds 6 members"]),
        (lambda index: index[::-1], ["index.npy: sha256 differs", "not in the order"]),
    ],
)
def test_a_stale_index_is_found_and_what_it_contradicts(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str], change: Callable, messages: list[str]
) -> None:
    stale_index(dataset_copy, change)
    lines = faults(dataset_copy, capsys)
    for message in messages:
        assert any(message in line for line in lines), (message, lines)


def far_away(index: np.ndarray) -> np.ndarray:
    index["offset"][5] = 2**64 - 1
    return index


def in_no_shard(index: np.ndarray) -> np.ndarray:
    index["shard"][-1] = 3
    return index


def exchanged(index: np.ndarray) -> np.ndarray:
    index["label"][[4, 5]] = index["label"][[5, 4]]
    return index


STALE = [shifted, relabelled, with_other_crc, far_away, in_no_shard, exchanged, lambda index: index[:-1]]


@pytest.mark.parametrize("command", ["inspect", "stats"])
@pytest.mark.parametrize("change", STALE)
def test_nothing_is_told_of_a_stale_index(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str], change: Callable, command: str
) -> None:
    stale_index(dataset_copy, change)
    assert data_prep(command, dataset_copy) == 2
    assert "index.npy: sha256 differs from the manifest's" in error_line(capsys)
    assert not (dataset_copy / "stats.npz").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_no_shard, "index.npy: is not of the manifest's 11 samples in 3 shards"),
        (lambda index: index[:-1], "index.npy: is not of the manifest's 11 samples in 3 shards"),
        (shifted, f"{SHARDS[1]}: member 000000005 is damaged"),
        (far_away, f"{SHARDS[1]}: member 000000005 is damaged"),
        (with_other_crc, f"{SHARDS[1]}: member 000000005 is damaged"),
    ],
)
def test_a_wrong_index_that_the_manifest_agrees_with_is_one_line(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str], change: Callable, message: str
) -> None:
    stale_index(dataset_copy, change)
    resign(dataset_copy)
    assert data_prep("stats", dataset_copy) == 2
    assert message in error_line(capsys)
    faults(dataset_copy, capsys)


def test_a_damaged_member_is_not_counted_in_stats(dataset_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = member_at(dataset_copy, 6) + 30
    edit(dataset_copy / SHARDS[1], lambda data: put(data, at, bytes([data[at] ^ 1])))
    assert data_prep("stats", dataset_copy) == 2
    assert f"{SHARDS[1]}: member 000000006 is damaged (crc32 differs from the index)" in error_line(capsys)


HUGE = b"{'descr': 'u1', 'fortran_order': False, 'shape': (99999999999999999999999999,)}".ljust(95) + b"\n"
OTHER_INDEXES: dict[str, Callable[[Path], object]] = {
    "of objects": lambda path: np.save(path, np.array([{}], object), allow_pickle=True),
    "npz": lambda path: path.write_bytes(npz()),
    "of more rows than there are numbers for": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x60\x00" + HUGE),
}


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(1))
    return stream.getvalue()


@pytest.mark.parametrize("command", ["verify", "inspect", "stats"])
@pytest.mark.parametrize("kind", OTHER_INDEXES)
def test_a_file_that_is_no_index_is_one_line(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    OTHER_INDEXES[kind](dataset_copy / "index.npy")
    assert data_prep(command, dataset_copy) == 2
    assert "index.npy: cannot be read as an index" in error_line(capsys)


def resign(folder: Path) -> None:
    """Make the manifest agree with the files, so that only their content can be at fault."""
    manifest = load_manifest(folder)
    shards = [
        replace(shard, bytes=(folder / shard.name).stat().st_size, sha256=sha256_of(folder / shard.name))
        for shard in manifest.shards
    ]
    index = sha256_of(folder / "index.npy")
    (folder / "manifest.json").write_text(replace(manifest, shards=shards, index_sha256=index).to_json())


def test_signed_nonsense_is_found_too(dataset_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = member_at(dataset_copy, 6) - 512
    edit(
        dataset_copy / SHARDS[1], lambda data: put(data, at, b"100000006")
    )  # another name, with a header that is false
    resign(dataset_copy)
    assert "damaged header at offset" in faults(dataset_copy, capsys)[0]


def test_images_that_do_not_decode_or_have_another_size_are_found_by_decoding(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(dataset_copy)
    (dataset_copy / "manifest.json").write_text(replace(manifest, image_size=SIDE + 1).to_json())
    assert data_prep("verify", dataset_copy, "--decode", "none") == 0
    lines = faults(dataset_copy, capsys, "--decode", "sample")
    assert [line.split(": ")[1].split("/")[-1] for line in lines] == SHARDS
    assert all("is 16x16, the manifest says 17x17" in line for line in lines)


def test_names_and_rejects_are_checked(dataset_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(dataset_copy / "names.jsonl", lambda data: data.replace(b"cat", b"cow"))
    edit(dataset_copy / "rejects.jsonl", lambda data: data * 2)
    lines = faults(dataset_copy, capsys)
    assert len(lines) == 2
    assert "names.jsonl: sha256 differs" in lines[0]
    assert "rejects.jsonl: 2 lines, the manifest says 1" in lines[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw.update(samples="11"), "samples is '11', which should be int"),
        (lambda raw: raw.update(samples=True), "samples is True, which should be int"),
        (lambda raw: raw.update(samples=-1), "samples is -1, which cannot be negative"),
        (lambda raw: raw.update(mode=["RGB"]), r"mode is \['RGB'\], which should be str"),
        (lambda raw: raw.update(mode="CMYK"), "mode is 'CMYK', which should be RGB or L"),
        (lambda raw: raw.update(classes="cat"), "classes is 'cat', which should be list"),
        (lambda raw: raw.update(classes=[1]), r"classes is \[1\], which should be a list of str"),
        (lambda raw: raw.update(index_sha256=None), "index_sha256 is None, which should be str"),
        (lambda raw: raw["shards"][1].update(sha256=5), "sha256 is 5, which should be str"),
        (lambda raw: raw["shards"][1].update(samples="4"), "samples is '4', which should be int"),
        (lambda raw: raw["shards"][1].update(name=None), "name is None, which should be str"),
        (lambda raw: raw["shards"][1].update(bytes=1.5), "bytes is 1.5, which should be int"),
        (lambda raw: raw["shards"][1].pop("bytes"), "TypeError: .*bytes"),
        (lambda raw: raw.update(shards=7), "TypeError"),
        (lambda raw: raw.pop("samples"), "TypeError: .*samples"),
    ],
)
def test_a_manifest_of_other_types_is_one_line(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str], change: Callable, named: str
) -> None:
    raw = json.loads((dataset_copy / "manifest.json").read_text())
    change(raw)
    (dataset_copy / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match=f"manifest.json: not a manifest .*{named}"):
        load_manifest(dataset_copy)
    assert data_prep("inspect", dataset_copy) == 2
    error_line(capsys)


def test_a_manifest_that_is_no_object_is_one_line(dataset_copy: Path) -> None:
    for text in ("[]", "3", '"x"', "[" * 100_000, "\udcff"):
        (dataset_copy / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(FormatError, match=r"manifest\.json: not a manifest"):
            load_manifest(dataset_copy)


@pytest.mark.parametrize("command", ["verify", "inspect", "stats"])
def test_what_is_no_dataset_is_one_line(
    tmp_path: Path, dataset_copy: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert data_prep(command, tmp_path / "nowhere") == 2
    assert "no such folder" in error_line(capsys)
    assert data_prep(command, tmp_path) == 2
    assert "manifest.json: missing" in error_line(capsys)
    (dataset_copy / "index.npy").write_bytes(b"\x93NUMPY")
    assert data_prep(command, dataset_copy) == 2
    assert "index.npy: cannot be read as an index" in error_line(capsys)
