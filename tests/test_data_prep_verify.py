"""Promises of `verify`, `inspect` and `stats`: every corruption is found and named; the numbers are the pixels'."""

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset import Dataset
from data_prep.format import FormatError, load_manifest, sha256_of
from tests.data_prep_harness import bytes_of, data_prep, error_line, noise, pixels_of_noise

SIDE = 16
SHARDS = [f"shard-{i:06d}.tar" for i in range(3)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images of two classes in three shards of 4, 4 and 3."""
    folder = tmp_path_factory.mktemp("verify")
    for i in range(11):
        place = folder / "in" / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        noise(16, 16 + i, seed=i).save(place / f"{i:02d}.png")
    (folder / "in" / "dog" / "99.png").write_bytes(b"junk")
    options = ["--size", SIDE, "--shard-samples", 4, "--workers", 1, "--max-reject-fraction", 0.5]
    assert data_prep(folder / "in", folder / "out", *options) == 0
    return folder / "out"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


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
def test_a_whole_dataset_passes(whole: Path, capsys: pytest.CaptureFixture[str], decode: str) -> None:
    before = bytes_of(whole)
    assert data_prep("verify", whole, "--decode", decode, "--workers", 2) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{whole}: no fault found\n", "")
    assert bytes_of(whole) == before


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
    copy: Path, capsys: pytest.CaptureFixture[str], corruption: str
) -> None:
    change, message = CORRUPTIONS[corruption]
    at = member_at(copy, 6)
    edit(copy / SHARDS[1], lambda data: change(data, at))
    (line,) = faults(copy, capsys)
    assert SHARDS[1] in line
    assert "sha256 differs from the manifest's" in line
    assert re.search(message, line)


def test_missing_extra_and_swapped_shards_are_each_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / SHARDS[0]).rename(copy / "held")
    (copy / SHARDS[1]).rename(copy / SHARDS[0])
    (copy / "held").rename(copy / SHARDS[1])
    (copy / SHARDS[2]).rename(copy / "shard-000007.tar")
    lines = faults(copy, capsys)
    assert len(lines) == 4
    for name, message in [
        ("shard-000007.tar", "not in the manifest"),
        (SHARDS[0], f"holds what belongs into {SHARDS[1]}"),
        (SHARDS[1], f"holds what belongs into {SHARDS[0]}"),
        (SHARDS[2], "missing; the manifest lists 3 shards"),
    ]:
        assert any(f"{name}: {message}" in line for line in lines)


def stale_index(copy: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(copy / "index.npy", change(np.load(copy / "index.npy")))


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
        (lambda index: index[:-1], ["index.npy: sha256 differs", "10 rows", f"{SHARDS[2]}: holds 3 members"]),
        (lambda index: index[::-1], ["index.npy: sha256 differs", "not in the order"]),
    ],
)
def test_a_stale_index_is_found_and_what_it_contradicts(
    copy: Path, capsys: pytest.CaptureFixture[str], change: Callable, messages: list[str]
) -> None:
    stale_index(copy, change)
    lines = faults(copy, capsys)
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
    copy: Path, capsys: pytest.CaptureFixture[str], change: Callable, command: str
) -> None:
    stale_index(copy, change)
    assert data_prep(command, copy) == 2
    assert "index.npy: sha256 differs from the manifest's" in error_line(capsys)
    assert not (copy / "stats.npz").exists()


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
    copy: Path, capsys: pytest.CaptureFixture[str], change: Callable, message: str
) -> None:
    stale_index(copy, change)
    resign(copy)
    assert data_prep("stats", copy) == 2
    assert message in error_line(capsys)
    faults(copy, capsys)


def test_a_damaged_member_is_not_counted_in_stats(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = member_at(copy, 6) + 30
    edit(copy / SHARDS[1], lambda data: put(data, at, bytes([data[at] ^ 1])))
    assert data_prep("stats", copy) == 2
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
    copy: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    OTHER_INDEXES[kind](copy / "index.npy")
    assert data_prep(command, copy) == 2
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


def test_signed_nonsense_is_found_too(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = member_at(copy, 6) - 512
    edit(copy / SHARDS[1], lambda data: put(data, at, b"100000006"))  # another name, with a header that is false
    resign(copy)
    assert "damaged header at offset" in faults(copy, capsys)[0]


def test_images_that_do_not_decode_or_have_another_size_are_found_by_decoding(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(copy)
    (copy / "manifest.json").write_text(replace(manifest, image_size=SIDE + 1).to_json())
    assert data_prep("verify", copy, "--decode", "none") == 0
    lines = faults(copy, capsys, "--decode", "sample")
    assert [line.split(": ")[1].split("/")[-1] for line in lines] == SHARDS
    assert all("is 16x16, the manifest says 17x17" in line for line in lines)


def test_names_and_rejects_are_checked(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy / "names.jsonl", lambda data: data.replace(b"cat", b"cow"))
    edit(copy / "rejects.jsonl", lambda data: data * 2)
    lines = faults(copy, capsys)
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
    copy: Path, capsys: pytest.CaptureFixture[str], change: Callable, named: str
) -> None:
    raw = json.loads((copy / "manifest.json").read_text())
    change(raw)
    (copy / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match=f"manifest.json: not a manifest .*{named}"):
        load_manifest(copy)
    assert data_prep("inspect", copy) == 2
    error_line(capsys)


def test_a_manifest_that_is_no_object_is_one_line(copy: Path) -> None:
    for text in ("[]", "3", '"x"', "[" * 100_000, "\udcff"):
        (copy / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(FormatError, match=r"manifest\.json: not a manifest"):
            load_manifest(copy)


@pytest.mark.parametrize("command", ["verify", "inspect", "stats"])
def test_what_is_no_dataset_is_one_line(
    tmp_path: Path, copy: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert data_prep(command, tmp_path / "nowhere") == 2
    assert "no such folder" in error_line(capsys)
    assert data_prep(command, tmp_path) == 2
    assert "manifest.json: missing" in error_line(capsys)
    (copy / "index.npy").write_bytes(b"\x93NUMPY")
    assert data_prep(command, copy) == 2
    assert "index.npy: cannot be read as an index" in error_line(capsys)


# inspect and the contact sheet


def test_inspect_tells_what_is_there(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_prep("inspect", whole) == 0
    out = capsys.readouterr().out
    for line in ("11, RGB 16x16", "stored    webp, ddpm", "folder of 12", "rejected  1", "5  cat", "6  dog"):
        assert line in out
    assert "16-31         11" in out
    assert f"look at   {whole / 'contact_sheet.png'}" in out


def test_the_contact_sheet_shows_every_image_and_is_made_again(copy: Path) -> None:
    sheet = np.asarray(Image.open(copy / "contact_sheet.png"))
    assert sheet.shape == (3 * 18 - 2, 4 * 18 - 2, 3)
    dataset = Dataset.open(copy)
    for i in range(11):
        top, left = 18 * (i // 4), 18 * (i % 4)
        np.testing.assert_array_equal(sheet[top : top + 16, left : left + 16], np.asarray(dataset.read(i)))
    before = bytes_of(copy)
    (copy / "contact_sheet.png").unlink()
    assert data_prep("inspect", copy) == 0
    assert bytes_of(copy) == before


def test_a_contact_sheet_of_many_large_images_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(70):
        (tmp_path / "in" / f"{i}.png").write_bytes(_large())
    assert data_prep(tmp_path / "in", tmp_path / "out", "--size", 300, "--format", "jpeg", "--workers", 1) == 0
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size == (2046, 2046)


def _large() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (300, 300), "red").save(stream, "PNG")
    return stream.getvalue()


# stats


def test_stats_are_those_of_the_pixels(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_prep("stats", copy, "--workers", 2) == 0
    pixels = np.stack([np.asarray(Dataset.open(copy).read(i)) for i in range(11)]).transpose(0, 3, 1, 2)
    x = pixels / 127.5 - 1
    stats = np.load(copy / "stats.npz", allow_pickle=False)
    assert (stats["count"], str(stats["fingerprint"])) == (11, load_manifest(copy).fingerprint)
    np.testing.assert_allclose(stats["mean_image"], x.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(stats["mean_square"], (x**2).mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(stats["channel_mean"], x.mean(axis=(0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(stats["channel_std"], x.std(axis=(0, 2, 3)), atol=1e-12)
    for channel in range(3):
        expected = np.histogram(pixels[:, channel], bins=np.arange(257))[0]
        np.testing.assert_array_equal(stats["histogram"][channel], expected)
    assert ", ".join(f"{value:.4f}" for value in x.mean(axis=(0, 2, 3))) in capsys.readouterr().out
    assert not (copy / ".staging").exists()


def test_stats_are_the_same_bytes_for_any_number_of_threads(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.stats.CHUNK", 3)
    digests = set()
    for workers in (1, 3):
        assert data_prep("stats", copy, "--workers", workers) == 0
        digests.add(sha256_of(copy / "stats.npz"))
    assert len(digests) == 1
    assert data_prep("verify", copy) == 0


def test_stats_of_grey_and_of_kept_bytes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pixels = np.stack([pixels_of_noise(16, 20, seed=i)[..., 0] for i in range(3)])
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    options = ["--size", 16, "--transform", "source", "--mode", "L", "--workers", 1]
    assert data_prep(tmp_path / "in", tmp_path / "out", *options) == 0
    assert data_prep("stats", tmp_path / "out") == 0
    stats = np.load(tmp_path / "out" / "stats.npz")
    expected = pixels[:, None, :, 2:18] / 127.5 - 1
    np.testing.assert_allclose(stats["mean_image"], expected.mean(axis=0), atol=1e-12)
