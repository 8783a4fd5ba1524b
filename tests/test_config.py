"""A wrong configuration is one line that names the field, its value and what would be right."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment, launch, load_config, overrides
from trainer.config import Config
from trainer.engine.network.build import build_network
from trainer.errors import ConfigError
from trainer.units import Span


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_survive_being_written(path: Path, tmp_path: Path) -> None:
    config = Config.load(path)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(config.to_toml())
    assert Config.load(resolved) == config
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301  # its own


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_btach=3", "train.global_btach: unknown key; did you mean global_batch?"),
        ("tarin.precision=fp32", "tarin: unknown key; did you mean train?"),
        ("data.zzz=1", "data.zzz: unknown key; known here: path, mixture, flip, order, window"),
        ("train.global_batch=0", "train.global_batch = 0: should be greater than 0"),
        ("train.timeout=0 seconds", "train.timeout = '0 seconds': should be greater than 0"),
        ("train.timeout=600", 'train.timeout = 600: a time is written like "10 minutes", in seconds, minutes or hours'),
        ("train.global_batch=eight", "train.global_batch = 'eight': should be a valid integer"),
        ("train.global_batch=8.0", "train.global_batch = 8.0: should be a valid integer"),
        ("data.flip=1", "data.flip = 1: should be a valid boolean"),
        ("train.precision=bf15", "train.precision = 'bf15': should be 'fp32', 'tf32', 'bf16' or 'fp16'"),
        ("train.duration=5", 'train.duration = 5: a span of training is written like "5000 steps"'),
        ("train.duration=five steps", "train.duration = 'five steps': a span of training is written like"),
        ("model.channel_multipliers=[1, 'a']", "model.channel_multipliers[1] = 'a': should be a valid integer"),
        ("train.duration=1.5 steps", "train.duration = '1.5 steps': 1.5 steps is no whole number of steps"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas[1] = 1.5: should be less than 1"),
        ("seed=-1", "seed = -1: should be greater than or equal to 0"),
        ("train", "--set train: write it as section.name=value"),
        ("seed.x=1", "--set seed.x=1: seed is a value, not a section"),
    ],
)
def test_wrong_fields_are_named(config_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_path, override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_fields_and_files_are_named(config_path: Path, tmp_path: Path) -> None:
    config_path.write_text(config_path.read_text().replace("image_size = 8", "").replace("ema_decay", "decay"))
    with pytest.raises(ConfigError, match=r"model\.image_size: missing; train\.decay: unknown key"):
        load_config(config_path)
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_config(tmp_path / "none.toml")
    config_path.write_text("a = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(config_path)


NETWORK = """
[model]
image_size = 8
base_channels = 32
channel_multipliers = [1, 2]
attention_resolutions = []
"""


def test_a_folder_data_and_a_network_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('run_dir = "run"\ndata.path = "data"\n' + NETWORK)
    config = Config.load(path)
    build_network(config)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(config.to_toml())
    assert Config.load(resolved) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'run_dir = "run"\ndata.path = "data"\n',
            "model: missing section; it needs image_size, base_channels, channel_multipliers, attention_resolutions",
        ),
        ('run_dir = "run"\n' + NETWORK, "data: missing section; should have either path or [[data.mixture]]"),
        (NETWORK, "run_dir: missing; data: missing section; should have either path or [[data.mixture]]"),
        ('run_dir = "run"\ndata = 3\n' + NETWORK, "data = 3: should be a section: [data]"),
    ],
)
def test_a_missing_section_names_what_it_needs(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.norm_groups=5", "model: norm_groups = 5: must divide every level's channels"),
        ("model.image_size=9", "model: image_size = 9: must be a multiple of 2"),
        ("model.attention_resolutions=[16]", "model: attention_resolutions = [16]: 16 is no level's side"),
    ],
)
def test_networks_that_cannot_be_are_refused(config_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_path, override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (overrides(train__global_batch=9), "train.global_batch = 9: is not divisible by 2 processes"),
        (
            overrides(train__strategy="hsdp", train__hsdp_shard_size=1),
            "groups of 1 process share nothing; set train.hs",
        ),
        (overrides(train__micro_batch=3), "train.micro_batch = 3: does not divide the 4 images of a process"),
        (overrides(train__precision="fp16"), "train.precision = 'fp16': needs a GPU"),
        (overrides(model__image_size=16, model__attention_resolutions="[8]"), "model.image_size = 16: the images in"),
        (overrides(data__path="/nowhere"), "/nowhere: no such folder; make it with"),
        (["--resume", "/nowhere"], "--resume /nowhere: no such checkpoint"),
    ],
)
def test_runs_that_cannot_be_end_with_one_line(config_path: Path, arguments: list[str], message: str) -> None:
    output = launch(2, "--config", str(config_path), *arguments, expect=2)
    assert message in output
    assert "Traceback" not in output


def test_the_exit_code_and_the_line_reach_the_shell(config_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "trainer/train.py", "--config", str(config_path), "--set", "train.lerning_rate=1"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {config_path}: train.lerning_rate: unknown key; {KNOWN}\n"


KNOWN = (
    "known here: duration, global_batch, micro_batch, ema_decay, ema_warmup, ema_sigma_rel, ema_snapshots, freeze, "
    "init_from, strategy, hsdp_shard_size, bucket_size, offload_optimizer, precision, activation_checkpointing, "
    "memory_budget, compile, compile_cache, cuda_graphs, max_nonfinite_steps, timeout, hang_timeout"
)


def test_spans_count_steps_or_images() -> None:
    assert Span.parse("2.4M steps").images(64) == 153_600_000
    assert Span.parse("51_200 images").steps(64) == 800
    assert Span.parse("100 images").steps(64) == 2  # rounded up
    assert str(Span.parse("800k steps")) == "800000 steps"
    every_100_images = Span.parse("100 images")
    due = [position for position in range(64, 641, 64) if every_100_images.is_due(position, 64)]
    assert due == [128, 256, 320, 448, 512, 640]  # the first step that completes each hundred
    assert not Span.parse("0 steps").is_due(64, 64)
    assert [p for p in range(8, 49, 8) if Span.parse("2 steps").is_due(p, 8)] == [16, 32, 48]


def test_times_are_read_in_any_unit(config_path: Path) -> None:
    config = load_config(config_path, "train.timeout=1.5 hours", "train.hang_timeout=0 seconds")
    assert (config.train.timeout, config.train.hang_timeout) == (5400, 0)
    assert 'timeout = "5400.0 seconds"' in config.to_toml()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.kind=ddpm_unet", "model.kind = 'ddpm_unet': unknown kind; did you mean ddpm-unet?"),
        ("diffusion.kind=wavelets", "diffusion.kind = 'wavelets': unknown kind; known here: ddpm, classifier"),
        ("model.kind=3", "model.kind = 3: unknown kind; known here: ddpm-unet, adm-unet, adm-classifier"),
    ],
)
def test_an_unknown_kind_is_one_line_that_names_the_nearest(config_path: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(config_path, override)
    assert str(refused.value) == f"{config_path}: {line}"


def test_kinds_of_today_need_not_be_named(config_path: Path) -> None:
    config = load_config(config_path)
    assert (config.model.kind, config.diffusion.kind) == ("ddpm-unet", "ddpm")
    assert load_config(config_path, "model.kind=ddpm-unet", "diffusion.kind=ddpm") == config
