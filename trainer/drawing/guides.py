"""Opens the networks of other runs that guide the one that is drawn from (`--guide`, `--classifier`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.config import Config
from trainer.config.backbones import classes_of
from trainer.diffusion.classifier import ClassifierObjective
from trainer.diffusion.contract import Objective
from trainer.engine.build import build_objective, build_trained
from trainer.engine.checkpointing.checkpoints import Checkpoints, read_weights
from trainer.engine.checkpointing.sealed import COMPLETE_NAME
from trainer.engine.processes.collectives import together
from trainer.engine.run_folder import RunFolder
from trainer.errors import CheckpointError, ConfigError
from trainer.sampling.conditioned import ClassifierNetwork, GuideNetwork

_IMAGES = ("image_size", "channels")
_GUIDE_IMAGES = (*_IMAGES, "low_res_size", "low_res_noise")  # a guide is given what the network that it guides is


def open_guide(
    path: Path, weights: str, guided: Config, objective: Objective, accelerator: Accelerator
) -> GuideNetwork:
    """The network of a run, or of a checkpoint in it; `weights`: which of its weights. Collective.

    guided, objective: of the run that it guides. Raises TrainerError where it cannot be used, ConfigError where its
    images, noise levels or classes are others.
    """
    other = _OtherRun.located("--guide", path)
    if other.config.model.classifies:
        raise ConfigError(f"{other.option}: is a classifier; give it as --classifier")
    theirs = build_objective(other.config, accelerator.device)
    other.check_images(guided, *_GUIDE_IMAGES)
    other.check_levels(theirs.denoiser(nn.Identity()).diffusion.abar64, objective)
    if classes_of(other.config.model) is not None:  # without labels, it guides away from all classes alike
        other.check_classes(guided)
    network, fingerprint = other.network(weights, accelerator)
    return GuideNetwork(objective=theirs, network=network, model=other.config.model, fingerprint=fingerprint)


def open_classifier(
    path: Path, weights: str, guided: Config, objective: Objective, accelerator: Accelerator
) -> ClassifierNetwork:
    """The classifier of a run, or of a checkpoint in it; arguments and errors as `open_guide`. Collective."""
    other, classes = _located_classifier(path)
    theirs = build_objective(other.config, accelerator.device)
    assert isinstance(theirs, ClassifierObjective)
    other.check_images(guided, *_IMAGES)
    other.check_levels(theirs.diffusion.abar64, objective)
    if classes_of(guided.model) is not None:
        other.check_classes(guided)
    network, fingerprint = other.network(weights, accelerator)
    return ClassifierNetwork(network=network, classes=classes, fingerprint=fingerprint)


def classes_of_classifier(path: Path) -> int:
    """Number of classes of a classifier's run, or of a checkpoint in it. Raises ConfigError where it is none."""
    return _located_classifier(path)[1]


def _located_classifier(path: Path) -> tuple["_OtherRun", int]:
    other = _OtherRun.located("--classifier", path)
    classes = classes_of(other.config.model)
    if not other.config.model.classifies or classes is None:
        kind = other.config.diffusion.kind
        raise ConfigError(f'{other.option}: diffusion.kind = "{kind}"; should be the run of a classifier')
    return other, classes


@dataclass(frozen=True, kw_only=True)
class _OtherRun:
    """A run whose network guides. option: as it was asked for, "--guide RUN"; checkpoint: None for the newest."""

    option: str
    folder: RunFolder
    config: Config
    checkpoint: Path | None

    @classmethod
    def located(cls, name: str, path: Path) -> Self:
        in_run = not (path / "checkpoints").is_dir() and path.parent.name == "checkpoints"
        folder = RunFolder(path.parent.parent if in_run else path, writes=False)
        if not folder.config.is_file():
            raise ConfigError(f"{name} {path}: is neither a run nor a checkpoint of one")
        config = folder.load_config()
        return cls(option=f"{name} {path}", folder=folder, config=config, checkpoint=path if in_run else None)

    def check_images(self, guided: Config, *fields: str) -> None:
        for field in fields:
            own, needed = (getattr(model, field, None) for model in (self.config.model, guided.model))
            if (own or None) != (needed or None):
                raise ConfigError(
                    f"{self.option}: model.{field} = {own}; should be {needed}, as of the run that it guides"
                )

    def check_levels(self, abar: Tensor, objective: Objective) -> None:
        if not torch.equal(abar, objective.denoiser(nn.Identity()).diffusion.abar64):
            raise ConfigError(
                f"{self.option}: its noise levels are not those of the run that it guides (see [diffusion])"
            )

    def check_classes(self, guided: Config) -> None:
        own, needed = classes_of(self.config.model), classes_of(guided.model)
        if own != needed:
            should = "takes labels, unlike" if needed is None else f"should be {needed}, as of"
            raise ConfigError(f"{self.option}: model.classes = {own}; {should} the run that it guides")

    def network(self, weights: str, accelerator: Accelerator) -> tuple[nn.Module, str]:
        """On the device, and what is unique to its checkpoint. Collective."""
        checkpoint = Checkpoints(self.folder.checkpoints, accelerator).choose(self.checkpoint)
        opened: list[nn.Module] = []
        together(
            f"{checkpoint}: cannot be read",
            lambda: opened.append(load_network(checkpoint, weights, self.config, accelerator.device)[0]),
        )
        return opened[0], (checkpoint / COMPLETE_NAME).read_text().strip()


def load_network(path: Path, kind: str, config: Config, device: torch.device) -> tuple[nn.Module, int]:
    """The network of a verified checkpoint, in eval mode, and its step; `kind`: which of its weights."""
    weights, manifest = read_weights(path, kind)
    try:
        return build_trained(config, weights, device), int(manifest["step"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
