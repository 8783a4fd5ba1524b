"""A NaN on one rank: no update anywhere, the batch is dumped and can be made again, and there is a limit."""

import json
from pathlib import Path

import pytest
import torch

from tests.faults import Fault
from tests.harness import (
    checkpoint,
    events,
    launch,
    load_config,
    logged,
    overrides,
    read_verified,
    tensors_of,
    write_config,
)
from trainer.data.datasets.shards import ShardedDataset
from trainer.data.stream.batches import read_batch
from trainer.diffusion.ddpm.timesteps import UniformTimesteps
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.engine.step.train_step import device_batch

NAN_IN_STEP_4_OF_RANK_1 = Fault(action="nan", point="device_batch", call=4, rank=1)


@pytest.fixture(
    scope="module", params=["ddp", "zero2", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero3", "fsdp2"))]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Two processes, a checkpoint after every step, NaN on rank 1 in step 4."""
    folder = tmp_path_factory.mktemp("nan")
    config = write_config(folder, dataset)
    every_step = overrides(checkpoint__every="1 steps", train__strategy=request.param)
    launch(2, "--config", str(config), *every_step, fault=NAN_IN_STEP_4_OF_RANK_1)
    return folder / "run"


def test_nothing_is_updated_on_any_rank(run: Path) -> None:
    before, after = tensors_of(run, 3), tensors_of(run, 4)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_verified(checkpoint(run, 3))[1]["state"]["updates"] == 3
    assert read_verified(checkpoint(run, 4))[1]["state"]["updates"] == 3
    position = read_verified(checkpoint(run, 4))[1]["state"]["position"]
    assert position == 4 * 8  # its images are consumed all the same


def test_training_goes_on(run: Path) -> None:
    after, later = tensors_of(run, 4), tensors_of(run, 5)
    assert not torch.equal(after["model/conv_in.weight"], later["model/conv_in.weight"])
    assert all(value.isfinite().all() for value in tensors_of(run, 6).values())
    assert logged(run, "train/nonfinite_steps")[6] == 1
    assert sorted(logged(run)) == [1, 2, 3, 5, 6]  # a step that never was has no loss


def test_the_dump_makes_the_batch_again(run: Path, dataset: Path) -> None:
    dump = json.loads((run / "nonfinite" / "step-00000004.json").read_text())
    assert (dump["step"], dump["loss"], dump["seed"]) == (4, "nan", 3)
    assert [event["step"] for event in events(run) if event["event"] == "nonfinite"] == [4]
    samples = dump["samples"]
    assert [sample["position"] for sample in samples] == list(range(24, 32))
    opened = ShardedDataset(dataset)
    batch = read_batch(opened, ([sample["position"] for sample in samples], [sample["id"] for sample in samples]))
    config = load_config(run / "config.toml")
    position = device_batch(batch, config, torch.device("cpu")).position
    t, _ = UniformTimesteps(config.diffusion.timesteps).draw(KeyedNoise.training(config.seed, position))
    assert t.tolist() == [sample["t"] for sample in samples]
    assert [opened.describe(sample["id"]) for sample in samples] == [sample["image"] for sample in samples]


def test_too_many_end_the_run(tmp_path: Path, dataset: Path) -> None:
    config = write_config(tmp_path, dataset)
    none_allowed = overrides(train__max_nonfinite_steps=0)
    output = launch(2, "--config", str(config), *none_allowed, fault=NAN_IN_STEP_4_OF_RANK_1, expect=2)
    (line,) = {line for line in output.splitlines() if line.startswith("error:")}
    assert "step 4: loss nan" in line
    assert "exceed train.max_nonfinite_steps = 0" in line
    assert not (tmp_path / "run" / "DONE").exists()
