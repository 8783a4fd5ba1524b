"""RUN/nonfinite/step-00000123.json: all that is needed to compute a step again whose loss or gradient was not finite.

Images, flips and noise follow from seed and positions; t and weight are written down, for importance sampling draws
them by losses that go on; dropout's mask follows from the seed and how the batch was divided.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.config import Config
from trainer.data.stream import BatchLayout
from trainer.data.training_data import TrainingData
from trainer.diffusion.noise import KeyedNoise
from trainer.engine.state import TrainState
from trainer.engine.verdict import Verdict
from trainer.errors import DataError


class DumpedSample(BaseModel):
    """One image of the batch: its position in the run, its id in the dataset, its t, the weight of its loss (None
    for 1), and where it lies.
    """

    model_config = ConfigDict(frozen=True)
    position: int
    id: int
    t: int
    weight: float | None = None
    image: str


class NonFiniteDump(BaseModel):
    """A step that was skipped. `loss` and `grad_norm` as Python prints them, "nan" or "inf" among them.

    `updates`: those that had been applied before, so that the weights are known; `micro_batch`, `precision` and
    `device` ("cpu" or "cuda"): how it was computed.
    """

    model_config = ConfigDict(frozen=True)
    step: int
    loss: str
    grad_norm: str
    seed: int
    updates: int
    micro_batch: int
    precision: str
    device: str
    samples: list[DumpedSample]

    @classmethod
    def of_step(
        cls, verdict: Verdict, *, config: Config, layout: BatchLayout, state: TrainState, data: TrainingData
    ) -> Self:
        """The step that the state has just counted and not applied. Waits for the device."""
        positions = np.arange(state.position - layout.global_batch, state.position)
        ids = data.order.ids(positions)
        device = state.strategy.device
        # Nothing has been learned from since, so the same timesteps are drawn again.
        noise = KeyedNoise.training(config.seed, torch.from_numpy(positions).to(device))
        t, weight = state.objective.times.draw(noise)
        weights = weight.tolist() if weight is not None else [None] * len(positions)
        return cls(
            step=state.position // layout.global_batch,
            loss=repr(verdict.loss),
            grad_norm=repr(verdict.grad_norm),
            seed=config.seed,
            updates=state.updates,
            micro_batch=layout.micro_batch,
            precision=config.train.precision,
            device=device.type,
            samples=[
                DumpedSample(position=p, id=i, t=k, weight=w, image=data.dataset.describe(i))
                for p, i, k, w in zip(positions.tolist(), ids.tolist(), t.tolist(), weights)
            ],
        )

    def write(self, path: Path) -> None:
        """To a file, whose folder is made. Raises OSError."""
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.model_dump_json(indent=1))

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file. Raises DataError where it is none, or one that lacks what a replay needs."""
        try:
            return cls.model_validate_json(path.read_text())
        except OSError as fault:
            raise DataError(f"{path}: cannot be read ({fault.strerror})") from fault
        except ValidationError as fault:
            first = fault.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(f"{path}: no dump of a step that can be computed again: {field}: {first['msg']}") from fault
