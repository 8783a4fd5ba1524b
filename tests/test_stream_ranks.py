"""Several ranks see the same stream, however many there are and however their loaders start."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data_harness import damage, expected, streamed, streamed_under_torchrun, with_mixture
from tests.harness import load_config, make_dataset
from trainer.data.training_data import open_training_data

ORDERS = ("global", "windowed", "lanes")
EVERY_WAY = [f"{order}:{method}:{n}" for order in ORDERS for method in ("fork", "spawn") for n in range(4)]
SOME_WAYS = ["global:fork:0", "windowed:spawn:1", "lanes:fork:2"]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_stream_is_the_same_on_any_number_of_ranks(config_path: Path, processes: int) -> None:
    """21 images in uneven shards, so epochs end inside batches, and lanes inside shards."""
    ways = ["global:fork:0", "windowed:fork:1", "lanes:fork:2"]
    assert streamed(processes, config_path, *ways) == [expected(config_path, way) for way in ways]


def test_the_stream_is_the_same_with_three_processes(config_path: Path) -> None:
    """24 images a batch, more than the 21 of an epoch."""
    config_path.write_text(config_path.read_text().replace("global_batch = 8", "global_batch = 24"))
    ways = ["global:fork:0", "windowed:fork:1", "lanes:fork:0"]
    assert streamed(3, config_path, *ways) == [expected(config_path, way) for way in ways]


def test_epochs_are_exact_through_restarts_with_other_numbers_of_processes(config_path: Path) -> None:
    """Jobs of two, one and two processes, each from the step where the last one ended, inside an epoch."""
    ids: dict[str, list[int]] = {order: [] for order in ORDERS}
    for processes, first, last in ((2, 0, 2), (1, 2, 5), (2, 5, 8)):
        found = streamed(processes, config_path, *(f"{order}:fork:1:{first}:{last}" for order in ORDERS))
        for order, part in zip(ORDERS, found, strict=True):
            ids[order] += [sample for _, sample, _ in part]
    for seen in ids.values():
        assert len(seen) == 64
        for epoch in range(3):
            assert sorted(seen[21 * epoch : 21 * epoch + 21]) == list(range(21))


def test_a_mixture_and_damaged_images_are_the_same_on_two_ranks(
    config_path: Path, dataset: Path, tmp_path: Path
) -> None:
    """Of two datasets, one with damage that is passed over: two processes see the replacements of one."""
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset, damaged)
    clean = make_dataset(tmp_path / "clean", images=9, shard_samples=4)
    with_mixture(config_path, **{str(damaged): 2, str(clean): 1})
    config_path.write_text(config_path.read_text().replace("[data]", '[data]\non_bad_sample = "skip"'))
    ways = ["global:fork:1", "windowed:fork:0"]
    planned = open_training_data(load_config(config_path), index_folder=None).order.ids(np.arange(8, 56))
    first, second = (int(sample) for sample in planned[planned < 21][[1, 4]])
    wanted = [expected(config_path, way, bad=frozenset({first, second})) for way in ways]
    damage(damaged, first, second)
    assert streamed(2, config_path, *ways) == wanted
    owners = [sum(sample < 21 for _, sample, _ in way) / len(way) for way in wanted]
    assert all(0.5 < share < 0.85 for share in owners)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("processes", "ways"), [(1, SOME_WAYS), (2, EVERY_WAY), (3, SOME_WAYS), (4, SOME_WAYS), (8, SOME_WAYS)]
)
def test_the_stream_is_the_same_under_torchrun(config_path: Path, processes: int, ways: list[str]) -> None:
    if processes == 3:  # 24 images a batch, more than the 21 of an epoch
        config_path.write_text(config_path.read_text().replace("global_batch = 8", "global_batch = 24"))
    assert streamed_under_torchrun(processes, config_path, *ways) == [expected(config_path, way) for way in ways]
