"""Launching: Accelerate's flags complete, the worker's exit code handed on, nothing left behind."""

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

from launch import launcher
from tests.harness import REPOSITORY
from trainer.__main__ import COMMANDS
from trainer.__main__ import main as say_what_there_is
from trainer.errors import remove_launcher_folders


@pytest.fixture(autouse=True)
def no_saved_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `accelerate config` has never been run."""
    monkeypatch.setattr(launcher, "default_config_file", "/nowhere/default_config.yaml")
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere/default_config.yaml")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text("import os, sys; sys.exit(int(sys.argv[1]) if os.environ.get('RANK', '1') == '1' else 0)\n")
    return path


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("code", [0, 3])
def test_a_launch_says_nothing_and_hands_on_the_exit_code(
    processes: int,
    code: int,
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert launcher.main(["--num_processes", str(processes), str(script), str(code)]) == code
    told = capfd.readouterr()
    assert "Traceback" not in told.err
    assert "were not passed" not in told.err
    assert list(temporary.iterdir()) == []


def test_flags_that_do_not_go_together_are_one_line(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--multi_gpu", "--num_processes", "1", str(script), "0"]) == 2
    assert capsys.readouterr().err == "error: You need to use at least 2 processes to use `--multi_gpu`.\n"


def test_commands_are_launched_by_name_outside_a_clone() -> None:
    arguments = launcher.parse_arguments(["--num_processes", "2", "sample", "--run", "runs/x"])
    assert (arguments.module, arguments.training_script) == (True, "trainer.sample")
    assert arguments.training_script_args == ["--run", "runs/x"]
    assert arguments.multi_gpu


def test_what_accelerate_was_told_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--mixed_precision", "bf16", "--dynamo_backend", "inductor", "--main_process_port", "7", "train"]
    arguments = launcher.parse_arguments(given)
    assert (arguments.mixed_precision, arguments.dynamo_backend, arguments.main_process_port) == ("bf16", "inductor", 7)
    saved = tmp_path / "default_config.yaml"
    saved.touch()
    monkeypatch.setattr(launcher, "default_config_file", str(saved))
    arguments = launcher.parse_arguments(["train"])
    assert (arguments.mixed_precision, arguments.num_processes, arguments.num_machines) == (None, None, None)


@pytest.mark.parametrize("log", [False, True])
def test_folders_of_torchrun_go_unless_they_hold_something(
    log: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "torchelastic_x"
    ranks = [root / "none_y" / "attempt_0" / str(rank) for rank in range(2)]
    for folder in ranks:
        folder.mkdir(parents=True)
    if log:
        (ranks[0] / "stdout.log").touch()
    for folder in ranks:
        assert root.exists()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        remove_launcher_folders()
    assert root.exists() == log
    assert tmp_path.exists()


def test_folders_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "logs" / "none_y" / "attempt_0" / "0"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    remove_launcher_folders()
    assert folder.is_dir()


def entry_points() -> dict[str, str]:
    lines = (REPOSITORY / "setup.cfg").read_text().partition("console_scripts =\n")[2].partition("\n\n")[0]
    return dict(tuple(part.strip() for part in line.split("=")) for line in lines.splitlines())


def test_every_console_script_is_there_and_told_of() -> None:
    assert COMMANDS.keys() == entry_points().keys()
    for target in entry_points().values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))
    for module, _ in COMMANDS.values():
        path = REPOSITORY.joinpath(*module.split("."))
        runs = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert '__name__ == "__main__"' in runs.read_text()  # else `python -m` does nothing


def test_the_package_says_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer"])
    assert say_what_there_is() == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)
    monkeypatch.setattr(sys, "argv", ["trainer", "trian"])
    assert say_what_there_is() == 2


def test_configurations_are_found_by_name_outside_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.config import Config
    from trainer.errors import ConfigError

    monkeypatch.chdir(tmp_path)
    assert Config.load(Path("cifar10")) == Config.load(REPOSITORY / "configs" / "cifar10.toml")
    os.makedirs("cifar10")  # noqa: PTH103 - a folder of that name is no configuration
    assert Config.load(Path("cifar10")).train.global_batch == 128
    with pytest.raises(
        ConfigError, match=r"^cifar: cannot be read: no such file; shipped by name: celebahq256, cifar10"
    ):
        Config.load(Path("cifar"))
