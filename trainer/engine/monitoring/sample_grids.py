"""Grids of samples of the averaged weights, drawn while training."""

import numpy as np
from einops import rearrange
from torch import nn

from data_prep.progress import WorkProgress
from trainer.config import Config
from trainer.config.backbones import classes_of
from trainer.data.images import Pixels
from trainer.diffusion.contract import Objective
from trainer.engine.monitoring.averaged_network import averaged_network
from trainer.engine.processes.activity import enter
from trainer.engine.processes.division import map_over_ranks
from trainer.engine.state.train_state import TrainState
from trainer.errors import ConfigError
from trainer.sampling.conditioned import check_drawable
from trainer.sampling.conditions import BALANCED, Conditions
from trainer.sampling.request import RequestError, SamplingRequest
from trainer.signals import StopRequest
from trainer.telemetry.pictures import grid, tile

_LARGEST_BATCH = 64


class SampleGrids:
    """Draws `log.samples` images by `log.samples_sampler`, with the same noise every time."""

    def __init__(self, config: Config, state: TrainState, stop: StopRequest) -> None:
        """Errors as `plan_grid` and, where grids are drawn, `check_drawable`."""
        if config.log.samples_every.count:
            check_drawable(config.model)
        self.config = config
        self.state = state
        self.stop = stop
        self.request, self.steps = plan_grid(config, state.objective, state.strategy.accelerator.num_processes)

    def draw(self, step: int) -> Pixels | None:
        """The picture, (H, W, 3); the ranks divide its images. Collective; None after a request to stop."""
        accelerator, shape = self.state.strategy.accelerator, self.config.model.image_shape
        network = averaged_network(self.config, self.state, self.request)
        batches = self.request.batches
        share = batches[accelerator.process_index :: accelerator.num_processes]
        with WorkProgress(
            total=self.steps * sum(map(len, share)),
            what=f"step {step}: samples",
            unit="step",
            visible=accelerator.is_main_process,
        ) as bar:

            def on_step(images: int) -> None:
                enter("sample")
                bar.update(images)
                self.stop.check()

            def draw(numbers: range) -> Pixels:
                enter("sample")
                denoiser = network.denoiser_of(numbers, seed=self.request.seed)
                return self.request.draw(denoiser, numbers, shape=shape, on_step=on_step)

            images, stopped = map_over_ranks(batches, draw, what="the samples: cannot be drawn", stop=self.stop)
        return None if stopped else picture_of(np.concatenate(images), classes_shown(self.config))


def classes_shown(config: Config) -> int | None:
    """Classes that have a row each in a grid: all, where there are as many images; None where there are no rows."""
    classes = classes_of(config.model)
    return classes if classes is not None and classes <= config.log.samples else None


def picture_of(images: Pixels, rows: int | None) -> Pixels:
    """A grid (H, W, 3) of (N, C, H, W) images; with rows, of which N is a multiple, image i is in row i modulo rows."""
    if rows is None:
        return grid(images)
    return tile(rearrange(images, "(j k) c h w -> (k j) c h w", k=rows), columns=len(images) // rows)


def plan_grid(config: Config, objective: Objective, ranks: int) -> tuple[SamplingRequest, int]:
    """What `log` asks for, in batches for so many ranks, and the steps that drawing an image takes (a classifier: 0).

    Of a network that takes labels, classes in turn, as many images of each. Raises ConfigError where the sampler, its
    options, its timesteps or the guidance cannot be.
    """
    log = config.log
    count = log.samples - log.samples % (classes_shown(config) or 1)
    try:
        classes = None if classes_of(config.model) is None else BALANCED
        conditions = Conditions(classes=classes, guidance=log.samples_guidance)
        conditions.check(config.model)
        request = SamplingRequest(
            sampler=log.samples_sampler,
            options={"eta": log.samples_eta} if log.samples_eta else {},
            respacing=log.samples_respacing,
            conditions=conditions,
            count=count,
            seed=config.seed,
            batch=min(-(-count // ranks), _LARGEST_BATCH),
        )
        if config.model.classifies:  # log.samples_every is 0
            return request, 0
        return request, objective.denoiser(nn.Identity(), respacing=request.respacing).diffusion.timesteps
    except RequestError as error:
        raise ConfigError(f"log.samples_{error.field} = {error.value!r}: {error.reason}") from error
    except ValueError as error:
        raise ConfigError(f"log.samples_{error}") from error
