"""From a configuration to a running loop: processes, data, network, state, resume."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from trainer.config import Config, ModelConfig
from trainer.data.shards import ShardedDataset
from trainer.data.stream import BatchLayout, MicroBatchPlan, micro_batches
from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.schedules import make_betas
from trainer.engine.checkpoints import Checkpoints
from trainer.engine.loop import TrainingLoop
from trainer.engine.processes import broadcast, die_with_launcher, make_accelerator
from trainer.engine.run import RunFolder, check_dataset, check_identity, identity
from trainer.engine.signals import StopRequest
from trainer.engine.state import TrainState, make_ema
from trainer.engine.step import TrainStep
from trainer.errors import CheckpointError, ConfigError
from trainer.models.unet import UNet, UNetConfig


def build_network(model: ModelConfig) -> UNet:
    """The UNet that the configuration describes, initialised from torch's current seed.

    Raises ConfigError where the sizes do not fit together.
    """
    fields = model.model_dump()
    fields["channel_multipliers"] = tuple(model.channel_multipliers)
    fields["attention_resolutions"] = tuple(model.attention_resolutions)
    try:
        return UNet(UNetConfig(**fields))
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def build_diffusion(config: Config, device: torch.device) -> GaussianDiffusion:
    """The forward process that the configuration describes, its tables on the device."""
    return GaussianDiffusion(make_betas(config.diffusion.schedule, config.diffusion.timesteps)).to(device)


def build_state(config: Config, accelerator: Accelerator) -> TrainState:
    """The state of a run that has not begun; the same on every rank and for every number of ranks."""
    torch.manual_seed(config.seed)
    model = build_network(config.model).to(accelerator.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    model.activation_checkpointing = config.train.activation_checkpointing
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        fused=True,
    )
    return TrainState(
        model=model,
        ema=make_ema(model, config.train.ema_decay),
        optimizer=optimizer,
        scaler=accelerator.scaler,
    )


def train(config: Config, *, resume: str) -> bool:
    """Train to the end of the run or to a request to stop; returns whether the run is complete.

    `resume` is "auto", "none" or the path of a checkpoint. Raises TrainerError for whatever the user can mend.
    """
    die_with_launcher()
    stop = StopRequest()
    stop.install()
    layout = BatchLayout.plan(
        config.train.global_batch, int(os.environ.get("WORLD_SIZE", "1")), config.train.micro_batch
    )
    dataset = ShardedDataset(Path(config.data.path))
    check_dataset(config, dataset)
    accelerator = make_accelerator(config.train.precision)
    folder = RunFolder(Path(config.run_dir), writes=accelerator.is_main_process)
    state = build_state(config, accelerator)
    network = accelerator.prepare(state.model)
    train_step = TrainStep(
        config=config,
        layout=layout,
        accelerator=accelerator,
        network=network,
        state=state,
        diffusion=build_diffusion(config, accelerator.device),
        stop=stop,
    )
    if layout.world_size > 1:
        train_step.warm_up()

    checkpoints = Checkpoints(folder.checkpoints, accelerator)
    source = _find_checkpoint(checkpoints, folder, resume, say=accelerator.print)
    if source is not None:
        tensors, manifest = checkpoints.read(source)
        check_identity(manifest["identity"], identity(config, dataset), source)
        state.load(tensors, manifest["state"])
        if source.parent.resolve() == folder.checkpoints.resolve():
            checkpoints.supersede(manifest["step"])
    folder.create(config)
    checkpoints.discard_unfinished()

    loop = TrainingLoop(
        config=config,
        layout=layout,
        accelerator=accelerator,
        dataset=dataset,
        state=state,
        train_step=train_step,
        checkpoints=checkpoints,
        folder=folder,
    )
    folder.event("started", step=loop.step, world_size=layout.world_size, resumed_from=str(source or ""))
    loop.progress.say(_summary(loop, source))
    plan = MicroBatchPlan(
        layout,
        samples=len(dataset),
        seed=config.seed,
        rank=accelerator.process_index,
        first_step=loop.step,
        last_step=loop.last_step,
    )
    stream = micro_batches(
        dataset,
        plan,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin_memory=accelerator.device.type == "cuda",
    )
    finished = loop.run(stream)
    stream.close()
    accelerator.end_training()
    return finished


def _find_checkpoint(
    checkpoints: Checkpoints, folder: RunFolder, resume: str, *, say: Callable[[str], None]
) -> Path | None:
    """Which checkpoint to go on from; None to start."""
    if resume == "auto":
        newest, damaged = checkpoints.recover()
        for path, reason in damaged.items():
            folder.event("quarantined", checkpoint=path.name, reason=reason)
            say(f"{path}: damaged: {reason}; moved to quarantine/")
        return newest
    if resume == "none":
        if broadcast(bool(checkpoints.steps() or any(checkpoints.folder.glob("quarantine/*")))):
            raise CheckpointError(
                f"{checkpoints.folder}: holds checkpoints of an earlier run, which --resume none would mix with a new "
                "one; choose another run_dir, or move the folder away"
            )
        return None
    if not Path(resume).is_dir():
        raise CheckpointError(f"--resume {resume}: no such checkpoint; give auto, none or the path of one (step-...)")
    return Path(resume)


def _summary(loop: TrainingLoop, source: Path | None) -> str:
    layout = loop.layout
    parameters = sum(parameter.numel() for parameter in loop.state.model.parameters())
    origin = f"resuming from {source}" if source is not None else "starting"
    return (
        f"{origin}: step {loop.step} of {loop.last_step}, {parameters:,} parameters, {len(loop.dataset):,} images, "
        f"batch {layout.global_batch} = {layout.world_size} processes x {layout.accumulation} accumulated x "
        f"{layout.micro_batch}, {loop.accelerator.device.type} {loop.config.train.precision}"
    )
