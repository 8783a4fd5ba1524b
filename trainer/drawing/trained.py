"""Opens a trained network for sampling or evaluation: configuration, verified weights, denoiser."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from trainer.config import Config, DDPMConfig
from trainer.data.images import Pixels
from trainer.diffusion.contract import Denoiser, Objective
from trainer.diffusion.ddpm.respacing import count_in_spec
from trainer.drawing.guides import load_network, open_classifier, open_guide
from trainer.engine.build import build_objective
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.checkpointing.sealed import COMPLETE_NAME
from trainer.engine.processes.collectives import each_its_own, make_accelerator
from trainer.engine.run_folder import RunFolder
from trainer.errors import ConfigError
from trainer.launcher.parent import end_with_launcher
from trainer.launcher.settle import without_effect
from trainer.sampling.conditioned import ConditionedNetwork, check_drawable
from trainer.sampling.request import RequestError, ReverseRequest, SamplingRequest
from trainer.signals import StopRequest

_PATIENCE = timedelta(days=7)  # a rank that has finished waits for others, which may take long


@dataclass(frozen=True, kw_only=True)
class TrainedRequest:
    """A run's weights. `checkpoint`: None for the newest undamaged one."""

    run: Path
    checkpoint: Path | None
    weights: str


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of `open_trained`. `fingerprint` is unique to the checkpoint; `timesteps` is T of the process that was
    trained, of which the denoiser may visit fewer; `conditioned` gives the denoiser of a batch, with its classes and
    guidance; `stop` is checked after each batch.
    """

    config: Config
    folder: RunFolder
    checkpoint: Path
    fingerprint: str
    step: int
    weights: str
    accelerator: Accelerator
    timesteps: int
    conditioned: ConditionedNetwork
    stop: StopRequest

    @property
    def name_parts(self) -> list[str]:
        """For names of files."""
        return [f"step-{self.step:08d}", self.weights]

    @property
    def identity(self) -> dict[str, Any]:
        """What results depend on; partial ones are reused only where all of it is the same."""
        return {
            "checkpoint": self.fingerprint,
            "weights": self.weights,
            "variance": self.variance,
        }

    @property
    def variance(self) -> str | None:
        """Which variance the reverse process has; None for families without that choice."""
        diffusion = self.config.diffusion
        return diffusion.variance if isinstance(diffusion, DDPMConfig) else None

    @property
    def denoiser(self) -> Denoiser:
        """The network's, without classes and guidance."""
        return self.conditioned.given({})

    @property
    def device(self) -> torch.device:
        """Device of the network and the tables."""
        return self.accelerator.device

    def draw(
        self,
        request: SamplingRequest,
        numbers: range,
        on_step: Callable[[int], object],
        *,
        low_res: Pixels | None = None,
    ) -> Pixels:
        """A batch of the request that this was opened with, see `SamplingRequest.draw`.

        low_res: (B, C, h, w) uint8, what a network that upsamples enlarges; None for any other.
        """
        given = {} if low_res is None else self.conditioned.low_res(low_res, request.noise(numbers, self.device))
        denoiser = self.conditioned.denoiser_of(numbers, seed=request.seed, low_res=given)
        return request.draw(denoiser, numbers, shape=self.config.model.image_shape, on_step=on_step)

    def denoiser_of(self, numbers: Sequence[int], *, seed: int) -> Denoiser:
        """The denoiser of the samples with these numbers, see `ConditionedNetwork`."""
        return self.conditioned.denoiser_of(numbers, seed=seed)


def open_trained(request: TrainedRequest, reverse: ReverseRequest) -> Trained:
    """Load the weights on every rank, in eval mode. From here on signals set a request to stop and do not end the
    process.

    Raises TrainerError where the run or the checkpoint cannot be used, ConfigError where the request does not suit it.
    """
    end_with_launcher()
    stop = StopRequest()
    stop.install()
    config = drawable_config(request, reverse)
    remark = without_effect(os.environ)
    accelerator = make_accelerator(patience=_PATIENCE)
    if remark is not None and accelerator.is_main_process:
        print(remark, file=sys.stderr, flush=True)
    return load_trained(request, reverse, config, accelerator, stop)


