"""Distance between samples drawn during training and real images, in the features of a small installed network."""

import time
from functools import partial

import numpy as np
import torch

from trainer.config import Config
from trainer.data.orders.order import sample_ids
from trainer.data.training_data import TrainingData
from trainer.diffusion.ddpm.respacing import respaced
from trainer.diffusion.ddpm.samplers import ddim
from trainer.engine.build import build_trained
from trainer.engine.monitoring.validation import read_images
from trainer.engine.processes.collectives import each_its_own, gather
from trainer.engine.processes.watchdog import enter
from trainer.engine.sampling import batches_of, sample
from trainer.engine.state.train_state import TrainState
from trainer.errors import DataError
from trainer.features.kernel_distance import squared_mmd
from trainer.features.networks import EfficientNetLite0, extract
from trainer.signals import StopRequest

_BATCH = 32  # the same for all numbers of ranks: a network's rounding may depend on the batch size


class FeatureDistance:
    """The kernel distance between `log.distance_samples` samples of the averaged weights and as many real images.

    The real images are held-out ones, or training images where none are held out; the same ones every time. Samples are
    a function of the seed and their index. Every rank draws a batch at a time, until the ranks agree that another batch
    would exceed `log.distance_seconds`. The estimator is unbiased, so fewer samples increase its variance only; the
    Fréchet distance would be biased upwards.
    """

    def __init__(self, config: Config, data: TrainingData, state: TrainState, stop: StopRequest) -> None:
        """Raises ConfigError where the network's packages are missing."""
        self.config = config
        self.data = data
        self.state = state
        self.stop = stop
        self.network = EfficientNetLite0(state.strategy.device)
        timesteps = config.diffusion.timesteps
        self.steps = respaced(timesteps, str(min(config.log.distance_steps, timesteps)))  # of the respaced sampler
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
            "validation/feature_distance": squared_mmd(drawn, self.real),
            "validation/feature_distance_samples": float(len(drawn)),
        }

    def _sample_features(self) -> torch.Tensor | None:
        """(N, D), on every rank; None after a request to stop."""
        strategy, model = self.state.strategy, self.config.model
        started = time.monotonic()
        network = build_trained(self.config, self.state.main.average(), strategy.device)
        reverse = self.state.objective.reverse(network).respaced(self.steps)
        ranks, rank = strategy.accelerator.num_processes, strategy.accelerator.process_index
        batches = batches_of(self.config.log.distance_samples, _BATCH)
        parts: list[torch.Tensor] = []
        longest = 0.0  # seconds for the slowest batch so far
        for first in range(0, len(batches), ranks):
            begun = time.monotonic()
            drawn = sample(
                reverse,
                partial(ddim, eta=0.0),
                shape=(model.channels, model.image_size, model.image_size),
                device=strategy.device,
                batches=batches[first : first + ranks][rank : rank + 1],
                seed=self.config.seed,
                on_step=lambda _: enter("validate"),
                stop=self.stop,
            )
            own = [self._features(torch.from_numpy(pixels)) for _, pixels in drawn]
            now = time.monotonic()
            shares = gather((own, now - begun, now - started, bool(self.stop)))
            if any(stopped for *_, stopped in shares):
                return None
            parts += [features for of_rank, *_ in shares for features in of_rank]
            longest = max(longest, *(seconds for _, seconds, *_ in shares))
            if max(spent for _, _, spent, _ in shares) + longest > self.config.log.distance_seconds:
                break
        return torch.cat(parts)

    def _real_features(self) -> torch.Tensor | None:
        """(N, D), on every rank; computed once and cached. None after a request to stop."""
        accelerator = self.state.strategy.accelerator
        held_out = self.data.held_out
        everything = held_out if len(held_out) else np.arange(len(self.data.dataset))
        count = min(self.config.log.distance_samples, len(everything))
        ids = everything[sample_ids(np.arange(count), len(everything), seed=0)]
        share = batches_of(count, _BATCH)[accelerator.process_index :: accelerator.num_processes]

        def read() -> list[tuple[int, torch.Tensor]]:
            parts = []
            for numbers in share:
                if self.stop:
                    break
                enter("validate")
                pixels, _ = read_images(self.config, self.data.dataset, ids[numbers.start : numbers.stop])
                parts.append((numbers.start, self._features(pixels)))
            return parts

        own = each_its_own("the images to measure a distance to: cannot be read", read, kind=DataError)
        shares = gather((bool(self.stop), own))
        if any(stopped for stopped, _ in shares):
            return None
        parts = sorted((part for _, of_rank in shares for part in of_rank), key=lambda part: part[0])
        real = torch.cat([features for _, features in parts])
        if len(real) < 2:
            raise DataError("log.distance_every: needs two whole real images at least", agreed=True)
        return real

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, D) float32 features of (B, C, H, W) uint8 pixels, on the host, for collectives of Python objects."""
        if not len(pixels):
            return torch.empty(0, self.network.convention.dimensions)
        return extract(self.network, pixels.to(self.state.strategy.device))[0].cpu()
