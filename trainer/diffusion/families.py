"""The table of families: for every `diffusion.kind` the objective that its section describes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from trainer.config.families import FAMILY_SECTIONS, DiffusionConfig
from trainer.diffusion.classifier import ClassifierObjective
from trainer.diffusion.contract import Objective, Phase, one_phase
from trainer.diffusion.ddpm.family import ddpm_objective, ddpm_output_channels

S = TypeVar("S", bound=DiffusionConfig)


@dataclass(frozen=True, kw_only=True)
class Family(Generic[S]):
    """A family of diffusion models.

    objective: from its section, on a device; raises ConfigError where fields do not go together. output_channels: from
    its section and the channels of x, the channels of the network's output. networks: from its section and a function
    that makes one more network of the configured backbone, the networks that it has besides "model", initialised from
    torch's current seed, by names of letters, digits and underscores. phases: of a step, from the objective.
    """

    objective: Callable[[S, torch.device], Objective]
    output_channels: Callable[[S, int], int] = lambda _, channels: channels
    networks: Callable[[S, Callable[[], nn.Module]], Mapping[str, nn.Module]] = lambda _, __: {}
    phases: Callable[[Any], Sequence[Phase]] = one_phase


FAMILIES: dict[str, Family[Any]] = {
    "ddpm": Family(objective=ddpm_objective, output_channels=ddpm_output_channels),
    "classifier": Family(objective=ClassifierObjective),
}


def register_family(section: type[S], family: Family[S]) -> None:
    """Make a family known by the `kind` of its section. ValueError where the kind is taken."""
    kind = FAMILY_SECTIONS.add(section)
    FAMILIES[kind] = family
