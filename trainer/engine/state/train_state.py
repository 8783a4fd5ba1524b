"""TrainState: the complete state of a run. What is not part of it does not survive a restart.

Learning rate, epoch, order, flips, t, noise and dropout are not stored: they are functions of the seed and of
`position`, and t, where it is drawn by importance, of the losses that the objective recorded, which are stored.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from trainer.diffusion.contract import MODEL, Objective
from trainer.engine.state.ema import MAIN, Decay
from trainer.engine.state.network_state import NetworkState
from trainer.engine.state.tensor_files import SavedSlice, TensorReader
from trainer.engine.strategies import DistributedNetwork, Strategy
from trainer.engine.strategies.parameter_slices import fill
from trainer.errors import CheckpointError


class Contents(NamedTuple):
    """What a save writes: this rank's `slices`, the `shapes` of all tensors, scalars as plain JSON, and `strategy`."""

    slices: list[SavedSlice]
    shapes: dict[str, torch.Size]
    scalars: dict[str, Any]
    strategy: str


class TrainState:
    """The state of a run, sharded over the ranks by the strategy. Construction is collective.

    `networks` by name, "model" (`main`) first; `position` counts images consumed, `nonfinite_steps` the steps that were
    skipped, in one network or more, as not finite.
    """

    def __init__(
        self,
        strategy: Strategy,
        networks: Mapping[str, DistributedNetwork],
        decays: Mapping[str, Decay],
        objective: Objective,
    ) -> None:
        self.strategy = strategy
        self.objective = objective
        self.networks = {name: NetworkState(name, network, decays) for name, network in networks.items()}
        self.main = self.networks[MODEL]
        self.position = 0
        self.nonfinite_steps = 0

    def contents(self) -> Contents:
        """Content of a checkpoint, and this rank's share of it.

        Names of tensors do not depend on the strategy or the number of ranks: model/<parameter>, ema/<parameter> (and
        ema-<sigma_rel>/), optimizer.exp_avg/<parameter>, optimizer.exp_avg_sq/<parameter>; for any network but the main
        one with its name in front, as in critic.model/<parameter>; no moments of frozen parameters; and what the
        objective recorded, timesteps/<quantity>.
        """
        slices = [piece for network in self.networks.values() for piece in network.saved_slices()]
        if self.strategy.accelerator.is_main_process:
            recorded = self.objective.tensors().items()
            slices += [SavedSlice(name, value.shape, 0, value) for name, value in recorded]
        return Contents(slices, self._tensor_shapes(), self._scalars(), self.strategy.config.strategy)

    def snapshot_contents(self) -> Contents:
        """Content of a snapshot of the averages with power-function profiles, and this rank's share of it."""
        powers = {kind for network in self.networks.values() for kind in network.powers}
        slices, shapes, _, strategy = self.contents()
        return Contents(
            [piece for piece in slices if piece.name.partition("/")[0] in powers],
            {name: shape for name, shape in shapes.items() if name.partition("/")[0] in powers},
            {"position": self.position, "updates": self.main.updates},
            strategy,
        )

    def _scalars(self) -> dict[str, Any]:
        main, *others = self.networks.values()
        scalars = {**main.scalars(), "position": self.position, "nonfinite_steps": self.nonfinite_steps}
        return {**scalars, "networks": {each.name: each.scalars() for each in others}} if others else scalars

    def load(self, saved: TensorReader, scalars: Mapping[str, Any]) -> list[str]:
        """Load a saved state; each rank reads the slices that it holds, whatever number of ranks wrote them.

        After all ranks have loaded, `weights_changed` must be called. An average that the checkpoint lacks is
        initialised from the main one; additional ones are ignored. Returns a line for each of these. Raises
        CheckpointError, and changes nothing, where a tensor is missing, unexpected or of another shape.
        """
        remarks, source = self._check(saved.shapes)
        for name, network in self.networks.items():
            network.load(saved, scalars if network is self.main else scalars["networks"][name], source)
        for name, tensor in self.objective.tensors().items():
            fill(tensor, saved.read(name, 0, tensor.numel()))
        self.position, self.nonfinite_steps = scalars["position"], scalars["nonfinite_steps"]
        return remarks

    def weights_changed(self) -> None:
        """Call after weights were loaded; collective under some strategies."""
        for each in self.networks.values():
            each.network.weights_changed()

    def _tensor_shapes(self) -> dict[str, torch.Size]:
        """Shapes of all tensors of the state, whichever rank holds them."""
        shapes = {name: shape for each in self.networks.values() for name, shape in each.saved_shapes().items()}
        return shapes | {name: value.shape for name, value in self.objective.tensors().items()}

    def _check(self, found: Mapping[str, torch.Size]) -> tuple[list[str], dict[str, str]]:
        """Lines to report, and the averages that the checkpoint lacks, each with the one that is read in its place."""
        remarks, source, left = [], dict[str, str](), set[str]()
        kinds = {name.partition("/")[0] for name in found}
        for network in self.networks.values():
            main = network.qualified(MAIN)
            asked = {network.qualified(name) for name in network.averages.by_name}
            for kind in asked - kinds - {main}:
                source[kind] = main
                remarks.append(f"{kind}: the checkpoint has no such average; it starts as the checkpoint's {main}")
            left |= {kind for kind in kinds if kind.startswith(f"{main}-")} - asked
        remarks += [f"{kind}: train.ema_sigma_rel asks for no such average any more; it ends here" for kind in left]
        unused = {name for network in self.networks.values() for name in network.unused_moments()}
        found = {name: s for name, s in found.items() if name.partition("/")[0] not in left and name not in unused}
        expected = {name: s for name, s in self._tensor_shapes().items() if name.partition("/")[0] not in source}
        if difference := sorted(expected.keys() ^ found.keys()):
            state = "missing" if difference[0] in expected else "not in this run"
            raise CheckpointError(f"{difference[0]}: {state}; the checkpoint is of another run")
        for name, shape in expected.items():
            if shape != found[name]:
                raise CheckpointError(f"{name}: shape {tuple(found[name])}, the network has {tuple(shape)}")
        return remarks, source
