"""Distance between samples drawn during training and real images, in the features of a small installed network."""

import time

import numpy as np
import torch

from trainer.config import Config
from trainer.data.images import read_images
from trainer.data.orders.order import sample_ids
from trainer.data.training_data import TrainingData
from trainer.engine.monitoring.averaged_network import averaged_network
from trainer.engine.processes.activity import enter
from trainer.engine.processes.division import map_over_ranks
from trainer.engine.state.train_state import TrainState
from trainer.errors import DataError
from trainer.features.kernel_distance import squared_mmd
from trainer.features.networks import EfficientNetLite0, extract
from trainer.sampling.conditioned import check_drawable
from trainer.sampling.request import SamplingRequest, batches_of
from trainer.signals import StopRequest

_BATCH = 32  # the same for all numbers of ranks: a network's rounding may depend on the batch size


class FeatureDistance:
    """The kernel distance between `log.distance_samples` samples of the averaged weights and as many real images.

    The real images are held-out ones, or training images where none are held out; the same ones every time. Samples are
    a function of the seed and their index. Every rank draws a batch at a time, until the ranks agree that another batch
    would exceed `log.distance_seconds`. The estimator is unbiased, so fewer samples increase its variance only; the
    Fréchet distance would be biased upwards.
    """

    metric = "validation/feature_distance"

    def __init__(self, config: Config, data: TrainingData, state: TrainState, stop: StopRequest) -> None:
        """Raises ConfigError where the packages of the features' network are missing, and as `check_drawable`."""
        check_drawable(config.model)
        self.config = config
        self.data = data
        self.state = state
        self.stop = stop
        self.network = EfficientNetLite0(state.strategy.device)
        timesteps = state.objective.denoiser(torch.nn.Identity()).diffusion.timesteps
        self.request = SamplingRequest(
            sampler="ddim",
            respacing=str(min(config.log.distance_steps, timesteps)),
            count=config.log.distance_samples,
            seed=config.seed,
            batch=_BATCH,
        )
        self.real: torch.Tensor | None = None  # features, computed when first needed

    def measure(self) -> dict[str, float] | None:
        """validation/feature_distance and validation/feature_distance_samples, the number of samples used.

        Collective; the same on all ranks. None after a request to stop, which is checked between two calls of a
        network. Raises DataError on all of them where a real image cannot be read.
        """
        if self.real is None:
            self.real = self._real_features()
        drawn = self._sample_features() if self.real is not None else None
        if self.real is None or drawn is None:
            return None
        return {
            self.metric: squared_mmd(drawn, self.real),
            "validation/feature_distance_samples": float(len(drawn)),
        }

    def summary(self, values: dict[str, float]) -> str:
        """What `measure` found, for people."""
        return (
            f"kernel distance of EfficientNet-Lite0 features {values[self.metric]:.5f}, "
            f"{values['validation/feature_distance_samples']:.0f} samples of {self.config.log.distance_samples}"
        )

    def _sample_features(self) -> torch.Tensor | None:
        """(N, D), on every rank; None after a request to stop."""
        strategy, shape = self.state.strategy, self.config.model.image_shape
        network = averaged_network(self.config, self.state, self.request)
        started = time.monotonic()

        def on_step(_: int) -> None:
            enter("validate")
            self.stop.check()

        def draw(numbers: range) -> tuple[torch.Tensor, float, float]:
            """Features of the samples, the seconds that they took, and those since the start."""
            begun = time.monotonic()
            denoiser = network.denoiser_of(numbers, seed=self.request.seed)
            pixels = self.request.draw(denoiser, numbers, shape=shape, on_step=on_step)
            features = self._features(torch.from_numpy(pixels))
            now = time.monotonic()
            return features, now - begun, now - started

        ranks, batches = strategy.accelerator.num_processes, self.request.batches
        parts: list[torch.Tensor] = []
        longest = 0.0  # seconds for the slowest batch so far
        for first in range(0, len(batches), ranks):
            drawn, stopped = map_over_ranks(
                batches[first : first + ranks], draw, what="the samples: cannot be drawn", stop=self.stop
            )
            if stopped:
                return None
            features, seconds, spent = zip(*drawn, strict=True)
            parts += features
            longest = max(longest, *seconds)
            if max(spent) + longest > self.config.log.distance_seconds:
                break
        return torch.cat(parts)

    def _real_features(self) -> torch.Tensor | None:
        """(N, D), on every rank; computed once and cached. None after a request to stop."""
        held_out = self.data.held_out
        everything = held_out if len(held_out) else np.arange(len(self.data.dataset))
        count = min(self.config.log.distance_samples, len(everything))
        ids = everything[sample_ids(np.arange(count), len(everything), seed=0)]

        def read(numbers: range) -> torch.Tensor:
            enter("validate")
            wanted, skip = ids[numbers.start : numbers.stop], self.config.data.on_bad_sample == "skip"
            pixels, *_ = read_images(self.data.dataset, wanted.tolist(), skip_damaged=skip)
            return self._features(pixels)

        what = "the images to measure a distance to: cannot be read"
        parts, stopped = map_over_ranks(batches_of(count, _BATCH), read, what=what, kind=DataError, stop=self.stop)
        if stopped:
            return None
        real = torch.cat(parts)
        if len(real) < 2:
            raise DataError("log.distance_every: needs two whole real images at least", agreed=True)
        return real

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, D) float32 features of (B, C, H, W) uint8 pixels, on the host, for collectives of Python objects."""
        if not len(pixels):
            return torch.empty(0, self.network.convention.dimensions)
        return extract(self.network, pixels.to(self.state.strategy.device))["features"].cpu()
