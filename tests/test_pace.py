"""A slow rank is named, with its node and what it is slow at; even ranks are left in peace; rates count whole steps."""

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import events, launch, overrides, write_config
from trainer.models.ddpm_unet import UNet
from trainer.telemetry.pace import Spread


def spread(data: list[float], forward: list[float]) -> Spread:
    return Spread(data=data, forward=forward, hosts=[f"n{rank // 2}" for rank in range(len(data))])


def test_the_slowest_is_named_by_what_it_loses_most() -> None:
    assert spread([0.0, 0.0, 0.0, 0.0], [0.20, 0.21, 0.20, 0.22]).slow() is None
    assert spread([0.0, 0.0, 0.0, 0.0], [0.001, 0.001, 0.001, 0.004]).slow() is None  # noise
    rank, line = spread([0.0, 0.0, 0.0, 0.0], [0.20, 0.21, 0.20, 0.40]).slow() or (None, "")
    assert (rank, line) == (3, "rank 3 on n1: forward pass 0.400 s, median of the ranks 0.200 s")
    rank, line = spread([0.01, 0.01, 0.9, 0.01], [0.20, 0.21, 0.20, 0.40]).slow() or (None, "")
    assert (rank, line) == (2, "rank 2 on n1: data 0.900 s, median of the ranks 0.010 s")
    assert spread([0.0, 0.0], [0.1, 0.2]).scalars() == {
        "ranks/data_seconds": 0.0,
        "ranks/forward_seconds": 0.1,
        "ranks/slowest_over_median": pytest.approx(2.0),
    }


@dataclass(frozen=True)
class SlowForward:
    """Each forward pass in training takes `seconds` longer on one rank."""

    rank: int
    seconds: float

    def inject(self) -> None:
        original = UNet.forward

        def slow(network: UNet, *arguments: Any) -> Any:
            if network.training:
                time.sleep(self.seconds)
            return original(network, *arguments)

        UNet.forward = slow  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_run_names_its_slow_rank_once(tmp_path: Path, dataset: Path) -> None:
    settings = overrides(train__duration="10 steps", log__every="2 steps")
    arguments = ["--config", str(write_config(tmp_path, dataset)), *settings]
    fault = SlowForward(rank=1, seconds=0.5)
    said = launch(2, *arguments, fault=fault)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert "ranks/forward_seconds" not in lines[0]  # nothing has been compared yet
    assert min(line["ranks/slowest_over_median"] for line in lines[1:]) > 1.5
    (event,) = [event for event in events(tmp_path / "run") if event["event"] == "slow_rank"]
    assert event["slow"].startswith(f"rank 1 on {socket.gethostname()}: forward pass 0.")
    assert f"slow: {event['slow']}" in said


def test_a_rate_is_of_steps_and_all_of_their_time(tmp_path: Path, dataset: Path) -> None:
    """The last step's too, whose verdict is read at once: no other step runs meanwhile."""
    settings = overrides(train__duration="3 steps", log__every="1 steps")
    arguments = ["--config", str(write_config(tmp_path, dataset)), *settings]
    launch(1, *arguments, fault=SlowForward(rank=0, seconds=0.2))  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/images_per_second"] for line in lines if "train/images_per_second" in line]
    assert len(rates) == 3
    assert max(rates) <= 8 / 0.2  # the global batch, in the time that a forward pass takes at least
