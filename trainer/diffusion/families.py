"""The table of families: for every `diffusion.kind` the objective that its section describes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from trainer.config.families import FAMILIES as SECTIONS
from trainer.config.families import DiffusionConfig
from trainer.diffusion.contract import Objective
from trainer.diffusion.ddpm.family import ddpm_objective, ddpm_output_channels

S = TypeVar("S", bound=DiffusionConfig)


def _as_many(_: DiffusionConfig, channels: int) -> int:
    return channels


@dataclass(frozen=True, kw_only=True)
class Family(Generic[S]):
    """A family of diffusion models.

    objective: from its section, on a device; raises ConfigError where fields do not go together. output_channels: from
    its section and the channels of x, the channels of the network's output.
    """

    objective: Callable[[S, torch.device], Objective]
    output_channels: Callable[[S, int], int] = _as_many


FAMILIES: dict[str, Family[Any]] = {
    "ddpm": Family(objective=ddpm_objective, output_channels=ddpm_output_channels),
}


def register_family(section: type[S], family: Family[S]) -> None:
    """Make a family known by the `kind` of its section. ValueError where the kind is taken."""
    kind = SECTIONS.add(section)
    FAMILIES[kind] = family
