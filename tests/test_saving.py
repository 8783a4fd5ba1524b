"""A save may be killed, refused or corrupted at any point, under any strategy: what was complete stays complete."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open

from tests.faults import Fault
from tests.harness import (
    assert_same_state,
    checkpoint,
    events,
    launch,
    logged,
    overrides,
    read_verified,
    tensors_of,
    write_config,
)
from tests.test_state import save, small_state
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.state.ema import power_function

TRAINING = overrides(train__micro_batch=2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, Path]:
    """Six steps in one go on two processes, by strategy; made when first asked for."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    class Runs(dict[str, Path]):
        def __missing__(self, strategy: str) -> Path:
            config = write_config(folder, dataset, strategy)
            launch(2, "--config", str(config), *TRAINING, *overrides(train__strategy=strategy))
            self[strategy] = folder / strategy
            return self[strategy]

    return Runs()


Action = Literal["kill", "kill-after"]
POINTS: list[tuple[Action, str, int, int]] = [
    ("kill", "make_empty", 2, 0),  # nothing of it is there
    ("kill", "write_part", 2, 1),  # before a rank's part is written
    ("kill", "save_file", 2, 0),
    ("kill-after", "save_file", 2, 1),  # written, not yet on disk
    ("kill", "load_file", 2, 1),  # on disk, not yet read back
    ("kill-after", "write_part", 2, 0),  # parts are written, the manifest is not
    ("kill", "seal", 2, 0),
    ("kill", "write", 3, 0),  # before the manifest
    ("kill", "write", 4, 0),  # the manifest is written, the marker is not
    ("kill-after", "write", 4, 0),  # the marker too
    ("kill", "rename", 2, 0),  # all is written but the name
    ("kill-after", "rename", 2, 0),  # all is done, nobody was told
]
# Under a sharded strategy what differs is what each rank writes.
SHARDED_POINTS = [POINTS[1], POINTS[5], POINTS[10], POINTS[11]]
QUICK = [("zero2", POINTS[5])]


@pytest.mark.parametrize(
    ("strategy", "fault"),
    [
        *QUICK,
        *(
            pytest.param(strategy, fault, marks=pytest.mark.slow)
            for strategy in ("ddp", "zero2", "zero3", "fsdp2")
            for fault in POINTS
            if (strategy, fault) not in QUICK and (strategy == "ddp" or fault in SHARDED_POINTS)
        ),
    ],
    ids=str,
)
def test_killed_in_the_second_save(
    tmp_path: Path, dataset: Path, uninterrupted: dict[str, Path], strategy: str, fault: tuple[Action, str, int, int]
) -> None:
    """The checkpoint of step 2 is there and whole; the one of step 4 is whole or not there; nothing is lost."""
    action, point, call, rank = fault
    arguments = ("--config", str(write_config(tmp_path, dataset)), *TRAINING, *overrides(train__strategy=strategy))
    launch(2, *arguments, fault=Fault(action=action, point=point, call=call, rank=rank), expect=None)
    run = tmp_path / "run"
    read_verified(checkpoint(run, 2))
    saved = checkpoint(run, 4).exists()
    assert saved == (action == "kill-after" and point == "rename")
    launch(2, *arguments)
    assert [event["step"] for event in events(run) if event["event"] == "started"] == [0, 4 if saved else 2]
    assert not [event for event in events(run) if event["event"] == "quarantined"]
    assert not list((run / "checkpoints").glob(".staging*"))
    assert_same_state(uninterrupted[strategy], run, 6)
    assert logged(run) == logged(uninterrupted[strategy])


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero2", "zero3"))])
def test_a_full_disk_on_one_rank_ends_all_and_keeps_what_was_complete(
    tmp_path: Path, dataset: Path, strategy: str
) -> None:
    arguments = ("--config", str(write_config(tmp_path, dataset)), *overrides(train__strategy=strategy))
    output = launch(2, *arguments, fault=Fault(action="full", point="write_part", call=2, rank=1), expect=2)
    assert "step-00000004: cannot be written: [Errno 28] No space left on device (rank 1)" in output
    assert "Traceback" not in output
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    launch(2, *arguments)
    assert "step-00000006" in {path.name for path in (run / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    "point", ["write_part", *(pytest.param(point, marks=pytest.mark.slow) for point in ("seal", "make_empty"))]
)
def test_a_run_may_go_on_without_a_checkpoint_that_cannot_be_written(tmp_path: Path, dataset: Path, point: str) -> None:
    arguments = ("--config", str(write_config(tmp_path, dataset)), *overrides(checkpoint__on_failure="continue"))
    output = launch(2, *arguments, fault=Fault(action="full", point=point, call=2, rank=0))
    assert "step-00000004: cannot be written: [Errno 28] No space left on device (rank 0); training goes on" in output
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]
    assert [event["step"] for event in events(run) if event["event"] == "checkpoint"] == [2, 6]


