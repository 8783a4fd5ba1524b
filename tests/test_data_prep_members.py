"""What goes with an image is kept: class, caption, array and second image become members of its sample."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from data_prep.errors import DataPrepError
from data_prep.format import load_manifest
from data_prep.sources import Wanted, open_source
from data_prep.sources.rules import SIDECAR
from data_prep.write import build
from tests.data_prep_harness import (
    bytes_of,
    data_prep,
    error_line,
    file_of,
    noise,
    npy_of,
    packed,
    pixels_of_noise,
)

SIZE = 8
OPTIONS = ["--size", SIZE, "--workers", 1, "--shard-samples", 3]


def png(seed: int = 0, side: int = SIZE) -> bytes:
    return file_of(noise(side, side, seed), "PNG")


def further_of(source: Any) -> list[dict[str, bytes]]:
    return [source.further(i) for i in range(len(source.names))]


def decoded(folder: Path) -> list[dict[str, Any]]:
    """The samples, as plain webdataset reads and decodes them."""
    shards = [str(folder / shard.name) for shard in load_manifest(folder).shards]
    return list(wds.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8"))


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples with everything, as webdataset writes them; the fourth has only its image."""
    path = tmp_path_factory.mktemp("rich") / "in.tar"
    with wds.TarWriter(str(path)) as writer:
        for i in range(7):
            array = np.arange(6, dtype=np.float32).reshape(2, 3) + i
            further = {"cls": i % 2, "txt": f" an öwl {i}\n", "npy": array, "low.png": pixels_of_noise(4, 4, seed=i)}
            writer.write(
                {"__key__": f"k{i}", "png": pixels_of_noise(SIZE, SIZE, seed=i), **(further if i != 3 else {})}
            )
    return path


@pytest.fixture(scope="module")
def prepared(rich: Path) -> Path:
    assert data_prep(rich, rich.parent / "out", *OPTIONS) == 0
    return rich.parent / "out"


def test_plain_webdataset_reads_all_of_it(prepared: Path) -> None:
    samples = decoded(prepared)
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(7)]
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["webp"], pixels_of_noise(SIZE, SIZE, seed=i))
        if i == 3:
            assert not sample.keys() & {"cls", "txt", "npy", "low.webp"}
            continue
        assert (sample["cls"], sample["txt"]) == (i % 2, f"an öwl {i}")
        np.testing.assert_array_equal(sample["npy"], np.arange(6, dtype=np.float32).reshape(2, 3) + i)
        np.testing.assert_array_equal(sample["low.webp"], pixels_of_noise(4, 4, seed=i))


