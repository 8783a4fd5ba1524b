"""A worker keeps the memory of one image for the next."""

import resource
import subprocess
from pathlib import Path

import pytest

from tests.data_prep_harness import command, file_of, noise

FEW, MANY = 33, 63  # both more than the 32 from which the main process estimates the room
PAGES_OF_AN_IMAGE = 1365 * 1024 * 4 // resource.getpagesize()  # as Pillow holds RGB


@pytest.mark.slow
def test_memory_is_not_mapped_anew_for_each_image(tmp_path: Path) -> None:
    """Counted in page faults, for JPEGs of four times the side."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(file_of(noise(8, 11, seed=0).resize((1365, 1024)), "JPEG"))

    def faults(count: int) -> int:
        source = tmp_path / f"{count}"
        source.mkdir()
        for number in range(count):
            (source / f"{number}.jpg").hardlink_to(photo)
        run = command(source, tmp_path / f"out-{count}", "--size", 256, "--format", "jpeg", "--workers", 1)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        subprocess.run(run, check=True, capture_output=True, timeout=120)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before

    an_image = (faults(MANY) - faults(FEW)) / (MANY - FEW)
    assert an_image < PAGES_OF_AN_IMAGE / 3
