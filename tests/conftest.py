import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import two_networks
from tests.data_prep_harness import (
    BIG_OPTIONS,
    PHOTO_OPTIONS,
    data_prep,
    error_line,
    make_big,
    make_photos,
    noise,
)
from tests.harness import make_dataset, write_config
from tests.server import FaultyServer, serving
from trainer.engine.processes import collectives


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tests share the cores with each other: threads that wait for one another on busy cores take ten times as long."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(collectives, "set_threads", lambda: None)  # it would take all cores for this process
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images of 8 x 8 in three uneven shards; read only."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def config_path(tmp_path: Path, dataset: Path) -> Path:
    """A configuration whose run lies in tmp_path / "run"."""
    return write_config(tmp_path, dataset)


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 8 x 8 in 12 shards of 4; read only."""
    return make_dataset(tmp_path_factory.mktemp("many"), images=48, shard_samples=4)


@pytest.fixture(scope="module")
def adversarial_family() -> Iterator[None]:
    with two_networks.registered():
        yield


@pytest.fixture
def server(many_shards: Path) -> Iterator[FaultyServer]:
    """Serves `many_shards`."""
    with serving(many_shards) as running:
        yield running


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for data_prep, see `make_photos`; read only."""
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def prepared_photos(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run makes of `photos`."""
    out = tmp_path_factory.mktemp("prepared-photos")
    assert data_prep(photos, out, *PHOTO_OPTIONS, "--workers", 1) == 0
    return out


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for data_prep, see `make_big`; read only."""
    return make_big(tmp_path_factory.mktemp("big"))


@pytest.fixture(scope="session")
def prepared_big(big: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run makes of `big`."""
    out = tmp_path_factory.mktemp("prepared-big")
    assert data_prep(big, out, *BIG_OPTIONS) == 0
    return out


@pytest.fixture
def one_error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    return lambda: error_line(capsys)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small memory file system with the given options; skips where that is not permitted."""
    place = tmp_path / "mount"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)


@pytest.fixture(scope="session")
def whole_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images of two classes in three shards of 4, 4 and 3, as data_prep writes them; read only."""
    folder = tmp_path_factory.mktemp("verify")
    for i in range(11):
        place = folder / "in" / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        noise(16, 16 + i, seed=i).save(place / f"{i:02d}.png")
    (folder / "in" / "dog" / "99.png").write_bytes(b"junk")
    options = ["--size", 16, "--shard-samples", 4, "--workers", 1, "--max-reject-fraction", 0.5]
    assert data_prep(folder / "in", folder / "out", *options) == 0
    return folder / "out"


@pytest.fixture
def dataset_copy(whole_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_dataset, tmp_path / "copy"))
