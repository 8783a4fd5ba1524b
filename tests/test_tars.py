"""Tars of other programs: read as webdataset reads them, and never ended early in silence."""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from data_prep.tar_headers import BLOCK, TarError, walk
from tests.data_harness import encoded, image_of, images_of, pixels, write_tar
from tests.harness import events, launch, logged, overrides
from trainer.data.datasets.dataset import InPlace, Shard
from trainer.data.datasets.tars import TarDataset
from trainer.errors import DataError, SampleError


def open_tars(*paths: Path, index_folder: Path | None = None) -> TarDataset:
    shards = []
    for path in paths:
        found = path.stat()
        digest = f"{path.name}-{found.st_size}-{found.st_mtime_ns}"
        shards.append(Shard(url=str(path), samples=0, bytes=found.st_size, digest=digest, verifiable=False))
    return TarDataset("here", shards, image_size=8, mode="RGB", files=InPlace(), index_folder=index_folder)


def members_of(path: Path) -> list[tuple[str, bytes]]:
    content = path.read_bytes()
    with path.open("rb") as stream:
        found = walk(stream.fileno())
        return [(m.name, content[m.offset : m.offset + m.length]) for m in found if m.kind == "file"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_walk_finds_what_tarfile_finds(tmp_path: Path, form: int) -> None:
    names = ["a.png", "folder/b.png", "x" * 60 + "/" + "y" * 90 + ".png", "empty.txt"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long/" * 40 + "c.png", "ünï/cödé 图.png"]
    contents = {name: bytes([n]) * (n * 700) for n, name in enumerate(reversed(names))}
    assert members_of(write_tar(tmp_path / "a.tar", contents, form=form)) == list(contents.items())


@pytest.mark.parametrize("form", ["ustar", "gnu", "posix"])
def test_the_walk_reads_gnu_tars_own_archives(tmp_path: Path, form: str) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        (tmp_path / "in" / name).write_bytes(name.encode() * 300)
    (tmp_path / "in" / "link.png").symlink_to("a.png")
    os.link(tmp_path / "in" / "a.png", tmp_path / "in" / "z.png")
    command = ["tar", "--sort=name", f"--format={form}", "-cf", "a.tar", "-C", "in", "."]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert members_of(tmp_path / "a.tar") == [("./a.png", b"a.png" * 300), ("./deep/b.png", b"deep/b.png" * 300)]


def test_sizes_that_octal_digits_do_not_hold(tmp_path: Path) -> None:
    """9 GiB of nothing: GNU's binary size and pax's decimal one; the file has a hole there."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        member = tarfile.TarInfo("big.bin")
        member.size = 9 << 30
        path = tmp_path / f"{form}.tar"
        with path.open("wb") as stream:
            stream.write(member.tobuf(form))
            stream.seek(member.size, os.SEEK_CUR)
            stream.write(tarfile.TarInfo("last.png").tobuf() + bytes(2 * BLOCK))
        with path.open("rb") as stream:
            assert [(m.name, m.length) for m in walk(stream.fileno())] == [("big.bin", 9 << 30), ("last.png", 0)]


def test_every_header_of_a_long_tar_is_checked(tmp_path: Path) -> None:
    """They are compared some thousands at a time."""
    path = write_tar(tmp_path / "a.tar", {f"{n}.png": b"" for n in range(9000)})
    assert [name for name, _ in members_of(path)] == [f"{n}.png" for n in range(9000)]
    whole = path.read_bytes()
    for number in (0, 4095, 4096, 8999):
        at = number * BLOCK
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        with path.open("rb") as stream, pytest.raises(TarError, match=f"^damaged header at offset {at}$"):
            walk(stream.fileno())


def cut(where: int) -> Callable[[bytearray], None]:
    def damage(content: bytearray) -> None:
        del content[where:]

    return damage


def overwritten(begin: int, new: bytes) -> Callable[[bytearray], None]:
    def damage(content: bytearray) -> None:
        content[begin : begin + len(new)] = new

    return damage


# Ten members of 1000 bytes, each at a multiple of 1536.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(3 * 1536), "cut off at offset 4608: no end-of-archive mark"),
        (cut(3 * 1536 + 100), "cut off at offset 4608: no end-of-archive mark"),
        (cut(3 * 1536 + 900), "cut off: the member at offset 4608 goes on to 6120, the file to 5508"),
        (cut(15360 + 512), "cut off at offset 15360: no end-of-archive mark"),
        (cut(0), "cut off at offset 0: no end-of-archive mark"),
        (overwritten(4608 + 3, b"\x7f"), "damaged header at offset 4608"),
        (overwritten(4608 + 130, b"7"), "damaged header at offset 4608"),
        (overwritten(4608 + 124, b"zz"), "damaged header at offset 4608"),
        (overwritten(4608 + 148, b"\xff" * 4), "damaged header at offset 4608"),
        (overwritten(4096, bytes(4096)), "zeros at offset 4608 where a header should be, and more data behind them"),
    ],
)
def test_every_way_in_which_a_tar_ends_early_is_an_error(
    tmp_path: Path, damage: Callable[[bytearray], None], message: str
) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n}.png": bytes([n + 1]) * 1000 for n in range(10)})
    content = bytearray(path.read_bytes())
    damage(content)
    path.write_bytes(content)
    with path.open("rb") as stream, pytest.raises(TarError, match=f"^{message}$"):
        walk(stream.fileno())
    with pytest.raises(DataError, match=rf"a\.tar: {message}; restore it or leave it out$"):
        open_tars(path)


def test_samples_are_webdatasets(tmp_path: Path) -> None:
    """Written by webdataset and read by both: the same images, the same labels, in the same order."""
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for n in range(5 * shard, 5 * shard + 5):
                writer.write({"__key__": f"k/{n}", "png": encoded(pixels(n)), "cls": n * 10, "json": {"n": n}})
    ours = open_tars(tmp_path / "0.tar", tmp_path / "1.tar")
    theirs = wds.WebDataset([str(tmp_path / f"{n}.tar") for n in range(2)], shardshuffle=False, empty_check=False)
    expected = [(sample["png"], int(sample["cls"])) for sample in theirs]
    assert len(expected) == 10
    assert list(zip([ours.read(n) for n in range(10)], ours.index["label"])) == expected
    assert (image_of(ours, 7) == pixels(7).transpose(2, 0, 1)).all()
    assert ours.shards_of([0, 4, 5, 9]).tolist() == [0, 0, 1, 1]


def test_images_that_webdataset_would_lose_are_kept(tmp_path: Path) -> None:
    png = [encoded(pixels(n)) for n in range(8)]
    path = write_tar(
        tmp_path / "a.tar",
        {
            "a.1.png": png[0],
            "a.2.PNG": png[1],
            "bare": png[2],
            "notes": b"not an image",
            "c.png": png[3],
            "c.mask.png": png[4],
            "._c.png": b"of macOS",
            "sub/c.jpeg": encoded(pixels(5), "JPEG"),
            "readme.txt": b"words",
        },
    )
    dataset = open_tars(path)
    assert [dataset.read(n) for n in range(4)] == [png[0], png[1], png[2], png[3]]
    assert len(dataset) == 5
    assert dataset.index["label"].tolist() == [-1] * 5


def test_images_that_are_left_out_are_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(
        tmp_path / "a.tar", {**images_of(2), "x.GIF": b"GIF89a", "y.seg.tiff": b"II*", "0001.gif": b"a preview"}
    )
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            link.type, link.linkname = kind, "0000.png"
            archive.addfile(link)
    assert len(open_tars(path, index_folder=tmp_path / "indexes")) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [
        f"{path}: link1.jpg: 4 images are left out; JPEG, PNG and WebP are read that are files of their own in the tar "
        "(data_prep reads more)"
    ]
    open_tars(path, index_folder=tmp_path / "indexes")
    open_tars(write_tar(tmp_path / "b.tar", {**images_of(2), "0000.txt": b"caption"}))
    assert not capsys.readouterr().err


def test_a_word_for_a_label_is_told_of_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"0000.cls": b"7", "0001.cls": b"n01440764", "0002.cls": b"", "0003.cls": b"99999999999"}
    path = write_tar(tmp_path / "a.tar", images_of(4) | labels)
    assert open_tars(path).index["label"].tolist() == [7, -1, -1, -1]
    assert capsys.readouterr().err.strip() == (
        f"{path}: 0001.cls: 3 labels are no class numbers and left out (data_prep reads words)"
    )


@pytest.mark.parametrize("sparse_version", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_files_are_known_for_what_they_are(tmp_path: Path, sparse_version: str) -> None:
    """Their bytes in the tar are not those of the file. Many holes, so that GNU's map goes on in further blocks."""
    with (tmp_path / "a.png").open("wb") as stream:
        for hole in range(30):
            stream.seek(hole * 2**16)
            stream.write(bytes([hole + 1]) * 4096)
    (tmp_path / "b.png").write_bytes(b"whole")
    form = ["--format=gnu"] if sparse_version == "gnu" else ["--format=posix", f"--sparse-version={sparse_version}"]
    command = ["tar", "--sparse", "--hole-detection=raw", *form, "-cf", "a.tar", "a.png", "b.png"]
    subprocess.run(command, check=True, cwd=tmp_path)
    with (tmp_path / "a.tar").open("rb") as stream:
        assert [(m.name, m.kind) for m in walk(stream.fileno())] == [("a.png", "sparse"), ("b.png", "file")]
    assert members_of(tmp_path / "a.tar") == [("b.png", b"whole")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"1", "a.jpg": b"2"}, r"a\.png and a\.jpg are images of one sample"),
        ({"a.txt": b"1"}, "no image in 1 tars"),
    ],
)
def test_what_is_no_sample_is_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_tars(write_tar(tmp_path / "a.tar", members))


