"""The training loop: takes batches from the stream, runs steps, and does what is due between steps."""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.data.training_data import TrainingData
from trainer.diffusion.contract import MODEL
from trainer.engine.checkpointing.save_schedule import SaveSchedule
from trainer.engine.monitoring.feature_distance import FeatureDistance
from trainer.engine.monitoring.run_telemetry import Telemetry
from trainer.engine.monitoring.sample_grids import SampleGrids
from trainer.engine.monitoring.validation import Validation
from trainer.engine.processes.activity import enter
from trainer.engine.processes.collectives import together
from trainer.engine.run_folder import identity
from trainer.engine.step.garbage_collection import collect_after
from trainer.engine.step.nonfinite_dump import NonFiniteDump
from trainer.engine.step.step_report import NetworkVerdict, PendingVerdict
from trainer.engine.step.train_step import TrainStep
from trainer.errors import NonFiniteError
from trainer.telemetry.pictures import save_png
from trainer.telemetry.profiling import Recording
from trainer.units import Span

_MOST_OVERFLOWS = 64


@dataclass
class _Periodic:
    """A measurement of the state, how often it is due, and the step in which it was made last."""

    every: Span
    measurement: Validation | FeatureDistance
    measured_step: int = -1


class TrainingLoop:
    """Trains from the state's position to the end of the run, or to a request to stop.

    The verdict on a step (finite or not) is read after the next step's backward pass has been queued, so the device
    never waits for the host. Then the step is settled: if it was applied, the EMA is updated; counters and logs follow.
    """

    def __init__(
        self,
        *,
        train_step: TrainStep,
        data: TrainingData,
        telemetry: Telemetry,
        grids: SampleGrids,
        recordings: Sequence[Recording],
    ) -> None:
        self.train_step = train_step
        self.config, self.layout, self.state = train_step.config, train_step.layout, train_step.state
        config, state, stop = self.config, self.state, train_step.stop
        self.accelerator = state.strategy.accelerator
        self.data = data
        self.grids = grids
        self.recordings = recordings
        self.telemetry = telemetry
        self.folder, self.last_step, self.progress = telemetry.folder, telemetry.last_step, telemetry.progress
        self.saves = SaveSchedule(
            config=config, folder=self.folder, state=state, identity=identity(config, data), say=self.progress.say
        )
        log, scores = config.log, self.saves.retention.scores.get(self.step, {})
        self.measurements: list[_Periodic] = []
        if log.validate_every.count:
            self.measurements.append(_Periodic(log.validate_every, Validation(config, data, state, stop)))
        if log.distance_every.count:
            self.measurements.append(_Periodic(log.distance_every, FeatureDistance(config, data, state, stop)))
        for each in self.measurements:
            # What a stop or a kill prevented after the last checkpoint is made up for.
            each.measured_step = self.step if not self.step or each.measurement.metric in scores else -1
        self.overflows = 0  # consecutive steps that were skipped because of the loss scale
        self.pending: PendingVerdict | None = None
        self.stopping = False

    @property
    def step(self) -> int:
        """Number of optimizer steps settled."""
        return self.state.position // self.layout.global_batch

    def run(self, stream: Iterator[dict[str, torch.Tensor]]) -> bool:
        """Train; returns whether the last step of the run is reached. Either way the last step trained is saved."""
        self._measure_what_is_due()
        stream = self.telemetry.timed(stream)
        first_step = self.step
        while self.step < self.last_step and not self.stopping:
            for recording in self.recordings:
                recording.before_step(self.step + 1)
            enter("data", step=self.step + 1)
            loss = self.train_step.backward(stream)
            self._settle()
            self.pending = self.train_step.update(loss, writing=self.saves.is_writing, copying=self.saves.is_copying)
            self.telemetry.queued()
            if self._is_due(self.config.checkpoint.every) or self._is_due(self.config.train.ema_snapshots):
                self._settle()
                with self.telemetry.pause("saving"):
                    self.saves.after_step()
            self._measure_what_is_due()
            if self._is_due(self.config.log.samples_every):
                self._settle()
                if not self.stopping:
                    self._before_minutes()
                    with self.telemetry.pause("sampling"):
                        self._draw_samples()
                        gc.collect()  # free the network
            collect_after(self.step)
        self._settle()
        self.end_recordings()
        with self.telemetry.pause("saving"):
            self.saves.save_last()
        if self.step >= self.last_step:
            for each in self.measurements:
                self._measure(each)
        with self.telemetry.pause("saving"):
            self.saves.end()
        finished = self.step >= self.last_step
        every = self.config.log.samples_every
        if finished and not self.stopping and every.count and self.step > first_step and not self._is_due(every):
            with self.telemetry.pause("sampling"):
                self._draw_samples()
        self.telemetry.end("finished" if finished else "stopped")
        marker = self.folder.done if finished else self.folder.stopped
        together(f"{marker}: cannot be written", lambda: self.folder.mark(marker, self.step), only_rank=0)
        self.telemetry.close()  # after the marker is written: a tracker's server may not answer
        # All ranks end together: a launcher may kill the others when one exits.
        self.accelerator.wait_for_everyone()
        return finished

    def end_recordings(self) -> None:
        """Stop and write what is still recorded; may be called again."""
        for recording in self.recordings:
            recording.end()

    def _is_due(self, span: Span) -> bool:
        return span.is_due(self.state.position, self.layout.global_batch)

    def _measure_what_is_due(self) -> None:
        for each in self.measurements:
            if self._is_due(each.every):
                self._settle()
                self._measure(each)

    def _before_minutes(self) -> None:
        """Complete a pending save before an operation of minutes, during which the run may be killed."""
        with self.telemetry.pause("saving"):
            self.saves.complete()

    def _settle(self) -> None:
        """Settle the step whose update was queued last; all ranks read the same verdict."""
        if self.pending is None:
            return
        enter("settle")
        verdict, self.pending = self.pending.read(), None
        for each in verdict.networks:
            if each.finite:
                self.state.networks[each.network].updated()
        skipped = [each for each in verdict.networks if not each.finite]
        if not skipped:
            self.overflows = 0
        elif all(map(self._is_overflow, skipped)) and self.overflows < _MOST_OVERFLOWS:
            self.overflows += 1  # the loss scaler's normal search for a scale, no sign of a bad batch
        else:
            self._report_nonfinite(skipped[0])
        self.saves.poll(verdict.writing, verdict.copying)
        self.stopping = self.stopping or verdict.stop_requests > 0
        self.telemetry.count(verdict)
        if self._is_due(self.config.log.every) or self.step == self.last_step:
            self.telemetry.log()

    def _is_overflow(self, verdict: NetworkVerdict) -> bool:
        return self.state.networks[verdict.network].network.scaler is not None and math.isfinite(verdict.loss)

    def _report_nonfinite(self, verdict: NetworkVerdict) -> None:
        """Write images, timesteps and seed of a skipped step to a file; raise after too many. `verdict` is that on the
        first network that it left unchanged.
        """
        self.state.nonfinite_steps += 1
        path = self.folder.nonfinite / f"step-{self.step:08d}.json"
        dump = NonFiniteDump.of_step(verdict, config=self.config, layout=self.layout, state=self.state, data=self.data)
        with self.telemetry.best_effort():
            if self.accelerator.is_main_process:
                dump.write(path)
        self.folder.event("nonfinite", step=self.step, dump=str(path))
        whose = "" if verdict.network == MODEL else f"{verdict.network}: "
        norm = verdict.grad_norm
        line = f"step {self.step}: {whose}loss {verdict.loss}, gradient norm {norm}; skipped, batch in {path}"
        self.progress.say(line)
        if self.state.nonfinite_steps > self.config.train.max_nonfinite_steps:
            raise NonFiniteError(
                f"{line}; {self.state.nonfinite_steps} such steps exceed "
                f"train.max_nonfinite_steps = {self.config.train.max_nonfinite_steps}",
                agreed=True,
            )

    def _measure(self, each: _Periodic) -> None:
        """Measure the state and report it, unless this step has it already."""
        if self.step == each.measured_step or self.stopping:
            return
        self._before_minutes()
        with self.telemetry.pause("validating"):
            started = time.perf_counter()
            values = each.measurement.measure()
            if values is None:
                self.stopping = True
                return
            self.saves.retention.score(self.step, values)
            self.telemetry.scalars(values)
            seconds = time.perf_counter() - started
            self.progress.say(f"step {self.step}: {each.measurement.summary(values)}, in {seconds:.1f} s")
            each.measured_step = self.step
            gc.collect()  # free the networks

    def _draw_samples(self) -> None:
        """Draw a grid and write it on rank 0."""
        picture = self.grids.draw(self.step)
        if picture is None:
            self.stopping = True
            return
        with self.telemetry.best_effort():
            if self.telemetry.metrics is not None:
                path = self.folder.samples / f"step-{self.step:08d}.png"
                save_png(path, picture)
                self.telemetry.metrics.picture(self.step, "samples", picture)
                self.progress.say(f"step {self.step}: samples in {path}")
