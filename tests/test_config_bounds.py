"""Numbers that no run can have are refused when the configuration is read, each by its name."""

import argparse
import time
from pathlib import Path

import pytest

from tests.harness import write_config
from trainer.arguments import at_least_one
from trainer.config import Config
from trainer.data.training_data import open_training_data
from trainer.errors import ConfigError, DataError


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.learning_rate=inf",
        "optimizer.learning_rate=nan",
        "optimizer.eps=inf",
        "optimizer.clip_norm=nan",
        "optimizer.warmup=9999999999999999 steps",
        "train.duration=99999999999999999999M images",
        "train.global_batch=1000000000000000",
        "train.micro_batch=1000000000000000",
        "train.bucket_size=99999999999999 TB",
        "train.timeout=99999999999 hours",
        "train.hang_timeout=99999999999 hours",
        "train.max_nonfinite_steps=1000000000000000000000",
        "data.workers=1000000",
        "data.prefetch=1000000000",
        "data.holdout=nan",
        "data.window=10000000000",
        "model.image_size=1000000000",
        "model.channels=1000000",
        "model.base_channels=1000000000",
        "model.blocks_per_level=1000000000",
        "model.channel_multipliers=[1, 1000000000]",
        "model.dropout=nan",
        "diffusion.timesteps=1000000000000",
        "checkpoint.keep=10000000000000000000",
        "log.samples=1000000000",
        "log.validate_images=100000000000000",
        "log.distance_seconds=99999999999 hours",
    ],
)
def test_a_number_that_no_run_has_is_refused_at_once(tmp_path: Path, override: str) -> None:
    path = write_config(tmp_path, tmp_path)
    started = time.monotonic()
    with pytest.raises(ConfigError) as fault:
        Config.load(path, [override])
    assert time.monotonic() - started < 1
    assert str(fault.value).startswith(f"{path}: {override.partition('=')[0]}")
    assert "\n" not in str(fault.value)
    assert len(str(fault.value)) < 500


def test_a_list_without_end_is_refused_in_a_short_line(tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"model.channel_multipliers = \[1, 1, 1") as fault:
        Config.load(path, [f"model.channel_multipliers={[1] * 100_000}"])
    assert len(str(fault.value)) < 500


def test_infinity_where_it_means_something_is_taken(tmp_path: Path) -> None:
    config = Config.load(write_config(tmp_path, tmp_path), ["optimizer.clip_norm=inf"])
    assert config.optimizer.clip_norm == float("inf")


def test_a_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"run_dir = 'runs/caf.udce9': should be UTF-8"):
        Config.load(path, ["run_dir=runs/caf\udce9"])


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "pattern",
    ["{0000000000..9999999999}.tar", "{0..9999}{0..9999}{0..9999}.tar", "{0..9999999999999999999999}.tar"],
)
@pytest.mark.parametrize("place", ["shards/", "https://127.0.0.1:9/"])
def test_a_pattern_of_more_shards_than_anybody_has_is_refused_at_once(tmp_path: Path, pattern: str, place: str) -> None:
    overrides = [f"data.path={place}{pattern}", f"data.cache_dir={tmp_path}"]
    config = Config.load(write_config(tmp_path, tmp_path), overrides)
    with pytest.raises((ConfigError, DataError), match=r"stands for more than 1,000,000 shards"):
        open_training_data(config, index_folder=None)


@pytest.mark.parametrize("text", ["0", "-1", "1000000000000", "9" * 4000])
def test_a_count_on_the_command_line_has_bounds(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as fault:
        at_least_one(text)
    assert "should be from 1 to 100,000,000" in str(fault.value)
    assert len(str(fault.value)) < 200