def test_what_a_disk_corrupts_while_it_is_written_is_no_checkpoint(tmp_path: Path, dataset: Path) -> None:
    """The file is sound for whoever reads only it; it is compared with what was in memory."""
    config = str(write_config(tmp_path, dataset))
    output = launch(2, "--config", config, fault=Fault(action="corrupt", point="save_file", call=2, rank=1), expect=2)
    assert "was read back differently than it was written; is the disk sound?" in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_ranks_that_trained_apart_save_nothing(tmp_path: Path, dataset: Path, strategy: str) -> None:
    arguments = ("--config", str(write_config(tmp_path, dataset)), *overrides(train__strategy=strategy))
    output = launch(2, *arguments, fault=Fault(action="drift", point="check_replicas", call=2, rank=1), expect=2)
    (line,) = {line for line in output.splitlines() if line.startswith("error:")}
    assert "step 4: temb.dense_in.weight (1 parameters in all) is not the same on all ranks" in line
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_signal_during_a_save_lets_it_end(tmp_path: Path, dataset: Path) -> None:
    config = str(write_config(tmp_path, dataset))
    launch(2, "--config", config, fault=Fault(action="stop", point="save_file", call=1, rank=1))
    run = tmp_path / "run"
    (stopped,) = [event["step"] for event in events(run) if event["event"] == "stopped"]
    assert read_verified(checkpoint(run, 2))[1]["step"] == 2
    assert read_verified(checkpoint(run, stopped))[1]["step"] == stopped


@pytest.mark.parametrize("background", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_saving_in_the_background_saves_the_same(
    tmp_path: Path, dataset: Path, uninterrupted: dict[str, Path], background: str
) -> None:
    arguments = ("--config", str(write_config(tmp_path, dataset)), *TRAINING)
    launch(2, *arguments, *overrides(checkpoint__background=background))
    for step in (2, 4, 6):
        assert_same_state(uninterrupted["ddp"], tmp_path / "run", step)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is the state when saving began, whatever happens to it meanwhile."""
    import threading

    from trainer.engine.checkpointing import async_save as saving

    may_write = threading.Event()
    write = saving._write_part

    def wait_and_write(*arguments: object) -> object:
        assert may_write.wait(60)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "_write_part", wait_and_write)
    state = small_state(config_path)
    before = {piece.name: piece.weight.clone() for piece in state.main.network.slices}
    checkpoints = Checkpoints(tmp_path / "checkpoints", state.strategy.accelerator)
    begun = checkpoints.begin(state.contents(), step=1, identity={})
    assert not begun.is_written
    with torch.no_grad():
        for piece in state.main.network.slices:
            piece.weight.add_(1)
    may_write.set()
    tensors, _ = read_verified(checkpoints.finish(begun))
    assert all(torch.equal(tensors[f"model/{name}"], value) for name, value in before.items())


def test_several_averages_are_saved(tmp_path: Path, config_path: Path) -> None:
    state = small_state(config_path, **{"ema-0.1": power_function(0.1)})
    tensors, _ = read_verified(save(state, tmp_path, 1))
    kinds = {name.partition("/")[0] for name in tensors}
    assert kinds == {"model", "ema", "ema-0.1", "optimizer.exp_avg", "optimizer.exp_avg_sq"}


def test_every_element_is_in_one_ranks_part(tmp_path: Path, dataset: Path) -> None:
    """Parts are balanced, and under a sharded strategy no rank holds more than its share."""
    config = str(write_config(tmp_path, dataset))
    launch(2, "--config", config, *overrides(train__strategy="fsdp2", train__duration="1 steps"))
    folder = checkpoint(tmp_path / "run", 1)
    sizes = [path.stat().st_size for path in sorted(folder.glob("part-*"))]
    assert max(sizes) < 1.2 * min(sizes)
    stored = 0
    for path in folder.glob("part-*"):
        with safe_open(path, framework="pt") as opened:
            stored += sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118  # no dict
    assert stored == sum(value.numel() for value in tensors_of(tmp_path / "run", 1).values())
