"""--find-batch tries sizes on this machine and prints the one to write down."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.harness import launch, load_config, overrides
from trainer.engine.network.activation_checkpointing import peak_bytes, stage_kinds
from trainer.engine.planning import find_batch as module
from trainer.engine.planning.find_batch import Trial, choose, find_batch
from trainer.engine.step.train_step import TrainStep
from trainer.errors import ConfigError


def trial(micro_batch: int, images_per_second: float) -> Trial:
    return Trial(micro_batch=micro_batch, images_per_second=images_per_second, memory=1)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_size_that_divides_a_ranks_share_is_tried_and_one_is_named(config_path: Path, processes: int) -> None:
    output = launch(processes, "--config", str(config_path), "--find-batch", *overrides(train__global_batch=12))
    found = re.findall(r"micro_batch +(\d+): +([\d.]+) images/s, ([\d.]+) [MG]iB", output)
    sizes = [1, 2, 3, 4, 6, 12] if processes == 1 else [1, 2, 3, 6]
    assert [int(size) for size, _, _ in found] == sizes
    assert all(float(speed) > 0 and float(memory) > 0 for _, speed, memory in found)
    assert int(re.search(r"\[train\]\nmicro_batch = (\d+)\n", output)[1]) in sizes  # type: ignore[index]
    assert not (config_path.parent / "run").exists()


def test_sizes_end_where_the_device_is_out_of_memory(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = TrainStep.backward

    def limited(self: TrainStep, stream: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
        if len(next(stream)["position"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, stream)

    monkeypatch.setattr(TrainStep, "backward", limited)
    assert [found.micro_batch for found in find_batch(load_config(config_path))] == [1, 2]


def test_a_network_that_takes_classes_is_given_some(config_path: Path) -> None:
    config = load_config(config_path, "model.classes=3", "model.label_drop=0.5", 'data.cond=["label"]')
    assert [found.micro_batch for found in find_batch(config)] == [1, 2, 4, 8]


def test_on_a_cpu_a_size_that_would_not_fit_is_not_tried(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_path)
    limit = peak_bytes(config, stage_kinds(config, 4), 4)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": limit}))
    assert [found.micro_batch for found in find_batch(config)] == [1, 2]


def test_the_smallest_of_the_fast_ones_is_chosen() -> None:
    assert choose([trial(1, 50.0), trial(2, 98.0), trial(4, 100.0)]).micro_batch == 2
    assert choose([trial(1, 50.0), trial(2, 90.0), trial(4, 100.0), trial(8, 80.0)]).micro_batch == 4
    with pytest.raises(ConfigError, match=r"not even 1 fits this device; take train.activation_checkpointing"):
        choose([])


def test_a_strategy_that_shards_is_refused(config_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'--find-batch: tries train.strategy = "ddp", not "zero2"'):
        next(find_batch(load_config(config_path, "train.strategy=zero2")))
