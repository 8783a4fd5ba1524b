"""Opens the network of another run that guides the one that is drawn from (`--guide`)."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from trainer.config import Config
from trainer.config.backbones import classes_of
from trainer.diffusion.contract import Objective
from trainer.engine.build import build_objective, build_trained
from trainer.engine.checkpointing.checkpoints import Checkpoints, read_weights
from trainer.engine.checkpointing.sealed import COMPLETE_NAME
from trainer.engine.processes.collectives import together
from trainer.engine.run_folder import RunFolder
from trainer.errors import CheckpointError, ConfigError
from trainer.sampling.conditioned import GuideNetwork


def open_guide(
    path: Path, weights: str, guided: Config, objective: Objective, accelerator: Accelerator
) -> GuideNetwork:
    """The network of a run, or of a checkpoint in it; `weights`: which of its weights. Collective.

    guided, objective: of the run that it guides. Raises TrainerError where it cannot be used, ConfigError where its
    images, noise levels or classes are others.
    """
    in_run = not (path / "checkpoints").is_dir() and path.parent.name == "checkpoints"
    run = RunFolder(path.parent.parent if in_run else path, writes=False)
    if not run.config.is_file():
        raise ConfigError(f"--guide {path}: is neither a run nor a checkpoint of one")
    config = run.load_config()
    theirs = build_objective(config, accelerator.device)
    _check(path, config, guided, theirs, objective)
    checkpoint = Checkpoints(run.checkpoints, accelerator).choose(path if in_run else None)
    opened: list[nn.Module] = []
    together(
        f"{checkpoint}: cannot be read",
        lambda: opened.append(load_network(checkpoint, weights, config, accelerator.device)[0]),
    )
    return GuideNetwork(
        objective=theirs,
        network=opened[0],
        model=config.model,
        fingerprint=(checkpoint / COMPLETE_NAME).read_text().strip(),
    )


def load_network(path: Path, kind: str, config: Config, device: torch.device) -> tuple[nn.Module, int]:
    """The network of a verified checkpoint, in eval mode, and its step; `kind`: which of its weights."""
    weights, manifest = read_weights(path, kind)
    try:
        return build_trained(config, weights, device), int(manifest["step"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check(path: Path, config: Config, guided: Config, theirs: Objective, objective: Objective) -> None:
    for field in ("image_size", "channels", "low_res_size", "low_res_noise"):
        own, needed = (getattr(model, field, None) for model in (config.model, guided.model))
        if (own or None) != (needed or None):
            raise ConfigError(
                f"--guide {path}: model.{field} = {own}; should be {needed}, as of the run that it guides"
            )
    levels = [each.denoiser(nn.Identity()).diffusion.abar64 for each in (theirs, objective)]
    if not torch.equal(*levels):
        raise ConfigError(f"--guide {path}: its noise levels are not those of the run that it guides (see [diffusion])")
    classes, needed = classes_of(config.model), classes_of(guided.model)
    if classes not in (None, needed):  # without labels, it guides away from all classes alike
        should = "takes labels, unlike" if needed is None else f"should be {needed}, as of"
        raise ConfigError(f"--guide {path}: model.classes = {classes}; {should} the run that it guides")
