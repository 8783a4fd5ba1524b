"""RUN/nonfinite/step-00000123.json: the inputs of a step whose loss or gradient was not finite, for `replay.py`.

Images, flips and noise are functions of seed and position. t and weight are recorded as the objective drew them, which
may depend on earlier losses. Dropout masks are functions of the seed and of the micro-batches.
"""

from pathlib import Path
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.data.training_data import TrainingData
from trainer.diffusion.contract import MODEL
from trainer.engine.processes.collectives import gather
from trainer.engine.state.train_state import TrainState
from trainer.engine.step.step_report import NetworkVerdict
from trainer.errors import DataError


class DumpedSample(BaseModel):
    """One image of the batch: position in the run, id in the dataset, t, loss weight (None for 1), and location."""

    model_config = ConfigDict(frozen=True)
    position: int
    id: int
    t: int | float
    weight: float | None = None
    image: str


class NonFiniteDump(BaseModel):
    """A skipped step. `loss` and `grad_norm` as Python's `str` of a float, so "nan" and "inf" are possible.

    `network`: the first that was not updated; `updates`: optimizer steps applied to it before, which identifies the
    weights; `micro_batch`, `precision` and `device` ("cpu" or "cuda"): how it was computed.
    """

    model_config = ConfigDict(frozen=True)
    step: int
    loss: str
    grad_norm: str
    seed: int
    network: str = MODEL
    updates: int
    micro_batch: int
    precision: str
    device: str
    samples: list[DumpedSample]

    @classmethod
    def of_step(
        cls, verdict: NetworkVerdict, *, config: Config, layout: BatchLayout, state: TrainState, data: TrainingData
    ) -> Self:
        """The step that the state counted last, which was not applied. Collective; synchronises with the device."""
        positions = np.arange(state.position - layout.global_batch, state.position)
        ids = data.order.ids(positions)
        own_t, own_weight = verdict.losses.t.tolist(), verdict.losses.weight
        own_weights = own_weight.tolist() if own_weight is not None else [None] * len(own_t)
        # The ranks' images are contiguous in position, in the order of the ranks.
        drawn = [pair for of_rank in gather(list(zip(own_t, own_weights, strict=True))) for pair in of_rank]
        return cls(
            step=state.position // layout.global_batch,
            loss=repr(verdict.loss),
            grad_norm=repr(verdict.grad_norm),
            seed=config.seed,
            network=verdict.network,
            updates=state.networks[verdict.network].updates,
            micro_batch=layout.micro_batch,
            precision=config.train.precision,
            device=state.strategy.device.type,
            samples=[
                DumpedSample(position=p, id=i, t=t, weight=weight, image=data.dataset.describe(i))
                for p, i, (t, weight) in zip(positions.tolist(), ids.tolist(), drawn, strict=True)
            ],
        )

    def write(self, path: Path) -> None:
        """Write to a file, creating its folder. Raises OSError."""
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.model_dump_json(indent=1))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read from a file. Raises DataError where it is missing, is no dump, or lacks fields that a replay needs."""
        try:
            return cls.model_validate_json(path.read_text())
        except OSError as fault:
            raise DataError(f"{path}: cannot be read ({fault.strerror})") from fault
        except ValidationError as fault:
            first = fault.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(f"{path}: no dump of a step that can be computed again: {field}: {first['msg']}") from fault
