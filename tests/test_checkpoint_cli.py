"""`python -m trainer.checkpoint`: what a person is told of checkpoints, damaged and compared ones included."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import checkpoint, launch, overrides, write_config
from tests.stored import flip, write_checkpoint
from trainer import checkpoint as program
from trainer.inspection import tensors as inspected


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 2, 4 and 6 of a run that keeps every fourth for ever; config.toml is there."""
    run = tmp_path / "run"
    for step in (2, 4, 6):
        write_checkpoint(run / "checkpoints", {"model/w": torch.ones(4, 3) * step}, step=step, ranks=2)
    text = write_config(tmp_path, Path("nowhere")).read_text()
    (run / "config.toml").write_text(text.replace("keep = 10", 'keep = 10\nkeep_every = "4 steps"'))
    return run


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object, expect: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, arguments)])
        code = program.main()
        printed = capsys.readouterr()
        assert code == expect, printed
        if expect == 2:
            (line,) = printed.err.splitlines()
            assert line.startswith("error: ")
            return line
        return printed.out

    return call


def test_list_says_what_is_there_why_it_is_kept_and_what_was_set_aside(run: Path, tell: Any) -> None:
    flip(checkpoint(run, 2) / "part-00001-of-00002.safetensors")
    for where, reason in (("quarantine", "a page of zeros"), ("superseded", "taken back to step 1")):
        aside = run / "checkpoints" / where / "step-00000009"
        aside.mkdir(parents=True)
        (aside / "REASON").write_text(reason + "\n")
    two, four, six, *aside_lines = tell("list", run).splitlines()[2:]
    assert "ddp@2" in two
    assert "DAMAGED: part-00001-of-00002.safetensors differs from its sha256" in two
    assert "verified" in four
    assert four.endswith("kept for ever")
    assert six.endswith("newest")
    assert aside_lines == [
        "  quarantine/step-00000009: a page of zeros",
        "  superseded/step-00000009: taken back to step 1",
    ]
    (listed,) = json.loads(tell("list", run, "--json"))
    assert [one["step"] for one in listed["checkpoints"]] == [2, 4, 6]
    assert [one["verified"] for one in listed["checkpoints"]] == [False, True, True]
    quick = tell("list", run, "--quick")
    assert "DAMAGED" not in quick
    assert quick.count("not read") == 3  # and does not claim more
    (checkpoint(run, 4) / "part-00000-of-00002.safetensors").unlink()
    assert "DAMAGED: part-00000-of-00002.safetensors is missing" in tell("list", run, "--quick")


def test_verify_reads_every_byte_and_names_every_damaged_file(run: Path, tell: Any) -> None:
    assert tell("verify", run).count(": whole") == 3
    for rank in range(2):
        flip(checkpoint(run, 4) / f"part-0000{rank}-of-00002.safetensors")
    output = tell("verify", run, expect=1)
    assert "step-00000004: damaged: part-00000-of-00002.safetensors differs" in output
    assert "part-00001-of-00002.safetensors differs" in output
    assert output.count(": whole") == 2
    assert "whole" in tell("verify", run, "--step", 6)
    assert tell("verify", run, "--step", "all", expect=1) == output
    tell("verify", checkpoint(run, 4), expect=1)
    flip(checkpoint(run, 6) / "manifest.json")
    assert "COMPLETE does not belong" in tell("verify", run, "--step", 6, expect=1)


def test_verify_looks_at_snapshots_of_averages_too(run: Path, tell: Any) -> None:
    snapshot = write_checkpoint(run / "averages", {"ema-0.1/w": torch.ones(2)}, step=3)
    assert tell("verify", run).count(": whole") == 4
    flip(snapshot / "part-00000-of-00001.safetensors")
    assert "averages/step-00000003: damaged" in tell("verify", run, expect=1)
    assert "snapshots of averages" in tell("list", run)


def test_inspect_shows_counters_identity_and_statistics(tmp_path: Path, tell: Any) -> None:
    values = torch.tensor([[3.0, -4.0], [math.nan, 0.0]])
    path = write_checkpoint(
        tmp_path, {"model/w": values, "model/b": torch.zeros(5), "ema/w": values}, step=7, ranks=2, strategy="zero2"
    )
    text = tell("inspect", path)
    for part in ("step 7, written by zero2@2", "position: 56", "seed: 3", "w 2 x 2"):
        assert part in text
    about = json.loads(tell("inspect", path, "--tensors", "--json"))
    assert about["kinds"]["model"] == {"tensors": 2, "elements": 9, "bytes": 36, "largest": "b 5"}
    assert about["tensors"]["model/w"] == {"shape": [2, 2], "norm": 5.0, "minimum": -4.0, "maximum": 3.0, "nans": 1}
    flip(path / "part-00000-of-00002.safetensors")
    assert "damaged: part-00000" in tell("inspect", path, expect=2)


