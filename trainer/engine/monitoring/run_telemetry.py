"""Telemetry of a training run: once a log interval, the meters are read and their values passed to the writers."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.engine.monitoring.summary import Ending
from trainer.engine.network.build import build_network
from trainer.engine.network.cost import cost_of
from trainer.engine.processes.activity import enter
from trainer.engine.processes.collectives import gather_numbers
from trainer.engine.run_folder import RunFolder, flat_fields
from trainer.engine.state.train_state import TrainState
from trainer.engine.step.step_report import Verdict
from trainer.errors import TrainerError
from trainer.models.backbones import example_inputs
from trainer.telemetry.device import device_memory, device_peak, host_memory
from trainer.telemetry.goodput import Goodput, add_up, read_starts
from trainer.telemetry.heartbeat import Heartbeat
from trainer.telemetry.metrics import Metrics
from trainer.telemetry.pace import Pace
from trainer.telemetry.progress import Progress, Stopwatch
from trainer.telemetry.step_clock import StepClock
from trainer.telemetry.trackers import Trackers
from trainer.units import in_words

T = TypeVar("T")


class Telemetry:
    """Scalars, progress, heartbeat and goodput of a run. All ranks make the same calls; rank 0 writes.

    `samples`: images in an epoch.

    Between two calls of `log` there is no synchronisation with the device and no communication.
    """

    def __init__(
        self,
        *,
        config: Config,
        layout: BatchLayout,
        samples: int,
        state: TrainState,
        folder: RunFolder,
        trackers: Trackers | None = None,
    ) -> None:
        self.layout = layout
        self.state = state
        self.folder = folder
        self.last_step = config.train.duration.steps(layout.global_batch)
        self._samples = samples
        self._device = state.strategy.device
        self.peak = device_peak(self._device, config.train.precision)
        writes = state.strategy.accelerator.is_main_process
        inputs = partial(example_inputs, config.model)
        # Counting takes a large part of a second, and what is derived from it is written by rank 0 alone.
        self._flops_per_image = cost_of(lambda: build_network(config), inputs).training_flops if writes else 0
        self.progress = Progress(total=self.last_step, done=self.step, unit="step", title="training", visible=writes)
        self.metrics = Metrics(folder.logs, self.step, trackers, say=self.progress.say) if writes else None
        if self.metrics is not None:
            self.metrics.configuration(config.to_toml(), flat_fields(config), judged_by=_judged_by(config))
        # Time before this counts as start-up.
        self.heartbeat = Heartbeat(folder.path, writes=writes, best_effort=folder.best_effort)
        self.stopwatch = Stopwatch(self.beat)
        self.pace = Pace(self._device)
        self.pace.watch(state.main.network.module)
        self.clock = StepClock(self._device)
        self._starts: list[dict[str, Any]] = []
        self._waited = 0.0  # seconds spent waiting for data, up to the last log line

    @property
    def step(self) -> int:
        """Number of optimizer steps settled."""
        return self.state.position // self.layout.global_batch

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of this process by activity."""
        return self.heartbeat.seconds({**self.stopwatch.spent, "data": self.pace.waited})

    def timed(self, stream: Iterator[T]) -> Iterator[T]:
        """The stream, with the time spent waiting for it measured. Training time starts here."""
        self.clock.start()
        return self.pace.timed(stream)

    def queued(self) -> None:
        """Call when all work of a step has been queued on the device."""
        self.clock.step_ended()
        self.stopwatch.count(self.layout.global_batch)

    def count(self, verdict: Verdict) -> None:
        """Call when a step is settled, with its verdict; the state has been updated."""
        for each in verdict.networks:
            if each.finite:
                meters = self.state.networks[each.network].meters
                meters.add(loss=each.loss, grad_norm=each.grad_norm, figures=each.figures)
        self.progress.update()
        self.beat("training")

    @contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """A context for activities other than training, timed under `reason`."""
        resume = self.stopwatch.pause(reason)
        yield
        resume()
        self.clock.start()

    def log(self) -> None:
        """Write the scalars of the steps since the last call. Collective; synchronises with the device.

        Raises TrainerError on all ranks where the run's folder has vanished.
        """
        enter("log")
        images, seconds = self.stopwatch.lap()
        rate = images / seconds
        values = {
            "train/images_per_second": rate,
            "train/epoch": self.state.position / self._samples,
            "train/nonfinite_steps": float(self.state.nonfinite_steps),
            **self._of_networks(),
            **self.clock.take(),
            **self._of_all_ranks(seconds),
            **self._use_of_devices(rate),
            **self._compare_pace(),
        }
        if self.metrics is not None:
            values |= self._goodput().scalars()
        self.scalars(values)
        loss = values.get("train/loss", float("nan"))
        summary = f"loss {loss:.4f}, {rate:.1f} images/s, MFU {values['device/mfu']:.1%}"
        self.progress.show(summary)
        self.progress.log(f"step {self.step}/{self.last_step}: {summary}{self._left(rate)}")

    def scalars(self, values: Mapping[str, float]) -> None:
        """Write scalars of this step."""
        if self.metrics is not None:
            self.metrics.scalars(self.step, dict(values))

    def beat(self, activity: str) -> None:
        """Write the heartbeat with the current activity."""
        self.heartbeat.beat(
            step=self.step,
            last_step=self.last_step,
            activity=activity,
            spent={**self.stopwatch.spent, "data": self.pace.waited},
        )

    def end(self, end: str) -> None:
        """Report that training ended, `end` being "finished" or "stopped", and was saved; with a summary."""
        seconds = self.seconds
        self.folder.event(end, step=self.step, seconds=seconds)
        self.beat(end)
        self.progress.close()
        with self.best_effort():
            if self.metrics is not None:
                ending = Ending(
                    run=self.folder.path,
                    step=self.step,
                    last_step=self.last_step,
                    seconds=sum(seconds.values()),
                    goodput=self._goodput(),
                )
                self.progress.say(ending.text())

    def close(self) -> None:
        """Flush all writers to the disk and to the trackers, whose servers may be slow."""
        if self.metrics is not None:
            self.metrics.close()

    @contextmanager
    def best_effort(self) -> Iterator[None]:
        """A context in which errors of telemetry are caught and reported: they must not end the run."""
        try:
            yield
        except OSError as fault:
            self.progress.say(f"step {self.step}: not written: {fault}")

    def _of_all_ranks(self, seconds: float) -> dict[str, float]:
        """Scalars that need communication between ranks, exchanged in one collective."""
        waited, self._waited = self.pace.waited - self._waited, self.pace.waited
        own = torch.tensor(
            [waited / seconds, host_memory(), *device_memory(self._device), float(self.folder.has_vanished)],
            dtype=torch.float64,
            device=self._device,
        )
        rows = gather_numbers(torch.cat([own, self.state.main.averages.squared_distance().to(self._device)]))
        waits, host, allocated, reserved, vanished, distance, weights = zip(*rows, strict=True)
        if any(vanished):
            raise TrainerError(self.folder.vanished, agreed=True)
        values = {
            "time/data_wait_fraction": min(max(waits), 1.0),
            "device/host_memory_bytes": max(host),
            "train/ema_distance": (sum(distance) / sum(weights)) ** 0.5,
        }
        if self._device.type == "cuda":
            values["device/memory_allocated_bytes"] = max(allocated)
            values["device/memory_reserved_bytes"] = max(reserved)
        return values

    def _of_networks(self) -> dict[str, float]:
        """Meters and learning rates: train/loss of the main network, train/critic/loss of one named "critic"."""
        values: dict[str, float] = {}
        for name, network in self.state.networks.items():
            prefix = "train" if network is self.state.main else f"train/{name}"
            taken = {"train/learning_rate": network.learning_rate, **network.meters.take()}
            values |= {key.replace("train", prefix, 1): value for key, value in taken.items()}
        return values

    def _use_of_devices(self, rate: float) -> dict[str, float]:
        flops = rate * self._flops_per_image / self.layout.world_size
        return {"device/flops_per_second": flops, "device/mfu": flops / self.peak.flops}

    def _compare_pace(self) -> dict[str, float]:
        values, slow = self.pace.report()
        if slow is not None:
            self.folder.event("slow_rank", step=self.step, slow=slow)
            self.progress.say(f"step {self.step}: slow: {slow}")
        self.pace.compare()
        return values

    def _left(self, rate: float) -> str:
        """Estimated time left: training at `rate` images/s, plus other activities in the proportion so far."""
        if self.step >= self.last_step:
            return ""
        seconds = (self.last_step - self.step) * self.layout.global_batch / rate
        spent = self.seconds
        others = sum(value for part, value in spent.items() if part not in ("training", "data", "startup"))
        trained = spent.get("training", 0.0) + spent.get("data", 0.0)
        return f", {in_words(seconds * (1 + others / max(trained, 1e-9)))} left"

    def _goodput(self) -> Goodput:
        if not self._starts:  # read once: no other process starts this run while it is locked
            self._starts = read_starts(self.folder.path)
        now = {"time": time.time(), "step": self.step, "seconds": self.seconds}
        return add_up(self._starts, now)


def _judged_by(config: Config) -> list[str]:
    """Names of the scalars that measure the quality of a run."""
    log = config.log
    measured = ["validation/loss", "validation/ema_loss"] if log.validate_every.count else []
    return ["train/loss", *measured, *(["validation/feature_distance"] if log.distance_every.count else [])]