def drawable_config(request: TrainedRequest, reverse: ReverseRequest, *, upsamples: bool = False) -> Config:
    """The run's configuration, with the variance that is asked for; upsamples: it is an upsampler's, in a cascade.

    Raises ConfigError where samples cannot be drawn of it as requested.
    """
    config = RunFolder(request.run, writes=False).load_config()
    if reverse.variance is not None:
        config = _with_variance(config, reverse.variance)
    check_drawable(config.model, upsamples=upsamples)
    with _as_config_errors():
        reverse.conditions.check(config.model)
    return config


def load_trained(
    request: TrainedRequest, reverse: ReverseRequest, config: Config, accelerator: Accelerator, stop: StopRequest
) -> Trained:
    """The weights of a run whose configuration is `drawable_config`, and those of what guides it. Collective.

    Errors as `open_trained`.
    """
    objective = build_objective(config, accelerator.device)
    folder = RunFolder(request.run, writes=False)
    timesteps = _timesteps(objective, reverse.respacing, accelerator)  # before weights are read, which may take long
    path = Checkpoints(folder.checkpoints, accelerator).choose(request.checkpoint)
    network, step = each_its_own(
        f"{path}: cannot be read", lambda: load_network(path, request.weights, config, accelerator.device)
    )
    guide = None
    if reverse.conditions.guide is not None:
        guide = open_guide(reverse.conditions.guide, request.weights, config, objective, accelerator)
    classifier = None
    if reverse.conditions.classifier is not None:
        classifier = open_classifier(reverse.conditions.classifier, request.weights, config, objective, accelerator)
        with _as_config_errors():
            reverse.conditions.check_listed(classifier.classes)
    return Trained(
        config=config,
        folder=folder,
        checkpoint=path,
        fingerprint=(path / COMPLETE_NAME).read_text().strip(),
        step=step,
        weights=request.weights,
        accelerator=accelerator,
        timesteps=timesteps,
        conditioned=ConditionedNetwork(
            objective=objective,
            network=network,
            model=config.model,
            request=reverse,
            device=accelerator.device,
            guide=guide,
            classifier=classifier,
        ),
        stop=stop,
    )


def _timesteps(objective: Objective, respacing: str, accelerator: Accelerator) -> int:
    """T of the whole process; ConfigError where the respacing cannot be. Reports visiting fewer than are asked for."""
    try:
        timesteps, steps = (
            objective.denoiser(nn.Identity(), respacing=visited).diffusion.timesteps for visited in ("all", respacing)
        )
    except ValueError as error:
        raise ConfigError(f"--respacing: {error}") from error
    asked = count_in_spec(timesteps, respacing)
    if steps < asked and accelerator.is_main_process:
        print(
            f"--respacing {respacing}: {steps} steps, for {asked - steps} of {asked} fall on a timestep that "
            "is visited already",
            file=sys.stderr,
        )
    return timesteps


def as_config_error(error: RequestError) -> ConfigError:
    """A request that cannot be, by the name of its option on a command line."""
    return ConfigError(f"--{error.field.replace('_', '-')} {error.value}: {error.reason}", agreed=True)


@contextmanager
def _as_config_errors() -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise as_config_error(error) from error


def _with_variance(config: Config, variance: Literal["small", "large"]) -> Config:
    diffusion = config.diffusion
    if not isinstance(diffusion, DDPMConfig):
        raise ConfigError(f'--variance {variance}: goes with diffusion.kind = "ddpm", not "{diffusion.kind}"')
    if diffusion.variance_is_learned:
        raise ConfigError(
            f"--variance {variance}: the network of this run gives its own variance ({diffusion.variance})"
        )
    return config.model_copy(update={"diffusion": diffusion.model_copy(update={"variance": variance})})
