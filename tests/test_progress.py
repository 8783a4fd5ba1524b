"""What is told of work that takes long, and of a training run when it ends."""

import importlib
import re
import shlex
import time
from pathlib import Path

import pytest

from data_prep.progress import WorkProgress
from tests.faults import Fault
from tests.harness import checkpoint, launch, overrides
from trainer.engine.monitoring.summary import Ending
from trainer.telemetry.goodput import Goodput


def test_a_log_has_a_line_now_and_then_even_while_one_piece_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    with WorkProgress(total=1000, what="sampling", unit="step", line_seconds=0.05) as progress:
        progress.update(250)
        time.sleep(0.5)
    first, *others = capsys.readouterr().err.splitlines()
    assert len(others) >= 2
    assert re.fullmatch(r"sampling: 250 of 1,000 step \(25%\), [\d.]+ step/s, 00:0\d left", first)


def test_short_work_and_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with WorkProgress(total=2, what="writing", unit="img") as progress:
        progress.update()
    with WorkProgress(total=2, what="writing", unit="img", visible=False, line_seconds=0.01):
        time.sleep(0.1)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_what_was_done_before_is_no_speed() -> None:
    with WorkProgress(total=10, done=4, what="writing", unit="img") as progress:
        assert progress.line() == "writing: 4 of 10 img (40%), 0.0 img/s"
        progress.update(6)
        assert progress.line().endswith("00:00 left")
    with WorkProgress(total=0, what="writing", unit="img") as nothing:
        assert nothing.line() == "writing: 0 of 0 img, 0.0 img/s"


def test_a_training_says_what_is_left_and_what_it_came_to(config_path: Path) -> None:
    """In each line but the last what is left; at the end the checkpoint, the last samples and what to do next."""
    run = config_path.parent / "run"
    arguments = ["--config", str(config_path), *overrides(log__samples_every="4 steps")]
    stop = Fault(action="stop", point="device_batch", call=3, rank=0)
    stopped = launch(1, *arguments, fault=stop)
    assert "stopped: step 4 of 6, after " in stopped
    assert f"checkpoint  {checkpoint(run, 4)}" in stopped
    assert "the same command again" in stopped
    output = launch(1, *arguments)
    lines = {int(step): rest for step, rest in re.findall(r"step (\d)/6: loss (.*)", output)}
    assert sorted(lines) == [5, 6]
    assert re.search(r", \d+ (s|min)( \d+ s)? left$", lines[5])
    assert "left" not in lines[6]
    assert "finished: step 6 of 6, after " in output
    assert "from the first of 2 starts" in output
    assert f"checkpoint  {checkpoint(run, 6)}" in output
    assert f"samples     {run / 'samples' / 'step-00000006.png'}" in output  # though none was due in that step
    assert f"draw        python -m trainer.sample --run {run} --n 64" in output


def test_the_commands_for_what_comes_next_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = Ending(run=tmp_path / "a run", step=6, last_step=6, seconds=1.0, goodput=Goodput())
    for _, command in ending.next_commands():
        _, _, module, *arguments = shlex.split(command)
        monkeypatch.setattr("sys.argv", [module, *arguments])
        importlib.import_module(module).parse_arguments()
        assert str(tmp_path / "a run") in arguments
    assert "checkpoint" not in ending.text()  # there is none