def test_the_manifest_tells_of_it_and_the_commands_understand_it(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(prepared)
    assert json.loads((prepared / "manifest.json").read_text())["format_version"] == 3
    assert manifest.members == {"cls": 0, "txt": 0, "npy": 0, "low": 4}
    assert manifest.report["members"] == dict.fromkeys(manifest.members, 6)
    assert data_prep("verify", prepared, "--decode", "all") == 0
    assert data_prep("stats", prepared) == 0
    assert data_prep("inspect", prepared) == 0
    printed = capsys.readouterr().out.splitlines()
    for line in ("members           6  cls", "                  6  low, 4x4", "classes   2, 1 images without one"):
        assert line in printed
    with Image.open(prepared / "contact_sheet.png") as sheet:
        assert sheet.width == 3 * SIZE + 2 * 2


def test_the_bytes_are_the_same_for_any_number_of_workers(rich: Path, prepared: Path, tmp_path: Path) -> None:
    assert data_prep(rich, tmp_path / "out", *OPTIONS, "--workers", 2) == 0
    assert {name: digest for name, digest in bytes_of(prepared).items() if name != "stats.npz"} == bytes_of(
        tmp_path / "out"
    )


def test_images_alone_are_format_2_to_the_byte(tmp_path: Path) -> None:
    images = {f"{i}.png": png(i) for i in range(4)}
    packed(tmp_path / "alone", images)
    packed(tmp_path / "more", images | {"0.txt": b"x", "1.txt": b"y"})
    assert data_prep(tmp_path / "alone", tmp_path / "1", *OPTIONS) == 0
    assert data_prep(tmp_path / "more", tmp_path / "2", *OPTIONS, "--labels", "none") == 0
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert "members" not in manifest
    assert load_manifest(tmp_path / "2").report["left_out"] == {SIDECAR: 2}
    alone, more = (
        {name: digest for name, digest in bytes_of(tmp_path / out).items() if name != "manifest.json"} for out in "12"
    )
    assert alone == more


CAPTIONS: dict[str, tuple[dict[str, bytes], list[str], list[bytes | None]]] = {
    "beside": ({"a/0.txt": b"\xef\xbb\xbfone", "a/1.TXT": b"two"}, [], [b"one", b"two", None]),
    "csv": ({"metadata.csv": b"file_name,text\na/0.png,one\nb/2.png,three\n"}, [], [b"one", None, b"three"]),
    "jsonl": (
        {"metadata.jsonl": b'{"file_name": "a/0.png", "caption": "one"}\n{"file_name": "a/1.png", "caption": 3}'},
        [],
        [b"one", b"3", None],
    ),
    "by name": (
        {"metadata.csv": b"file_name,text,tags\na/0.png,one,uno\na/1.png,two,due\n", "b/2.txt": b"three"},
        ["--caption-column", "tags"],
        [b"uno", b"due", None],
    ),
}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_lie_beside_or_in_a_metadata_file(tmp_path: Path, case: str, kind: str) -> None:
    files, options, expected = CAPTIONS[case]
    images = {name: png() for name in ("a/0.png", "a/1.png", "b/2.png")}
    source = packed(tmp_path / "in", images | files)
    if kind == "zip":
        source = zipped(source)
    assert data_prep(source, tmp_path / "out", *OPTIONS, *options) == 0
    written = [sample.get("txt") for sample in decoded(tmp_path / "out")]
    assert written == [None if caption is None else caption.decode() for caption in expected]


def zipped(folder: Path, title: str = "in") -> Path:
    return Path(shutil.make_archive(str(folder.with_name(title)), "zip", folder))


def tarred(folder: Path, title: str = "in") -> Path:
    path = folder.with_name(f"{title}.tar")
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*")):
            tar.add(file, str(file.relative_to(folder)), recursive=False)
    return path


PAIRS = {
    "a folder beside": ["photo/a/0.png", "photo/a/1.png", "drawn/a/0.png"],
    "a folder below": ["a/0.png", "a/1.png", "drawn/a/0.png"],
    "an ending": ["a/0.png", "a/1.png", "a/0_drawn.png"],
    "a dotted ending": ["a/0.png", "a/1.png", "a/0.drawn.png"],
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("case", PAIRS)
def test_second_images_are_found_by_their_name(tmp_path: Path, case: str, kind: str) -> None:
    first, second, drawn = PAIRS[case]
    path = packed(tmp_path / "in", {first: png(0), second: png(1), drawn: png(2, side=6)})
    if kind == "zip":
        path = zipped(path)
    if kind == "tar":
        path = tarred(path)
    source = open_source(str(path), Wanted(pair="drawn"))
    assert (list(source.names), further_of(source)) == ([first, second], [{"source": png(2, side=6)}, {}])
    assert not source.left_out
    assert data_prep(path, tmp_path / "out", *OPTIONS, "--pair", "drawn") == 0
    sample, other = decoded(tmp_path / "out")
    np.testing.assert_array_equal(sample["source.webp"], pixels_of_noise(6, 6, seed=2))
    assert "source.webp" not in other
    assert load_manifest(tmp_path / "out").members["source"] == 6


def test_parquet_has_captions_and_second_images_in_columns(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    before, after = ([{"bytes": png(seed + i), "path": f"{i}.png"} for i in range(3)] for seed in (0, 10))
    columns = {"edited": pa.array(after, struct), "original": pa.array(before, struct), "text": ["a", None, "c"]}
    pq.write_table(pa.table(columns | {"instruction": ["x", "y", "z"]}), tmp_path / "a.parquet")
    options = ["--image-column", "edited", "--pair", "original"]
    assert data_prep(tmp_path / "a.parquet", tmp_path / "out", *OPTIONS, *options) == 0
    samples = decoded(tmp_path / "out")
    assert [sample.get("txt") for sample in samples] == ["a", None, "c"]
    np.testing.assert_array_equal(samples[1]["webp"], pixels_of_noise(SIZE, SIZE, seed=11))
    np.testing.assert_array_equal(samples[1]["source.webp"], pixels_of_noise(SIZE, SIZE, seed=1))
    source = open_source(str(tmp_path / "a.parquet"), Wanted(caption_column="instruction", image_column="edited"))
    assert further_of(source) == [{"txt": b"x"}, {"txt": b"y"}, {"txt": b"z"}]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--pair", "drawn"], "--pair drawn: no image has a second one of that name"),
        (["--caption-column", "tags"], "--caption-column tags: there is no such column of text"),
    ],
)
def test_what_is_asked_for_and_not_there_is_one_line(
    tmp_path: Path, option: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = packed(tmp_path / "in", {"0.png": png(), "0.txt": b"x"})
    assert data_prep(source, tmp_path / "out", *OPTIONS, *option) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("further", "reason"),
    [
        ({"1.txt": b"\xff\xfe"}, "txt: not UTF-8"),
        ({"1.npy": npy_of(np.zeros(50))[:-8]}, "npy: no array of numbers"),
        ({"1.npy": npy_of(np.array([{}]), allow_pickle=True)}, "npy: no array of numbers"),
        ({"1.low.png": png(1)[:60]}, "low: truncated or corrupt"),
        ({"1.low.png": png(1, side=3)}, "low: smaller than --size 4 (--upscale would enlarge)"),
    ],
)
def test_a_damaged_member_rejects_its_sample_whole(
    tmp_path: Path, further: dict[str, bytes], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with wds.TarWriter(str(tmp_path / "in.tar")) as writer:
        for i in range(3):
            whole = {"txt": b"x", "npy": npy_of(np.zeros(50)), "low.png": png(i, side=4)}
            own = {name.partition(".")[2]: data for name, data in further.items()} if i == 1 else {}
            writer.write({"__key__": str(i), "png": png(i), **whole, **own})
    assert data_prep(tmp_path / "in.tar", tmp_path / "out", *OPTIONS, "--max-reject-fraction", 0.5) == 0
    assert f"          1 {reason}" in capsys.readouterr().out.splitlines()
    assert [sample["__key__"] for sample in decoded(tmp_path / "out")] == ["000000000", "000000002"]
    assert json.loads((tmp_path / "out" / "rejects.jsonl").read_text())["reason"] == reason
    assert data_prep("verify", tmp_path / "out", "--decode", "all") == 0


def begun(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preparation that was killed before its first shard."""

    def killed(*_: object) -> None:
        raise DataPrepError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_shards", killed)
        assert data_prep(source, out, *OPTIONS) == 1


def begun_by_an_earlier_version(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(source, out, monkeypatch)
    note = out / ".staging" / "begun.json"
    parameters = json.loads(note.read_text())
    assert parameters.pop("the members") == {"cls": 0, "txt": 0}
    note.write_text(json.dumps(parameters))


def test_what_an_earlier_version_began_goes_on_as_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = packed(tmp_path / "in", {"a/0.png": png(0), "b/1.png": png(1), "b/1.txt": b"x"})
    begun_by_an_earlier_version(source, tmp_path / "out", monkeypatch)
    assert data_prep(source, tmp_path / "out", *OPTIONS) == 0
    assert (load_manifest(tmp_path / "out").format_version, load_manifest(tmp_path / "out").classes) == (2, ["a", "b"])
    kept = f"{tmp_path / 'out'}: was begun as images alone and stays so; its source also has txt"
    assert kept in capsys.readouterr().out
    assert data_prep(source, tmp_path / "out", *OPTIONS) == 0
    printed = capsys.readouterr().out
    assert "already finished, nothing to do" in printed
    assert kept in printed


FILES_OF_CAPTIONS: dict[str, tuple[dict[str, bytes], dict[str, bytes]]] = {
    "beside": ({"0.txt": b"an owl", "1.txt": b"a cat"}, {"0.txt": b"an owlet"}),
    "listed": (
        {"metadata.csv": b"file_name,text\n0.png,an owl\n1.png,a cat\n"},
        {"metadata.csv": b"file_name,text\n0.png,an elk\n1.png,a cat\n"},
    ),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("case", FILES_OF_CAPTIONS)
def test_a_source_with_other_captions_is_another(
    tmp_path: Path,
    case: str,
    kind: str,
    finished: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, after = FILES_OF_CAPTIONS[case]
    folder = packed(tmp_path / "in", {"0.png": png(0), "1.png": png(1), **before})
    pack = {"folder": lambda path, _: path, "zip": zipped, "tar": tarred}[kind]
    if finished:
        assert data_prep(pack(folder, "1"), tmp_path / "out", *OPTIONS) == 0
    else:
        begun(pack(folder, "1"), tmp_path / "out", monkeypatch)
    packed(folder, after)
    capsys.readouterr()
    assert data_prep(pack(folder, "2"), tmp_path / "out", *OPTIONS) == 2
    assert "was made with a source {" in capsys.readouterr().err.splitlines()[-1]
    packed(folder, before)
    assert data_prep(pack(folder, "1"), tmp_path / "out", *OPTIONS) == 0
    assert [sample["txt"] for sample in decoded(tmp_path / "out")] == ["an owl", "a cat"]


def test_images_alone_whose_source_has_got_captions_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = packed(tmp_path / "in", {"0.png": png(0), "1.png": png(1)}), tmp_path / "out"
    assert data_prep(source, out, *OPTIONS) == 0
    assert "images alone" not in capsys.readouterr().out
    packed(source, {"0.txt": b"an owl"})
    assert data_prep(source, out, *OPTIONS) == 0
    told = f"{out}: was begun as images alone and stays so; its source also has txt, which another folder would keep"
    assert told in capsys.readouterr().out.splitlines()
    assert data_prep(source, out, *OPTIONS, "--labels", "none") == 2  # as before: that is another source


def test_a_run_with_other_members_is_refused(rich: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_prep(rich, prepared, *OPTIONS) == 0
    assert "already finished" in capsys.readouterr().out
    assert data_prep(rich, prepared, *OPTIONS, "--labels", "none") == 2
    assert "was made with a source" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["cls", "txt", "npy", "low"])
def test_verify_compares_every_member(
    prepared: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    row = np.load(copy / "index.npy")[1]
    shard = copy / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[int(row[name]["offset"])] ^= 1
    shard.write_bytes(data)
    assert data_prep("verify", copy) == 2
    assert f"member 000000001.{name} is damaged (crc32 differs from the index)" in error_line(capsys)