def test_images_are_cropped_and_grey_ones_coloured_but_nothing_is_resized(tmp_path: Path) -> None:
    grey = pixels(3)[..., 0]
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG")
    members = {
        "a.png": encoded(pixels(1, 13, 8)),
        "b.png": encoded(pixels(2, 8, 11)),
        "c.png": stream.getvalue(),
        "d.png": encoded(pixels(4, 9, 9)),
        "e.png": b"<html>404</html>",
    }
    dataset = open_tars(write_tar(tmp_path / "a.tar", members))
    assert (image_of(dataset, 0) == pixels(1, 13, 8)[:, 2:10].transpose(2, 0, 1)).all()
    assert (image_of(dataset, 1) == pixels(2, 8, 11)[1:9].transpose(2, 0, 1)).all()
    assert (image_of(dataset, 2) == grey).all()
    with pytest.raises(SampleError, match=r"a\.tar: member d\.png \(sample 3\): is 9x9; its shorter side must be 8"):
        image_of(dataset, 3)
    with pytest.raises(SampleError, match=r"a\.tar: member e\.png \(sample 4\): cannot be decoded"):
        image_of(dataset, 4)


def test_the_index_is_kept_until_a_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kept = write_tar(tmp_path / "a.tar", images_of(3)), tmp_path / "indexes"
    first = open_tars(path, index_folder=kept)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.data.datasets.tars.walk", lambda _: pytest.fail("walked again"))
        again = open_tars(path, index_folder=kept)
    assert [again.read(n) for n in range(3)] == [first.read(n) for n in range(3)]
    assert again.fingerprint == first.fingerprint == open_tars(path).fingerprint
    write_tar(path, images_of(4))
    changed = open_tars(path, index_folder=kept)
    assert len(changed) == 4
    assert changed.fingerprint != first.fingerprint


