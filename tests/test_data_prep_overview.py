"""`inspect` and `stats`: what they tell is what is there, and the numbers are the pixels'."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.format import load_manifest, sha256_of
from data_prep.inspection.dataset import Dataset
from tests.data_prep_harness import bytes_of, data_prep, pixels_of_noise


def test_inspect_tells_what_is_there(whole_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_prep("inspect", whole_dataset) == 0
    out = capsys.readouterr().out
    for line in ("11, RGB 16x16", "stored    webp, ddpm", "folder of 12", "rejected  1", "5  cat", "6  dog"):
        assert line in out
    assert "16-31         11" in out
    assert f"look at   {whole_dataset / 'contact_sheet.png'}" in out


def test_the_contact_sheet_shows_every_image_and_is_made_again(dataset_copy: Path) -> None:
    sheet = np.asarray(Image.open(dataset_copy / "contact_sheet.png"))
    assert sheet.shape == (3 * 18 - 2, 4 * 18 - 2, 3)
    dataset = Dataset.open(dataset_copy)
    for i in range(11):
        top, left = 18 * (i // 4), 18 * (i % 4)
        np.testing.assert_array_equal(sheet[top : top + 16, left : left + 16], np.asarray(dataset.read(i)))
    before = bytes_of(dataset_copy)
    (dataset_copy / "contact_sheet.png").unlink()
    assert data_prep("inspect", dataset_copy) == 0
    assert bytes_of(dataset_copy) == before


def test_a_contact_sheet_of_many_large_images_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(70):
        (tmp_path / "in" / f"{i}.png").write_bytes(large())
    assert data_prep(tmp_path / "in", tmp_path / "out", "--size", 300, "--format", "jpeg", "--workers", 1) == 0
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size == (2046, 2046)


def large() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (300, 300), "red").save(stream, "PNG")
    return stream.getvalue()


# stats


def test_stats_are_those_of_the_pixels(dataset_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_prep("stats", dataset_copy, "--workers", 2) == 0
    pixels = np.stack([np.asarray(Dataset.open(dataset_copy).read(i)) for i in range(11)]).transpose(0, 3, 1, 2)
    x = pixels / 127.5 - 1
    stats = np.load(dataset_copy / "stats.npz", allow_pickle=False)
    assert (stats["count"], str(stats["fingerprint"])) == (11, load_manifest(dataset_copy).fingerprint)
    np.testing.assert_allclose(stats["mean_image"], x.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(stats["mean_square"], (x**2).mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(stats["channel_mean"], x.mean(axis=(0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(stats["channel_std"], x.std(axis=(0, 2, 3)), atol=1e-12)
    for channel in range(3):
        expected = np.histogram(pixels[:, channel], bins=np.arange(257))[0]
        np.testing.assert_array_equal(stats["histogram"][channel], expected)
    assert ", ".join(f"{value:.4f}" for value in x.mean(axis=(0, 2, 3))) in capsys.readouterr().out
    assert not (dataset_copy / ".staging").exists()


def test_stats_are_the_same_bytes_for_any_number_of_threads(
    dataset_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.inspection.stats.CHUNK", 3)
    digests = set()
    for workers in (1, 3):
        assert data_prep("stats", dataset_copy, "--workers", workers) == 0
        digests.add(sha256_of(dataset_copy / "stats.npz"))
    assert len(digests) == 1
    assert data_prep("verify", dataset_copy) == 0


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
