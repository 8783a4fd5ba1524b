"""Opens a trained network for sampling or evaluation: configuration, verified weights, reverse process."""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator

from trainer.config import Config
from trainer.diffusion.ddpm.respacing import asked_for, respaced
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.engine.build import build_diffusion, build_reverse, build_trained
from trainer.engine.checkpointing.checkpoints import Checkpoints, read_weights
from trainer.engine.checkpointing.sealed import COMPLETE_NAME
from trainer.engine.processes.collectives import make_accelerator, together
from trainer.engine.run_folder import RunFolder
from trainer.errors import CheckpointError, ConfigError
from trainer.launcher.parent import end_with_launcher
from trainer.launcher.settle import without_effect
from trainer.models.ddpm_unet import UNet
from trainer.signals import StopRequest

_PATIENCE = timedelta(days=7)  # a rank that has finished waits for others, which may take long


@dataclass(frozen=True, kw_only=True)
class TrainedRequest:
    """A run's weights, and the timesteps to use.

    `checkpoint`: None for the newest undamaged one; `respacing`: see trainer/diffusion/ddpm/respacing.py; `variance`: a
    fixed one in place of the configuration's, or None.
    """

    run: Path
    checkpoint: Path | None
    weights: str
    respacing: str
    variance: Literal["small", "large"] | None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of `open_trained`. `fingerprint` is unique to the checkpoint; `stop` is checked after each batch."""

    config: Config
    folder: RunFolder
    checkpoint: Path
    fingerprint: str
    step: int
    weights: str
    accelerator: Accelerator
    reverse: ReverseProcess
    stop: StopRequest

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        model = self.config.model
        return model.channels, model.image_size, model.image_size

    @property
    def device(self) -> torch.device:
        """Device of the network and the tables."""
        return self.accelerator.device


def open_trained(request: TrainedRequest) -> Trained:
    """Load the weights on every rank, in eval mode. From here on signals set a request to stop and do not end the
    process.

    Raises TrainerError where the run or the checkpoint cannot be used, ConfigError where the request does not suit it.
    """
    end_with_launcher()
    stop = StopRequest()
    stop.install()
    folder = RunFolder(request.run, writes=False)
    config = folder.load_config()
    if request.variance is not None:
        config = _with_variance(config, request.variance)
    remark = without_effect(os.environ)
    accelerator = make_accelerator(patience=_PATIENCE)
    if remark is not None and accelerator.is_main_process:
        print(remark, file=sys.stderr, flush=True)
    diffusion = build_diffusion(config, accelerator.device)
    if request.respacing != "all":
        try:
            diffusion = diffusion.respaced(respaced(diffusion.timesteps, request.respacing))
        except ValueError as error:
            raise ConfigError(f"--respacing: {error}") from error

    asked = asked_for(config.diffusion.timesteps, request.respacing)
    if diffusion.timesteps < asked and accelerator.is_main_process:
        print(
            f"--respacing {request.respacing}: {diffusion.timesteps} steps, for {asked - diffusion.timesteps} of "
            f"{asked} fall on a timestep that is visited already",
            file=sys.stderr,
        )
    checkpoints = Checkpoints(folder.checkpoints, accelerator)
    path = checkpoints.choose(request.checkpoint)
    opened: list[tuple[UNet, int]] = []
    together(f"{path}: cannot be read", lambda: opened.append(_load(path, request.weights, config, accelerator.device)))
    ((network, step),) = opened
    return Trained(
        config=config,
        folder=folder,
        checkpoint=path,
        fingerprint=(path / COMPLETE_NAME).read_text().strip(),
        step=step,
        weights=request.weights,
        accelerator=accelerator,
        reverse=build_reverse(network, diffusion, config),
        stop=stop,
    )


def _with_variance(config: Config, variance: Literal["small", "large"]) -> Config:
    if config.diffusion.variance not in ("small", "large"):
        raise ConfigError(
            f"--variance {variance}: the network of this run gives its own variance ({config.diffusion.variance})"
        )
    return config.model_copy(update={"diffusion": config.diffusion.model_copy(update={"variance": variance})})


def _load(path: Path, kind: str, config: Config, device: torch.device) -> tuple[UNet, int]:
    """The network and the step of its checkpoint."""
    weights, manifest = read_weights(path, kind)
    try:
        return build_trained(config, weights, device), int(manifest["step"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
