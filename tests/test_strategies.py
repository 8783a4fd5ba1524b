"""The same run under any strategy: one process's losses, bit-exact resuming, and one checkpoint for all of them."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.faults import Fault
from tests.harness import (
    assert_same_state,
    checkpoint,
    events,
    largest_difference,
    launch,
    logged,
    overrides,
    tensors_of,
    write_config,
)

STEPS = 20
TRAINING = overrides(
    model__dropout=0.0,
    optimizer__clip_norm=0.5,  # of norms from 0.54 to 0.79
    train__duration=f"{STEPS} steps",
    checkpoint__every="10 steps",
)
LAYOUTS = [(s, n) for s in ("ddp", "zero1", "zero2", "zero3", "fsdp2") for n in (1, 2, 4)] + [("hsdp", 4)]


def spread(strategy: str) -> list[str]:
    """Settings of a strategy; hsdp in two groups of two."""
    groups = overrides(train__hsdp_shard_size=2) if strategy == "hsdp" else []
    return [*overrides(train__strategy=strategy), *groups]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def one_process(runs: Path, dataset: Path) -> Path:
    """Twenty steps, nothing sharded, nothing accumulated."""
    launch(1, "--config", str(write_config(runs, dataset, "one")), *TRAINING)
    return runs / "one"


def largest_gap(one: Path, other: Path) -> float:
    losses, others = logged(one), logged(other)
    assert losses.keys() == others.keys()
    return max(abs(losses[step] - others[step]) for step in losses)


def with_gradients(run: Path) -> dict[str, torch.Tensor]:
    """Without the keys' biases: softmax does not see them, and what Adam makes of their rounding is anything."""
    return {name: value for name, value in tensors_of(run, STEPS).items() if not name.endswith("key.bias")}


QUICK = [("zero2", 2)]  # ddp is in test_resume.py


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [*QUICK, *(pytest.param(s, n, marks=pytest.mark.slow) for s, n in LAYOUTS if n > 1 and (s, n) not in QUICK)],
)
def test_a_strategy_trains_like_one_process_and_resumes_to_the_bit(
    runs: Path, dataset: Path, one_process: Path, strategy: str, ranks: int
) -> None:
    """Accumulating two micro-batches and recomputing activations; then again from the checkpoint half way."""
    name = f"{strategy}-{ranks}"
    kind = "full" if strategy == "zero3" else "selective"
    micro = overrides(train__micro_batch=4 // ranks, train__activation_checkpointing=kind)
    arguments = ("--config", str(write_config(runs, dataset, name)), *TRAINING, *spread(strategy), *micro)
    launch(ranks, *arguments)
    run, whole = runs / name, runs / f"{name}-whole"
    assert largest_gap(one_process, run) < 1e-6
    assert logged(run, "train/grad_norm") == pytest.approx(logged(one_process, "train/grad_norm"), rel=1e-4)
    assert largest_difference(with_gradients(one_process), with_gradients(run)) < 1e-5

    shutil.copytree(run, whole)
    shutil.rmtree(checkpoint(run, STEPS))
    launch(ranks, *arguments)
    assert [event["step"] for event in events(run) if event["event"] == "started"] == [0, 10]
    assert_same_state(whole, run, STEPS)
    assert logged(whole) == logged(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [("zero2", 2), *(pytest.param(s, 2, marks=pytest.mark.slow) for s in ("ddp", "zero1", "zero3", "fsdp2"))],
)
def test_in_bfloat16_too(runs: Path, dataset: Path, strategy: str, ranks: int) -> None:
    bf16 = [*TRAINING, *overrides(train__precision="bf16")]
    if not (runs / "one-bf16").exists():
        launch(1, "--config", str(write_config(runs, dataset, "one-bf16")), *bf16)
    launch(ranks, "--config", str(write_config(runs, dataset, f"{strategy}-bf16")), *bf16, *spread(strategy))
    assert largest_gap(runs / "one-bf16", runs / f"{strategy}-bf16") < 1e-3


CHAIN = [("ddp", 2), ("zero2", 4), ("zero3", 2), ("fsdp2", 4), ("zero1", 2), ("hsdp", 4), ("zero3", 4), ("ddp", 1)]


@pytest.mark.slow
def test_a_run_may_change_its_strategy_and_size_at_every_restart(runs: Path, dataset: Path, one_process: Path) -> None:
    config = str(write_config(runs, dataset, "chain"))
    for leg, (strategy, ranks) in enumerate(CHAIN, start=1):
        duration = overrides(train__duration=f"{2 * leg} steps", checkpoint__every="2 steps")
        launch(ranks, "--config", config, *TRAINING, *spread(strategy), *duration)
    run, steps = runs / "chain", 2 * len(CHAIN)
    losses, moved = logged(one_process), logged(run)
    assert sorted(moved) == list(range(1, steps + 1))
    assert max(abs(losses[step] - moved[step]) for step in moved) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("saver", range(len(LAYOUTS)), ids=lambda number: str(LAYOUTS[number]))
def test_every_strategy_reads_what_every_strategy_wrote(
    runs: Path, dataset: Path, one_process: Path, saver: int
) -> None:
    """Each layout is read by five: together all pairs of strategies, and every change of the number of ranks."""
    strategy, ranks = LAYOUTS[saver]
    source = f"saved-{strategy}-{ranks}"
    ten = overrides(train__duration="10 steps")
    launch(ranks, "--config", str(write_config(runs, dataset, source)), *TRAINING, *ten, *spread(strategy))
    for reader, readers in (LAYOUTS[(saver + distance) % len(LAYOUTS)] for distance in (1, 4, 7, 10, 15)):
        name = f"{source}-{reader}-{readers}"
        shutil.copytree(runs / source, runs / name)
        more = overrides(train__duration="12 steps")
        launch(readers, "--config", str(write_config(runs, dataset, name)), *TRAINING, *more, *spread(reader))
        losses, moved = logged(one_process), logged(runs / name)
        assert max(abs(losses[step] - moved[step]) for step in range(1, 13)) < 1e-6, name
        shutil.rmtree(runs / name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_optimizer_may_stay_in_the_hosts_memory(
    runs: Path, dataset: Path, one_process: Path, strategy: str
) -> None:
    offloaded = [*spread(strategy), *overrides(train__offload_optimizer="true")]
    run = runs / f"{strategy}-offloaded"
    for half in ("10 steps", f"{STEPS} steps"):
        duration = overrides(train__duration=half)
        launch(2, "--config", str(write_config(runs, dataset, run.name)), *TRAINING, *offloaded, *duration)
    assert largest_gap(one_process, run) < 1e-6


@pytest.mark.parametrize("strategy", ["zero2", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero3", "fsdp2"))])
def test_a_signal_to_one_rank_makes_all_save_the_same_step(runs: Path, dataset: Path, strategy: str) -> None:
    """The request of a step is read with the next one; where the loop hears it, all ranks do."""
    name = f"{strategy}-stopped"
    fault = Fault(action="stop", point="device_batch", call=3, rank=1)
    launch(2, "--config", str(write_config(runs, dataset, name)), *TRAINING, *spread(strategy), fault=fault)
    assert [event["step"] for event in events(runs / name) if event["event"] == "stopped"] == [4]
    assert tensors_of(runs / name, 4)
    assert not (runs / name / "DONE").exists()