def test_statistics_are_read_piece_by_piece(tmp_path: Path, tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is larger than asked for, and pieces give what the whole gives."""
    values = torch.randn(50, 7)
    path = write_checkpoint(tmp_path, {"model/w": values}, step=1, ranks=3)
    monkeypatch.setattr(inspected, "_PIECE", 16)
    largest = 0
    original = inspected.TensorReader.read

    def watched(self: Any, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, stop - start)
        return original(self, name, start, stop)

    monkeypatch.setattr(inspected.TensorReader, "read", watched)
    found = json.loads(tell("inspect", path, "--tensors", "--json"))["tensors"]["model/w"]
    assert largest == 16
    assert found["norm"] == pytest.approx(values.double().norm().item(), rel=1e-12)
    assert (found["minimum"], found["maximum"]) == (values.min().item(), values.max().item())


def test_diff_knows_no_ranks_and_no_strategies(tmp_path: Path, tell: Any) -> None:
    tensors = {"model/w": torch.randn(6, 5), "ema/w": torch.full((3,), math.nan)}
    one = write_checkpoint(tmp_path / "a", tensors, step=1, ranks=1)
    other = write_checkpoint(tmp_path / "b", tensors, step=1, ranks=3, strategy="zero3")
    output = tell("diff", one, other)
    assert "(ddp@1)" in output
    assert "(zero3@3)" in output
    assert "2 tensors are equal bit for bit, 0 are not" in output
    assert output.endswith("\nequal\n")


def test_diff_says_what_is_different_and_by_how_much(tmp_path: Path, tell: Any) -> None:
    w = torch.tensor([1.0, -8.0, 2.0])
    same = torch.zeros(2)
    one = write_checkpoint(tmp_path / "a", {"w": w, "same": same, "s": torch.zeros(2, 3), "gone": same}, step=1)
    changed = {"w": w + torch.tensor([0.0, 0.0, 0.5]), "same": same, "s": torch.zeros(3, 2), "new": same}
    other = write_checkpoint(tmp_path / "b", changed, step=2, ranks=2, identity={"seed": 4})
    found = json.loads(tell("diff", one, other, "--json", expect=1))
    assert found["state"] == {"step": [1, 2], "position": [8, 16], "updates": [1, 2]}
    assert found["identity"] == {"seed": [3, 4]}
    assert (found["only_in_first"], found["only_in_second"]) == (["gone"], ["new"])
    assert found["other_shape"] == {"s": [[2, 3], [3, 2]]}
    assert found["different"] == {"w": {"equal": False, "largest": 0.5, "relative": 0.5 / 8}}
    text = tell("diff", one, other, expect=1)
    for line in ("only in the first: gone", "other shape: s: 2 x 3 | 3 x 2", "identity: seed: 3 | 4", "not equal"):
        assert line in text


def test_a_changed_bit_of_a_nan_and_a_signed_zero_are_not_equal(tmp_path: Path, tell: Any) -> None:
    one = write_checkpoint(tmp_path / "a", {"w": torch.tensor([0.0, 1.0])}, step=1)
    other = write_checkpoint(tmp_path / "b", {"w": torch.tensor([-0.0, 1.0])}, step=1)
    broken = write_checkpoint(tmp_path / "c", {"w": torch.tensor([0.0, math.nan])}, step=1)
    found = json.loads(tell("diff", one, other, "--json", expect=1))
    assert found["different"]["w"] == {"equal": False, "largest": 0.0, "relative": 0.0}
    assert math.isnan(json.loads(tell("diff", one, broken, "--json", expect=1))["different"]["w"]["largest"])


def test_errors_are_one_line(run: Path, tmp_path: Path, tell: Any) -> None:
    assert "no run's folder" in tell("list", tmp_path / "nothing", expect=2)
    assert "has no such checkpoint, but 2, 4, 6" in tell("inspect", run, "--step", 5, expect=2)
    assert "no such checkpoint" in tell("inspect", tmp_path / "step-00000001", expect=2)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "holds no checkpoint" in tell("verify", tmp_path / "empty", expect=2)
    assert "holds no checkpoint" in tell("diff", run, tmp_path / "empty", expect=2)


@pytest.mark.slow
def test_a_run_under_zero2_on_two_ranks_is_compared_with_one_under_ddp_on_one(
    tmp_path: Path, dataset: Path, tell: Any
) -> None:
    one, other = (write_config(tmp_path, dataset, name) for name in ("one", "other"))
    shared = overrides(train__duration="2 steps", model__dropout=0.0)
    launch(1, "--config", str(one), *shared)
    launch(2, "--config", str(other), *shared, *overrides(train__strategy="zero2"))
    found = json.loads(tell("diff", tmp_path / "one", tmp_path / "other", "--json", expect=1))
    assert not any(found[what] for what in ("identity", "only_in_first", "only_in_second", "other_shape"))
    assert all(one["largest"] < 1e-5 for one in found["different"].values())
    assert "zero2@2" in tell("list", tmp_path / "other")


def test_verify_tells_of_weights_that_are_not_finite(run: Path, tell: Any) -> None:
    write_checkpoint(run / "checkpoints", {"model/w": torch.ones(2), "ema/w": torch.tensor([1, math.nan])}, step=8)
    write_checkpoint(run / "checkpoints", {"model/w": torch.ones(2), "timesteps/x": torch.tensor(math.inf)}, step=9)
    *_, eight, nine = tell("verify", run, expect=1).splitlines()
    assert eight.endswith("step-00000008: whole; ema/w holds NaN or infinity (1 of 2 tensors of weights do)")
    assert nine.endswith("step-00000009: whole")


def test_escape_sequences_in_a_checkpoint_are_not_printed_raw(run: Path, tell: Any) -> None:
    write_checkpoint(run / "checkpoints", {"model/\x1b[31mw": torch.ones(2)}, step=8, identity={"seed\x1b]0;": 3})
    for command in (["inspect", run, "--tensors"], ["diff", run, checkpoint(run, 2)], ["list", run]):
        assert "\x1b" not in tell(*command, expect=1 if command[0] == "diff" else 0)
