"""One start of a run, from a configuration to a running loop: processes, data, network, state, resume."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from trainer.config import Config, DataConfig
from trainer.data.stream.bad_samples import BadSamples
from trainer.data.stream.prefetch import Prefetcher
from trainer.data.stream.stream import BatchLayout, MicroBatchPlan, loader_death_as_data_error, micro_batches
from trainer.data.training_data import TrainingData, open_training_data
from trainer.engine.build import build_state
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.checkpointing.initial_weights import load_initial_weights
from trainer.engine.checkpointing.remote.mirror_folder import CopyFolder
from trainer.engine.checkpointing.resume import find_checkpoint, load_checkpoint
from trainer.engine.loop import TrainingLoop
from trainer.engine.monitoring.run_telemetry import Telemetry
from trainer.engine.monitoring.sample_grids import SampleGrids
from trainer.engine.processes.collectives import check_alike, each_its_own, together
from trainer.engine.processes.cpu_share import loader_processes
from trainer.engine.processes.semaphores import name_semaphores
from trainer.engine.processes.watchdog import Watchdog
from trainer.engine.run_dir import check_run_dir
from trainer.engine.run_folder import RunFolder, identity
from trainer.engine.state.train_state import TrainState
from trainer.engine.step.garbage_collection import manual_collection
from trainer.engine.step.train_step import TrainStep
from trainer.engine.strategies import Strategy, make_strategy
from trainer.errors import ConfigError, DataError
from trainer.launcher.parent import end_with_launcher
from trainer.signals import StopRequest
from trainer.telemetry.environment import environment
from trainer.telemetry.profiling import RecordingRequest
from trainer.telemetry.trackers import Trackers, check_trackers, open_trackers
from trainer.world import local_world_size, world_size


def train(config: Config, *, resume: str, record: RecordingRequest) -> bool:
    """Train to the end of the run or to a request to stop; returns whether the run is complete.

    `resume` is "auto", "none", or the path or URL of a checkpoint; `record`: steps to profile. Raises TrainerError for
    errors that the user can fix.
    """
    end_with_launcher()
    stop = StopRequest()
    stop.install()
    layout = BatchLayout.plan(config.train.global_batch, world_size(), config.train.micro_batch)
    strategy = make_strategy(config.train, micro_batch=layout.micro_batch, accumulation=layout.accumulation)
    watchdog = Watchdog(
        rank=strategy.accelerator.process_index,
        world_size=layout.world_size,
        hang_timeout=config.train.hang_timeout,
        timeout=config.train.timeout,
        stop=stop,
    )
    with watchdog:
        return _train(config, resume, record, layout, strategy, stop, watchdog)


def _train(
    config: Config,
    resume: str,
    record: RecordingRequest,
    layout: BatchLayout,
    strategy: Strategy,
    stop: StopRequest,
    watchdog: Watchdog,
) -> bool:
    accelerator = strategy.accelerator
    recordings = record.open(
        accelerator.device,
        folder=Path(config.run_dir) / "profiles",
        rank=accelerator.process_index,
        say=accelerator.print,
    )
    check_trackers(config)
    run = Path(config.run_dir)
    together(f"run_dir = {run}: cannot be read", lambda: check_run_dir(run), kind=ConfigError, only_rank=0)
    data = _open_data(config)
    # Fields that may differ between restarts must still be equal on all ranks.
    check_alike({**identity(config, data), "the configuration": config.to_toml()}, kind=ConfigError)

    state = build_state(config, strategy)
    train_step = TrainStep(config=config, layout=layout, state=state, stop=stop)
    grids = SampleGrids(config, state, stop)
    train_step.warm_up()

    folder = RunFolder(run, writes=accelerator.is_main_process)
    what = f"run_dir = {folder.path}: cannot be written"
    together(what, folder.claim, only_rank=0)
    watchdog.folder = folder
    source = _resume(config, resume, data, state, folder)
    for change in together(what, lambda: folder.begin(config), only_rank=0)[0]:
        accelerator.print(f"changed since the last start: {change}")

    trackers = _open_trackers(config, folder, accelerator)
    telemetry = Telemetry(
        config=config, layout=layout, samples=data.order.samples, state=state, folder=folder, trackers=trackers
    )
    loop = TrainingLoop(train_step=train_step, data=data, telemetry=telemetry, grids=grids, recordings=recordings)
    about: dict[str, Any] = {"world_size": layout.world_size, "nodes": _nodes(), "resumed_from": str(source or "")}
    about |= {"peak_flops": telemetry.peak.flops, "peak_source": telemetry.peak.source}
    about |= {"environment": environment(accelerator.device)}
    folder.event("started", step=loop.step, **about, **telemetry.heartbeat.about_start(loop.step))
    loop.progress.say(_summary(loop, source))
    return _run(loop, accelerator)


def _resume(config: Config, resume: str, data: TrainingData, state: TrainState, folder: RunFolder) -> Path | None:
    """Load the checkpoint to resume from, and set later ones aside; returns its path, None for a new run."""
    accelerator = state.strategy.accelerator
    checkpoints, snapshots = (Checkpoints(path, accelerator) for path in (folder.checkpoints, folder.averages))
    for each in (checkpoints, snapshots):
        each.discard_unfinished()
    source = find_checkpoint(
        checkpoints,
        folder,
        resume,
        copies=CopyFolder(config.checkpoint.copy_to) if config.checkpoint.copy_to is not None else None,
        identity=identity(config, data),
        say=accelerator.print,
    )
    if source is not None:
        step = load_checkpoint(source, state, identity(config, data), say=accelerator.print)
        checkpoints.supersede(source, step)
        snapshots.supersede(source, step + 1)  # those of `step` stay: a snapshot has no state to resume from
    else:
        load_initial_weights(config, state, say=accelerator.print)
        snapshots.supersede("its beginning", 1)  # snapshots of an earlier start
    return source


def _open_data(config: Config) -> TrainingData:
    return each_its_own(
        f"data.path = {config.data.where}: cannot be read",
        lambda: open_training_data(config, index_folder=Path(config.run_dir) / "indexes", nodes=_nodes()),
        kind=DataError,
    )


def _open_trackers(config: Config, folder: RunFolder, accelerator: Accelerator) -> Trackers:
    opened = [Trackers([], accelerator.print)]  # on ranks other than 0
    together(
        f"log.trackers = {config.log.trackers}: cannot be started",
        lambda: opened.append(open_trackers(config, folder.path, accelerator.print)),
        kind=ConfigError,
        only_rank=0,
    )
    return opened[-1]


def _nodes() -> int | None:
    """Number of nodes; None where the launcher does not set the number of processes per node."""
    here = local_world_size()
    return max(1, world_size() // here) if here is not None else None


def _run(loop: TrainingLoop, accelerator: Accelerator) -> bool:
    config, rank = loop.config, accelerator.process_index
    plan = MicroBatchPlan(loop.layout, order=loop.data.order, rank=rank, first_step=loop.step, last_step=loop.last_step)

    def report(fault: str) -> None:
        loop.folder.event_here(rank, "bad_sample", sample=fault)
        loop.progress.say(f"skipped: {fault}")

    name_semaphores(loop.folder.path, rank)
    stream = micro_batches(
        loop.data.dataset,
        plan,
        workers=loader_processes(config.data.workers),
        prefetch=config.data.prefetch,
        pin_memory=accelerator.device.type == "cuda",
        start_method=config.data.start_method,
        bad_samples=BadSamples(config.data.max_bad_samples, report) if config.data.on_bad_sample == "skip" else None,
        prefetcher=_prefetcher(config.data, loop.data, plan),
    )
    try:
        with loader_death_as_data_error(), manual_collection():
            finished = loop.run(stream)
    finally:
        stream.close()
        loop.end_recordings()
    accelerator.end_training()
    return finished


def _prefetcher(config: DataConfig, data: TrainingData, plan: MicroBatchPlan) -> Prefetcher | None:
    if data.cache is None:
        return None
    # Half of the cache for shards that are prefetched, half for those being read; the ranks of a node share it.
    budget = data.cache.limit // 2 // (local_world_size() or 1)
    return Prefetcher(
        data.cache,
        data.dataset.shards,
        needs=lambda micro_step: plan.shards(data.dataset, micro_step),
        micro_steps=plan.micro_steps,
        in_hand=loader_processes(config.workers) * config.prefetch,
        budget=budget,
    )


def _summary(loop: TrainingLoop, source: Path | None) -> str:
    layout = loop.layout
    parameters = sum(shape.numel() for each in loop.state.networks.values() for shape in each.shapes.values())
    origin = f"resuming from {source}" if source is not None else "starting"
    images = loop.data.order.samples
    if source is not None and loop.step >= loop.last_step:
        return (
            f"{loop.folder.path}: is finished: trained to step {loop.step} of {loop.last_step}, last checkpoint "
            f'{source}; to go on, raise train.duration, for example --set train.duration="{2 * loop.last_step} steps"'
        )
    return (
        f"{origin}: step {loop.step} of {loop.last_step}, {parameters:,} parameters, {images:,} images, "
        f"batch {layout.global_batch} = {layout.world_size} processes x {layout.accumulation} accumulated x "
        f"{layout.micro_batch}, {loop.config.train.strategy} on {loop.accelerator.device.type} in "
        f"{loop.config.train.precision}"
    )