@pytest.mark.parametrize("ending", [".npy", ".json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "gone"])
def test_a_kept_index_that_was_damaged_is_made_anew(tmp_path: Path, ending: str, damage: str) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", images_of(3, first=3 * n)) for n in range(2)]
    first = open_tars(*paths, index_folder=tmp_path / "indexes")
    (kept,) = (tmp_path / "indexes").glob(f"*{ending}")
    content = kept.read_bytes()
    if damage == "gone":
        kept.unlink()
    elif damage == "changed":
        kept.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    else:
        kept.write_bytes(content[: 0 if damage == "empty" else len(content) // 2])
    again = open_tars(*paths, index_folder=tmp_path / "indexes")
    assert [again.read(n) for n in range(6)] == [first.read(n) for n in range(6)]
    assert again.fingerprint == first.fingerprint
    assert kept.read_bytes() == content


def test_a_folder_of_foreign_tars_trains_and_resumes(tmp_path: Path, config_path: Path) -> None:
    """Two processes; one of them walks. Stopped and resumed, and refused when a tar was swapped for another."""
    data = tmp_path / "tars"
    data.mkdir()
    for shard, count in enumerate((7, 1, 13)):
        write_tar(data / f"part-{shard}.tar", images_of(count, first=20 * shard))
    settings = overrides(data__path=f"{data}/part-{{0..2}}.tar", data__order="windowed", data__window=2)
    launch(2, "--config", str(config_path), *settings, *overrides(train__duration="4 steps"))
    launch(1, "--config", str(config_path), *settings)
    run = tmp_path / "run"
    assert sorted(logged(run)) == [1, 2, 3, 4, 5, 6]
    assert len(list((run / "indexes").glob("*.npy"))) == 1
    assert [event["event"] for event in events(run)].count("started") == 2
    write_tar(data / "part-1.tar", images_of(1, first=90))
    output = launch(1, "--config", str(config_path), *settings, *overrides(train__duration="8 steps"), expect=2)
    assert "belongs to another run: data (manifest)" in output


def test_an_unfinished_folder_of_data_preps_is_no_folder_of_tars(
    dataset: Path, tmp_path: Path, config_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (copy / "manifest.json").unlink()
    output = launch(1, "--config", str(config_path), *overrides(data__path=copy), expect=2)
    assert "manifest.json: missing, so the dataset is unfinished" in output
