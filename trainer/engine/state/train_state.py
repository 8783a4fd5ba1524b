"""TrainState: the complete state of a run. What is not part of it does not survive a restart.

Learning rate, epoch, order, flips, t, noise and dropout are not stored: they are functions of the seed and of
`position`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from trainer.diffusion.contract import Objective
from trainer.engine.state.ema import MAIN, Averages, Decay
from trainer.engine.state.tensor_files import SavedSlice, TensorReader
from trainer.engine.strategies import Strategy
from trainer.engine.strategies.optimizer import MOMENTS
from trainer.engine.strategies.parameter_slices import ParameterSlice, assemble, fill, owned, row_by_row
from trainer.errors import CheckpointError
from trainer.telemetry.meters import Meters


class Contents(NamedTuple):
    """What a save writes: this rank's `slices`, the `shapes` of all tensors, scalars as plain JSON, and `strategy`."""

    slices: list[SavedSlice]
    shapes: dict[str, torch.Size]
    scalars: dict[str, Any]
    strategy: str


class _Group(NamedTuple):
    """One tensor per parameter: `kind` is the prefix of its name in checkpoints; `values` has one entry per slice."""

    kind: str
    slices: list[ParameterSlice]
    values: list[torch.Tensor]


class TrainState:
    """The state of a run, sharded over the ranks by the strategy. Construction is collective.

    `position` counts images consumed, `updates` the steps applied, `nonfinite_steps` those skipped as not finite.
    `meters` accumulate until the next log line, and are saved so that a restart does not change that line.
    """

    def __init__(self, strategy: Strategy, decays: Mapping[str, Decay], objective: Objective) -> None:
        self.strategy = strategy
        self.objective = objective
        self.owned = owned(strategy.slices)
        self.averages = Averages(self.owned, dict(decays))
        self.shapes = strategy.shapes  # of all parameters, including those of which this rank has no slice
        self.position = 0
        self.updates = 0
        self.nonfinite_steps = 0
        self.meters = Meters()

    def contents(self) -> Contents:
        """Content of a checkpoint, and this rank's share of it.

        Names of tensors do not depend on the strategy or the number of ranks: model/<parameter>, ema/<parameter> (and
        ema-<sigma_rel>/), optimizer.exp_avg/<parameter>, optimizer.exp_avg_sq/<parameter>, and what the objective
        recorded, timesteps/<quantity>.
        """
        mine = {(piece.name, piece.start) for piece in self.owned}
        slices = [
            SavedSlice(f"{kind}/{piece.name}", piece.shape, piece.start, tensor)
            for kind, pieces, values in self._groups()
            for piece, tensor in zip(pieces, values, strict=True)
            if (piece.name, piece.start) in mine
        ]
        if self.strategy.accelerator.is_main_process:
            recorded = self.objective.tensors().items()
            slices += [SavedSlice(name, value.shape, 0, value) for name, value in recorded]
        return Contents(slices, self._tensor_shapes(), self._scalars(), self._strategy)

    def snapshot_contents(self) -> Contents:
        """Content of a snapshot of the averages with power-function profiles, and this rank's share of it."""
        averages = {name: average for name, average in self.averages.by_name.items() if name != MAIN}
        shapes = {f"{average}/{name}": shape for average in averages for name, shape in self.shapes.items()}
        slices = [
            SavedSlice(f"{name}/{piece.name}", piece.shape, piece.start, tensor)
            for name, average in averages.items()
            for piece, tensor in zip(self.owned, average.values, strict=True)
        ]
        return Contents(slices, shapes, {"position": self.position, "updates": self.updates}, self._strategy)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the weights and every average of a run at step 0 from a state dict."""
        for kind, slices, values in self._groups():
            if not kind.startswith("optimizer."):
                for piece, tensor in zip(slices, values, strict=True):
                    fill(tensor, row_by_row(weights[piece.name])[piece.start : piece.stop])

    def weights(self) -> dict[str, torch.Tensor]:
        """The raw weights as a complete state dict, float32, on every rank's device. Collective."""
        return assemble(self.shapes, [(piece, piece.weight) for piece in self.owned], self.strategy.device)

    def average(self, name: str = MAIN) -> dict[str, torch.Tensor]:
        """An average as a complete state dict, float32, on every rank's device. Collective."""
        parts = zip(self.owned, self.averages.by_name[name].values, strict=True)
        return assemble(self.shapes, parts, self.strategy.device)

    def _scalars(self) -> dict[str, Any]:
        scaler = self.strategy.scaler
        return {
            "position": self.position,
            "updates": self.updates,
            "nonfinite_steps": self.nonfinite_steps,
            "meters": self.meters.state(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    @torch.no_grad()
    def load(self, saved: TensorReader, scalars: Mapping[str, Any]) -> list[str]:
        """Load a saved state; each rank reads the slices that it holds, whatever number of ranks wrote them.

        After all ranks have loaded, `strategy.weights_changed` must be called. An average that the checkpoint lacks is
        initialised from the main one; additional ones are ignored. Returns a line for each of these. Raises
        CheckpointError, and changes nothing, where a tensor is missing, unexpected or of another shape.
        """
        remarks, source = self._check(saved.shapes)
        for kind, slices, values in self._groups():
            for piece, tensor in zip(slices, values, strict=True):
                fill(tensor, saved.read(f"{source.get(kind, kind)}/{piece.name}", piece.start, piece.stop))
        for name, tensor in self.objective.tensors().items():
            fill(tensor, saved.read(name, 0, tensor.numel()))
        self.strategy.optimizer.set_updates(scalars["updates"])
        if self.strategy.scaler is not None and scalars["scaler"]:
            self.strategy.scaler.load_state_dict(scalars["scaler"])
        for name in ("position", "updates", "nonfinite_steps"):
            setattr(self, name, scalars[name])
        self.meters = Meters.from_state(scalars.get("meters", {}))
        return remarks

    @property
    def _strategy(self) -> str:
        return self.strategy.config.strategy

    def _tensor_shapes(self) -> dict[str, torch.Size]:
        """Shapes of all tensors of the state, whichever rank holds them."""
        kinds = ["model", *(f"optimizer.{moment}" for moment in MOMENTS), *self.averages.by_name]
        shapes = {f"{kind}/{name}": shape for kind in kinds for name, shape in self.shapes.items()}
        return shapes | {name: value.shape for name, value in self.objective.tensors().items()}

    def _groups(self) -> Iterator[_Group]:
        slices, state = self.strategy.slices, self.strategy.optimizer.state
        yield _Group("model", slices, [piece.weight for piece in slices])
        for moment in MOMENTS:
            values = [piece.of(state[piece.storage][moment]) for piece in slices]
            yield _Group(f"optimizer.{moment}", slices, values)
        for name, average in self.averages.by_name.items():
            yield _Group(name, self.owned, average.values)

    def _check(self, found: Mapping[str, torch.Size]) -> tuple[list[str], dict[str, str]]:
        """Returns remarks, and for each kind that is read from another kind, that kind."""
        remarks, source = [], {}
        kinds = {name.partition("/")[0] for name in found}
        for name in self.averages.by_name.keys() - kinds - {MAIN}:
            source[name] = MAIN
            remarks.append(f"{name}: the checkpoint has no such average; it starts as the checkpoint's {MAIN}")
        left = {kind for kind in kinds if kind.startswith(f"{MAIN}-")} - self.averages.by_name.keys()
        remarks += [f"{kind}: train.ema_sigma_rel asks for no such average any more; it ends here" for kind in left]
        found = {name: shape for name, shape in found.items() if name.partition("/")[0] not in left}
        expected = {name: s for name, s in self._tensor_shapes().items() if name.partition("/")[0] not in source}
        if difference := sorted(expected.keys() ^ found.keys()):
            state = "missing" if difference[0] in expected else "not in this run"
            raise CheckpointError(f"{difference[0]}: {state}; the checkpoint is of another run")
        for name, shape in expected.items():
            if shape != found[name]:
                raise CheckpointError(f"{name}: shape {tuple(found[name])}, the network has {tuple(shape)}")
        return remarks, source
