"""Weights of other runs that the networks of a new run start from (`train.init_from`)."""

import re
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from trainer.config import Config
from trainer.engine.checkpointing.checkpoints import Checkpoints, check_kind, open_verified
from trainer.engine.processes.collectives import broadcast, together
from trainer.engine.state.network_state import NetworkState
from trainer.engine.state.train_state import TrainState
from trainer.errors import CheckpointError, ConfigError

_KIND = re.compile(r"(.+?):((?:[A-Za-z0-9_]+\.)?(?:model|ema(?:-[0-9.e-]+)?))")  # PATH:critic.ema-0.1


def load_initial_weights(config: Config, state: TrainState, *, say: Callable[[str], None]) -> None:
    """Set the networks of a run at step 0 to what `train.init_from` names. Collective.

    Each rank reads the slices that it holds. Raises ConfigError for a network that the run does not have,
    CheckpointError where there is no undamaged checkpoint or its weights do not fit; on all ranks.
    """
    for name, source in config.train.init_from.items():
        if name not in state.networks:
            raise ConfigError(
                f"train.init_from.{name}: this run has no such network, but {', '.join(state.networks)}", agreed=True
            )
        match = _KIND.fullmatch(source)
        path, kind = (Path(match[1]), match[2]) if match else (Path(source), "model")
        what = f"train.init_from.{name} = {source}"
        checkpoint = _choose(path, what, state.strategy.accelerator)
        network = state.networks[name]
        together(what, lambda: _load(network, checkpoint, kind, what), kind=CheckpointError)  # noqa: B023
        say(f"{name}: starts from {kind} of {checkpoint}")
    state.weights_changed()


def _choose(path: Path, what: str, accelerator: Accelerator) -> Path:
    """The checkpoint, verified: `path` itself, or the newest undamaged one of the run `path`."""
    is_run, is_folder = broadcast(((path / "checkpoints").is_dir(), path.is_dir()))
    if not is_folder:
        raise CheckpointError(f"{what}: no such run or checkpoint", agreed=True)
    if is_run:
        return Checkpoints(path / "checkpoints", accelerator).choose(None)
    return Checkpoints(path.parent, accelerator).choose(path)


def _load(network: NetworkState, checkpoint: Path, kind: str, what: str) -> None:
    reader, _ = open_verified(checkpoint)
    try:
        check_kind(reader, kind, checkpoint)
        network.start_from(reader, kind)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
