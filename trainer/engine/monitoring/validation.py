"""The loss on held-out images, with the same noise every time: differences are due to the network alone."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trainer.config import Config
from trainer.data.images import from_uint8, read_images
from trainer.data.orders.order import sample_ids
from trainer.data.stream.batches import as_tensors, stacked
from trainer.data.training_data import TrainingData
from trainer.diffusion.contract import Batch
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.diffusion.low_res import low_res_conditioning
from trainer.engine.build import build_trained
from trainer.engine.processes.activity import enter
from trainer.engine.processes.division import map_over_ranks
from trainer.engine.state.train_state import TrainState
from trainer.engine.step.train_step import conditioning
from trainer.errors import DataError
from trainer.sampling.request import batches_of
from trainer.signals import StopRequest
from trainer.telemetry.meters import quartile_of

_BATCH = 16  # the same for all numbers of ranks: a network's rounding may depend on the batch size


class Scores(NamedTuple):
    """Of some images, in their order: quartiles of the noise levels; by name the loss and the figures of the family;
    labels where they have any.
    """

    quartiles: list[int]
    values: dict[str, list[float]]
    labels: list[int]


class Validation:
    """Validates a state on `log.validate_images` of the held-out images, or all where there are fewer.

    t and eps of each image are functions of the seed and the image's id, so they do not depend on step, ranks or batch.
    """

    metric = "validation/loss"

    def __init__(self, config: Config, data: TrainingData, state: TrainState, stop: StopRequest) -> None:
        self.config = config
        self.dataset = data.dataset
        self.state = state
        self.objective = state.objective
        self.stop = stop
        count = min(config.log.validate_images, len(data.held_out))
        # A random subset, so that it represents the held-out images; independent of the seed.
        self.ids = data.held_out[sample_ids(np.arange(count), len(data.held_out), seed=0)] if count else data.held_out

    def measure(self) -> dict[str, float] | None:
        """validation/loss of the raw weights and validation/ema_loss of the averaged ones: unweighted means over the
        images; for both also ..._q1 to ..._q4: means over the images whose t is in each quarter of the noise levels,
        and, where images have labels, ..._class_0, ...: means over the images of each class. The same of every figure
        of the family (`Losses.figures`): validation/accuracy, validation/ema_accuracy, ...

        Collective; the same on all ranks. None after a request to stop, which is checked between batches. Raises
        DataError on all of them where an image cannot be read.
        """
        batches = batches_of(len(self.ids), _BATCH)
        values: dict[str, float] = {}
        for prefix, whole in (("", self.state.main.weights), ("ema_", self.state.main.average)):
            network = build_trained(self.config, whole(), self.state.strategy.device)

            def score(numbers: range, network: torch.nn.Module = network) -> Scores:
                enter("validate")
                return self._score(network, self.ids[numbers.start : numbers.stop])

            what = "the held-out images: cannot be read"
            parts, stopped = map_over_ranks(batches, score, what=what, kind=DataError, stop=self.stop)
            if stopped:
                return None
            values |= self._means(prefix, parts)
        return values

    def summary(self, values: dict[str, float]) -> str:
        """What `measure` found, for people."""
        found = (
            f"{name} {values[f'validation/{name}']:.4f}, of the average {values[f'validation/ema_{name}']:.4f}"
            for name in ("loss", "accuracy")
            if f"validation/{name}" in values
        )
        return f"on {len(self.ids)} held-out images {'; '.join(found)}"

    @torch.no_grad()
    def _score(self, network: torch.nn.Module, ids: npt.NDArray[np.int64]) -> Scores:
        """Of the images with these ids, (B,); damaged ones are left out with on_bad_sample = "skip"."""
        skip = self.config.data.on_bad_sample == "skip"
        pixels, further, kept = read_images(self.dataset, ids.tolist(), skip_damaged=skip)
        if not kept:
            return Scores([], {}, [])
        device = self.state.strategy.device
        cond = conditioning(as_tensors(stacked(further)), self.config, device)
        x, position = from_uint8(pixels.to(device)), torch.tensor(kept, device=device)
        noise = KeyedNoise.validation(self.config.seed, position)
        cond |= low_res_conditioning(self.config.model, x, cond, noise)
        batch = Batch(x=x, position=position, cond=cond)
        losses = self.objective.training_losses(network, batch, noise, times=self.objective.validation_times)
        labels = cond["label"].tolist() if "label" in cond else []
        values = {name: value.tolist() for name, value in {"loss": losses.loss, **losses.figures}.items()}
        return Scores(quartile_of(losses.level).tolist(), values, labels)

    def _means(self, prefix: str, parts: list[Scores]) -> dict[str, float]:
        """Means, summed in float64 in the order of the images, independent of their distribution over ranks."""
        scored = [part for part in parts if part.quartiles]
        if not scored:
            raise DataError("the held-out images: all are damaged, none is left to validate on", agreed=True)
        quartile = np.array([quarter for part in scored for quarter in part.quartiles], dtype=np.int64)
        label = np.array([label for part in scored for label in part.labels], dtype=np.int64)
        values: dict[str, float] = {}
        for each in scored[0].values:
            name = f"validation/{prefix}{each}"
            of_images = np.array([value for part in scored for value in part.values[each]], dtype=np.float64)
            values[name] = float(of_images.mean())
            for number in np.unique(quartile).tolist():
                values[f"{name}_q{number + 1}"] = float(of_images[quartile == number].mean())
            for number in np.unique(label).tolist():
                values[f"{name}_class_{number}"] = float(of_images[label == number].mean())
        return values
