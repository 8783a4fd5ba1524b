from pathlib import Path

import pytest

from tests.harness import make_dataset, write_config


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images of 8 x 8 in three uneven shards; read only."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def config_path(tmp_path: Path, dataset: Path) -> Path:
    """A configuration whose run lies in tmp_path / "run"."""
    return write_config(tmp_path, dataset)
