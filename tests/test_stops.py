"""What takes minutes between two steps: a stop is heeded within it, and a kill in it costs no checkpoint."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.faults import Fault
from tests.harness import checkpoint, events, launch, overrides, read_verified
from trainer.diffusion.contract import SamplingStep
from trainer.engine.processes.division import map_over_ranks
from trainer.engine.processes.peer_status import Peers
from trainer.engine.processes.watchdog import Watchdog
from trainer.sampling.request import SamplingRequest
from trainer.sampling.samplers import SAMPLERS, SamplerEntry
from trainer.signals import StopRequest
from trainer.telemetry.metrics import read_metrics

GRID = overrides(log__samples_every="2 steps")
VALIDATION = overrides(data__holdout=0.5, log__validate_every="2 steps")
DISTANCE = overrides(log__distance_every="2 steps", log__distance_samples=8, log__distance_steps=4)
LONG = pytest.mark.parametrize(
    ("settings", "point"),
    [
        (VALIDATION, "validate"),
        pytest.param(GRID, "denoise", marks=pytest.mark.slow),
        pytest.param(DISTANCE, "denoise", marks=pytest.mark.slow),
    ],
)


def measured(run: Path, name: str) -> list[float]:
    """The steps in which it was; what was measured after a restart has a line of its own."""
    return [record["step"] for record in read_metrics(run / "logs") if name in record]


@LONG
def test_a_checkpoint_is_written_before_what_takes_minutes(
    config_path: Path, tmp_path: Path, settings: list[str], point: str
) -> None:
    fault = Fault(action="kill", point=point, call=1, rank=0)
    launch(1, "--config", str(config_path), *settings, fault=fault, expect=None)
    assert read_verified(checkpoint(tmp_path / "run", 2))[1]["step"] == 2


@LONG
def test_a_stop_is_heeded_in_what_takes_minutes(
    config_path: Path, tmp_path: Path, settings: list[str], point: str
) -> None:
    """On one rank of two: what is half done is nothing, and the next start measures what was left out."""
    run, config = tmp_path / "run", str(config_path)
    fault = Fault(action="stop", point=point, call=1, rank=0)
    output = launch(2, "--config", config, *settings, fault=fault)
    (stopped,) = [event for event in events(run) if event["event"] == "stopped"]
    assert stopped["step"] == 2
    assert "step 2: samples in" not in output
    assert "step 2: on " not in output
    assert "step 2: kernel distance" not in output
    launch(2, "--config", config, *settings)
    if settings is VALIDATION:
        assert measured(run, "validation/loss") == [2, 4, 6]
    if settings is DISTANCE:
        assert measured(run, "validation/feature_distance") == [2, 4, 6]


def test_samples_end_with_the_step_in_which_a_stop_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, seen = StopRequest(), list[int]()

    def sampler(_: object, x: torch.Tensor, **__: object):  # type: ignore[no-untyped-def]
        for _ in range(10):
            yield SamplingStep(t=0, original_t=0, x=x, x0=x)

    monkeypatch.setitem(SAMPLERS, "idle", SamplerEntry(sampler=sampler))
    request = SamplingRequest(sampler="idle", count=6, seed=0, batch=2)
    denoiser = SimpleNamespace(diffusion=SimpleNamespace(original_timesteps=torch.arange(10)))

    def on_step(_: int) -> None:
        seen.append(1)
        if len(seen) == 13:
            stop.hear()
        stop.check()

    def draw(numbers: range) -> range:
        request.draw(denoiser, numbers, shape=(1, 2, 2), on_step=on_step)  # type: ignore[arg-type]
        return numbers

    drawn, stopped = map_over_ranks(request.batches, draw, what="samples", stop=stop)
    assert drawn == [range(2)]
    assert stopped
    assert len(seen) == 13


def test_a_stop_is_heeded_between_two_items_too() -> None:
    stop, seen = StopRequest(), list[int]()

    def square(number: int) -> int:
        seen.append(number)
        if number == 2:
            stop.hear()
        return number**2

    assert map_over_ranks(range(5), square, what="squares") == ([0, 1, 4, 9, 16], False)
    stop, seen = StopRequest(), []
    assert map_over_ranks(range(5), square, what="squares", stop=stop) == ([0, 1, 4], True)
    assert seen == [0, 1, 2]


def test_a_stop_of_one_rank_is_told_to_the_others() -> None:
    store = dist.HashStore()
    stops = [StopRequest(), StopRequest()]
    watchdogs = []
    for rank, stop in enumerate(stops):
        watchdogs.append(Watchdog(rank=rank, world_size=2, hang_timeout=60, timeout=60, stop=stop))
        watchdogs[rank]._peers = Peers(store, rank=rank, world_size=2, host="host")
    for watchdog in watchdogs:
        watchdog._exchange()
    assert not any(stops)
    stops[1].signal = signal.SIGUSR1
    for watchdog in reversed(watchdogs):
        watchdog._exchange()
    assert stops[0]
    assert stops[0].signal is None
