import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import LAB, Cluster

NODES = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is for `make test-slurm`."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM of three nodes, started once and stopped in the end; skipped where there can be none."""
    able = subprocess.run([str(LAB), "check"], capture_output=True, text=True)
    if able.returncode != 0:
        pytest.skip(f"no SLURM can be started here: {able.stderr.strip().removeprefix('lab.sh: ')}")
    cluster = Cluster(tmp_path_factory.mktemp("lab"))
    cluster.lab("start", str(NODES), str(os.getpid()))
    yield cluster
    cluster.lab("stop")


@pytest.fixture(scope="module")
def cluster(lab: Cluster) -> Iterator[Cluster]:
    """The lab, with all nodes up and free when the module's tests begin."""
    yield lab
    lab.cancel_all()


@pytest.fixture(autouse=True)
def nothing_left_behind(cluster: Cluster) -> Iterator[None]:
    """What a failed test left running must not fail the next one."""
    yield
    cluster.cancel_all()
