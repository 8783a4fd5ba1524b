"""TrainState: everything that a run is. What is not in it does not survive a restart, so nothing else may matter.

Learning rate, epoch, order, flips, t, noise and dropout are no part of it: they are functions of the seed and of
`position`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ema_pytorch import EMA
from torch import nn

from trainer.engine.timesteps import Timesteps
from trainer.errors import CheckpointError


def make_ema(model: nn.Module, decay: float) -> EMA:
    """An average that starts from the initial weights and moves by (1 - decay) every step, without exception.

    ema-pytorch's own schedule (start after 100 steps, then every 10, warm up) is switched off. Its step counter stays
    on the CPU, where reading it does not wait for a device.
    """
    ema = EMA(
        model,
        beta=decay,
        min_value=decay,
        update_every=1,
        update_after_step=0,
        include_online_model=False,
        use_foreach=True,
    )
    ema.update()  # the first call copies the weights
    ema.ema_model.requires_grad_(False)
    ema.ema_model.eval()
    return ema


@dataclass
class TrainState:
    """`position` counts images consumed; `nonfinite_steps` the steps that were skipped by the guard.

    `unlogged_steps` and their summed `unlogged_loss` wait for the next log line, which a restart must not change.
    """

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    timesteps: Timesteps
    position: int = 0
    nonfinite_steps: int = 0
    unlogged_steps: int = 0
    unlogged_loss: float = 0.0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state under a name that says what it is, whatever the number of ranks.

        model/<parameter>, ema/<parameter>, optimizer.<quantity>/<parameter>, as in "optimizer.exp_avg/conv_in.weight";
        timesteps/<quantity>.
        """
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.ema_model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for quantity, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{quantity}/{name}"] = value
        return tensors | {f"timesteps/{name}": value for name, value in self.timesteps.tensors().items()}

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, as plain JSON."""
        return {
            "position": self.position,
            "nonfinite_steps": self.nonfinite_steps,
            "unlogged_steps": self.unlogged_steps,
            "unlogged_loss": self.unlogged_loss,
            "ema_updates": int(self.ema.step),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def load(self, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> None:
        """Become the saved state.

        Raises CheckpointError, and changes nothing, where a tensor is missing, left over or of another shape.
        """
        groups = _group(tensors)
        _check("model", self.model.state_dict(), groups.get("model", {}))
        _check("ema", self.ema.ema_model.state_dict(), groups.get("ema", {}))
        _check("timesteps", self.timesteps.tensors(), groups.get("timesteps", {}))
        quantities = {kind.removeprefix("optimizer."): group for kind, group in groups.items() if "." in kind}
        for quantity, group in quantities.items():  # none before the first step, or one for every parameter
            if difference := sorted(dict(self.model.named_parameters()).keys() ^ group.keys()):
                raise CheckpointError(f"optimizer.{quantity}/{difference[0]}: missing, or of no parameter")
        self.model.load_state_dict(groups["model"])
        self.ema.ema_model.load_state_dict(groups["ema"])
        self.ema.step.fill_(scalars["ema_updates"])
        for name, tensor in self.timesteps.tensors().items():
            tensor.copy_(groups["timesteps"][name])
        per_parameter = {
            number: {q: _laid_out_like(parameter, group[name]) for q, group in quantities.items()}
            for number, (name, parameter) in enumerate(self.model.named_parameters())
        }
        param_groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": per_parameter, "param_groups": param_groups})
        if self.scaler is not None and scalars["scaler"]:
            self.scaler.load_state_dict(scalars["scaler"])
        self.position = scalars["position"]
        self.nonfinite_steps = scalars["nonfinite_steps"]
        self.unlogged_steps = scalars["unlogged_steps"]
        self.unlogged_loss = scalars["unlogged_loss"]


def _laid_out_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Give a moment the strides of its parameter (channels-last, say), which the fused optimizer walks along."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _group(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        groups.setdefault(kind, {})[name] = value
    return groups


def _check(kind: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    if difference := sorted(expected.keys() ^ found.keys()):
        state = "missing" if difference[0] in expected else "not in this run"
        raise CheckpointError(f"{kind}/{difference[0]}: {state}; the checkpoint is of another run")
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise CheckpointError(
                f"{kind}/{name}: shape {tuple(found[name].shape)}, the network has {tuple(value.shape)}"
            )
