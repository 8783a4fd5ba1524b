"""`accelerate launch` itself, told things by options and by files: what the run makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, checkpoint, environment, overrides
from trainer import train
from trainer.config import Config

FSDP_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
downcast_bf16: 'no'
fsdp_config:
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 2
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: false
"""
DEEPSPEED_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 0.5
  offload_optimizer_device: none
  offload_param_device: none
  zero_stage: 1
mixed_precision: bf16
num_machines: 1
num_processes: 1
use_cpu: false
"""


def start(config_path: Path, *options: str, expect: int = 0) -> str:
    """Run `accelerate launch` with these options; returns what it and the trainer printed."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    command += ["trainer/train.py", "--config", str(config_path), *overrides(train__duration="2 steps")]
    variables = environment(HF_HOME=str(config_path.parent / "home"))  # no file of `accelerate config` of the user's
    done = subprocess.run(
        command, cwd=REPOSITORY, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def test_a_trainer_that_accelerate_starts_settles_its_configuration(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config_path), "--dry-run", "--json"])
    plain = (train.main(), capsys.readouterr())
    assert (plain[0], plain[1].err) == (0, "")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train.main() == 0
    told = capsys.readouterr()
    assert told.err == 'train.precision = "bf16": taken from accelerate (mixed_precision = bf16)\n'
    memory = [json.loads(out)["memory_per_device_bytes"] for out in (plain[1].out, told.out)]
    assert memory[1] < memory[0]
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    assert train.main() == 2
    assert capsys.readouterr().err.startswith("error: accelerate: use_megatron_lm: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "summary"),
    [
        (["--num_processes", "1", "--mixed_precision", "bf16"], "1 accumulated x 8, ddp on cpu in bf16"),
        (["--use_deepspeed", "--num_processes", "1", "--zero_stage", "2"], "1 accumulated x 8, zero2 on cpu in fp32"),
        (["--use_fsdp", "--num_processes", "2"], "2 processes x 1 accumulated x 4, fsdp2 on cpu in fp32"),
        (["--config_file", FSDP_FILE], "2 processes x 1 accumulated x 4, fsdp2 on cpu in fp32"),
        (["--config_file", DEEPSPEED_FILE], "4 accumulated x 2, zero1 on cpu in bf16"),
        (
            [
                "--use_deepspeed",
                "--num_processes",
                "2",
                "--deepspeed_config_file",
                '{"zero_optimization": {"stage": 1}}',
            ],
            "2 processes x 1 accumulated x 4, zero1 on cpu in fp32",
        ),
    ],
    ids=["precision", "deepspeed", "fsdp", "file of fsdp", "file of deepspeed", "deepspeed's own file"],
)
def test_what_accelerate_was_told_is_what_trains(options: list[str], summary: str, config_path: Path) -> None:
    if options[-2].endswith("config_file"):
        file = config_path.parent / ("told.json" if options[-1].startswith("{") else "told.yaml")
        file.write_text(options[-1])
        options = [*options[:-1], str(file)]
    output = start(config_path, *options)
    assert summary in output
    run = config_path.parent / "run"
    train = Config.load(run / "config.toml").train
    assert summary.endswith(f"{train.strategy} on cpu in {train.precision}")  # as explicit values, for the next start
    assert checkpoint(run, 2).is_dir()


@pytest.mark.slow
def test_a_launch_whose_every_word_is_outvoted_or_refused(config_path: Path) -> None:
    config_path.write_text(config_path.read_text().replace("[train]", '[train]\ncompile = "none"\nprecision = "fp32"'))
    options = ["--num_processes", "1", "--mixed_precision", "bf16", "--dynamo_backend"]
    output = start(config_path, *options, "inductor")
    assert 'train.precision = "fp32" holds, as the configuration says; accelerate has mixed_precision = bf16' in output
    assert 'train.compile = "none" holds, as the configuration says; accelerate has dynamo_backend' in output
    assert "ddp on cpu in fp32" in output
    output = start(config_path, *options, "eager", expect=1)
    assert "error: accelerate: dynamo_backend = eager: should be no or inductor (docs/accelerate.md)" in output
