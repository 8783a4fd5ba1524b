"""One network's part of the state of a run: weights, moments, averages, and how many updates made them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from trainer.diffusion.contract import MODEL
from trainer.engine.state.ema import MAIN, Averages, Decay
from trainer.engine.state.tensor_files import SavedSlice, TensorReader
from trainer.engine.strategies import DistributedNetwork
from trainer.engine.strategies.optimizer import MOMENTS
from trainer.engine.strategies.parameter_slices import ParameterSlice, assemble, fill, owned
from trainer.errors import CheckpointError
from trainer.telemetry.meters import Meters


class _Group(NamedTuple):
    """One tensor per parameter: `kind` is the prefix of its name in checkpoints; `values` has one entry per slice."""

    kind: str
    slices: list[ParameterSlice]
    values: list[torch.Tensor]


class NetworkState:
    """A network by name, sharded over the ranks by the strategy. Construction is collective.

    `updates` counts the steps applied. `meters` accumulate until the next log line, and are saved so that a restart
    does not change that line.
    """

    def __init__(self, name: str, network: DistributedNetwork, decays: Mapping[str, Decay]) -> None:
        self.name = name
        self.network = network
        self.owned = owned(network.slices)
        self.averages = Averages(self.owned, dict(decays))
        self.shapes = network.shapes  # of all parameters, including those of which this rank has no slice
        self.updates = 0
        self.meters = Meters()

    def qualified(self, name: str) -> str:
        """A kind of tensors or a parameter among those of all networks: "ema", "critic.ema" of one named "critic"."""
        return name if self.name == MODEL else f"{self.name}.{name}"

    @property
    def learning_rate(self) -> float:
        """That of the last step."""
        rate: float = self.network.optimizer.param_groups[0]["lr"]
        return rate

    def updated(self) -> None:
        """Call when an update has been applied: the averages follow the weights."""
        self.updates += 1
        self.averages.update(self.updates)

    @property
    def powers(self) -> set[str]:
        """Kinds of the averages with power-function profiles."""
        return {self.qualified(name) for name in self.averages.by_name if name != MAIN}

    def saved_slices(self) -> list[SavedSlice]:
        """This rank's share of what a checkpoint holds of the network."""
        mine = {(piece.name, piece.start) for piece in self.owned}
        return [
            SavedSlice(f"{kind}/{piece.name}", piece.shape, piece.start, tensor)
            for kind, pieces, values in self._groups()
            for piece, tensor in zip(pieces, values, strict=True)
            if (piece.name, piece.start) in mine
        ]

    def saved_shapes(self) -> dict[str, torch.Size]:
        """Shapes of all tensors that a checkpoint holds of the network, whichever rank has them."""
        moments = {f"optimizer.{moment}": self.network.trained for moment in MOMENTS}
        names = {"model": self.shapes.keys(), **moments, **dict.fromkeys(self.averages.by_name, self.shapes.keys())}
        return {
            f"{self.qualified(kind)}/{name}": shape
            for kind, known in names.items()
            for name, shape in self.shapes.items()
            if name in known
        }

    def unused_moments(self) -> set[str]:
        """Names of moments of frozen parameters: imported weights come with them, whatever is frozen later."""
        frozen = self.shapes.keys() - self.network.trained
        return {f"{self.qualified(f'optimizer.{moment}')}/{name}" for moment in MOMENTS for name in frozen}

    def scalars(self) -> dict[str, Any]:
        """What a checkpoint holds of the network besides tensors, as plain JSON."""
        scaler = self.network.scaler
        return {
            "updates": self.updates,
            "meters": self.meters.state(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    @torch.no_grad()
    def load(self, saved: TensorReader, scalars: Mapping[str, Any], source: Mapping[str, str]) -> None:
        """Read the slices that this rank holds; kinds that are in `source` are read from the kind that it says."""
        for kind, slices, values in self._groups():
            for piece, tensor in zip(slices, values, strict=True):
                fill(tensor, saved.read(f"{source.get(kind, kind)}/{piece.name}", piece.start, piece.stop))
        self.updates = scalars["updates"]
        self.network.optimizer.set_updates(self.updates)
        self.meters = Meters.from_state(scalars.get("meters", {}))
        if self.network.scaler is not None and scalars["scaler"]:
            self.network.scaler.load_state_dict(scalars["scaler"])

    @torch.no_grad()
    def start_from(self, saved: TensorReader, kind: str) -> None:
        """Set the weights and every average of a run at step 0 from the tensors `kind`/<parameter>, those that this
        rank holds. `network.weights_changed` must be called afterwards.

        Raises CheckpointError where a tensor is missing, of no layer, of another shape, not floating point or not
        finite.
        """
        found = {n.removeprefix(f"{kind}/"): shape for n, shape in saved.shapes.items() if n.startswith(f"{kind}/")}
        for name in found | self.shapes:
            if name not in found:
                raise CheckpointError(f"{kind}/{name}: missing; the network {self.name!r} has it")
            if name not in self.shapes:
                raise CheckpointError(f"{kind}/{name}: of no layer of the network {self.name!r}")
            if found[name] != self.shapes[name]:
                theirs, ours = tuple(found[name]), tuple(self.shapes[name])
                raise CheckpointError(f"{kind}/{name}: shape {theirs}, the network {self.name!r} has {ours}")
        for piece, tensor in self._weights_and_averages():
            values = saved.read(f"{kind}/{piece.name}", piece.start, piece.stop)
            if not values.is_floating_point() or not bool(values.float().isfinite().all()):
                raise CheckpointError(f"{kind}/{piece.name}: holds what is no finite floating point number")
            fill(tensor, values)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the weights and every average of a run at step 0 from a state dict."""
        for piece, tensor in self._weights_and_averages():
            fill(tensor, weights[piece.name].reshape(-1)[piece.start : piece.stop])

    def weights(self) -> dict[str, torch.Tensor]:
        """The raw weights as a complete state dict, float32, on every rank's device. Collective."""
        return self._whole([piece.weight for piece in self.owned])

    def average(self, name: str = MAIN) -> dict[str, torch.Tensor]:
        """An average as a complete state dict, float32, on every rank's device. Collective."""
        return self._whole(self.averages.by_name[name].values)

    def _whole(self, values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        device = next(self.network.module.parameters()).device
        return assemble(self.shapes, zip(self.owned, values, strict=True), device)

    def _groups(self) -> Iterator[_Group]:
        slices, state = self.network.slices, self.network.optimizer.state
        yield _Group(self.qualified("model"), slices, [piece.weight for piece in slices])
        trained = [piece for piece in slices if piece.name in self.network.trained]
        for moment in MOMENTS:
            values = [piece.of(state[piece.storage][moment]) for piece in trained]
            yield _Group(self.qualified(f"optimizer.{moment}"), trained, values)
        for name, average in self.averages.by_name.items():
            yield _Group(self.qualified(name), self.owned, average.values)

    def _weights_and_averages(self) -> Iterator[tuple[ParameterSlice, torch.Tensor]]:
        for kind, slices, values in self._groups():
            if not kind.startswith(self.qualified("optimizer.")):
                yield from zip(slices, values, strict=True)
