"""The table of backbones: for every `model.kind` the network that its section describes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from trainer.config.backbones import (
    BACKBONE_SECTIONS,
    ADMClassifierConfig,
    ADMUNetConfig,
    ClassConditionalConfig,
    ModelConfig,
)
from trainer.models.adm_classifier import ADMClassifier
from trainer.models.adm_unet import ADMUNet
from trainer.models.ddpm_unet import UNet

S = TypeVar("S", bound=ModelConfig)


def _no_conditioning(_: ModelConfig, __: int) -> dict[str, Tensor]:
    return {}


def label_conditioning(model: ClassConditionalConfig, samples: int) -> dict[str, Tensor]:
    """What a network takes whose section has classes: label, (B,) int64, in 0..classes (classes: the null class)."""
    return {} if model.classes is None else {"label": torch.zeros(samples, dtype=torch.int64)}


def adm_conditioning(model: ADMUNetConfig, samples: int) -> dict[str, Tensor]:
    """What `ADMUNet` takes: `label_conditioning`; where it upsamples low_res, (B, C, h, h) float32, and with
    `low_res_noise` its low_res_level, (B,) float32.
    """
    cond = label_conditioning(model, samples)
    if model.low_res_size is not None:
        cond["low_res"] = torch.zeros(samples, model.channels, model.low_res_size, model.low_res_size)
    if model.low_res_noise:
        cond["low_res_level"] = torch.zeros(samples)
    return cond


def label_target(_: ADMClassifierConfig, samples: int) -> dict[str, Tensor]:
    """What a classifier's logits are compared with: label, (B,) int64."""
    return {"label": torch.zeros(samples, dtype=torch.int64)}


def build_classifier(model: ADMClassifierConfig, _: int) -> ADMClassifier:
    """The classifier of a section, whose output is logits of its classes, whatever the channels of an image."""
    return ADMClassifier(model)


@dataclass(frozen=True, kw_only=True)
class Backbone(Generic[S]):
    """A kind of network.

    build: from its section and the number of channels that the family wants of its output, a network that maps x
    (B, C, H, W), t (B,) and conditioning by name to (B, that number, H, W), initialised from torch's current seed;
    raises ConfigError where the sizes do not go together. Its parts that the engine compiles, shards and checkpoints
    are `trainer.models.stages.Stage`. A classifier maps to logits (B, K). conditioning: from the section and B, an
    example of what the network takes besides x and t, by name; targets: likewise, of what its output is compared with
    besides x.
    """

    build: Callable[[S, int], nn.Module]
    conditioning: Callable[[S, int], dict[str, Tensor]] = _no_conditioning
    targets: Callable[[S, int], dict[str, Tensor]] = _no_conditioning


BACKBONES: dict[str, Backbone[Any]] = {
    "ddpm-unet": Backbone(build=UNet, conditioning=label_conditioning),
    "adm-unet": Backbone(build=ADMUNet, conditioning=adm_conditioning),
    "adm-classifier": Backbone(build=build_classifier, targets=label_target),
}


def register_backbone(section: type[S], backbone: Backbone[S]) -> None:
    """Make a backbone known by the `kind` of its section. ValueError where the kind is taken."""
    kind = BACKBONE_SECTIONS.add(section)
    BACKBONES[kind] = backbone


def example_inputs(model: ModelConfig, samples: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Inputs of the network, for measurements: x of zeros (B, C, H, W) float32, t (B,) int64, conditioning."""
    x = torch.zeros(samples, *model.image_shape)
    t = torch.zeros(samples, dtype=torch.int64)
    return x, t, BACKBONES[model.kind].conditioning(model, samples)


def example_cond(model: ModelConfig, samples: int) -> dict[str, Tensor]:
    """What a batch of so many samples has besides x, by name: conditioning of the network, and its targets."""
    backbone = BACKBONES[model.kind]
    return {**backbone.conditioning(model, samples), **backbone.targets(model, samples)}
