"""The table of samplers, by the names that commands and configurations give them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points

from trainer.diffusion.contract import Sampler
from trainer.sampling.ancestral import ancestral
from trainer.sampling.ddim import ddim
from trainer.sampling.dpm_solver import dpm_solver


@dataclass(frozen=True, kw_only=True)
class Option:
    """A keyword argument of a sampler that users may set: a number from `least` to `most`."""

    default: float
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class SamplerEntry:
    """A sampler, its options by name, and the package that it needs (None: no other than the trainer does)."""

    sampler: Sampler
    options: Mapping[str, Option] = field(default_factory=dict)
    package: str | None = None


SAMPLERS: dict[str, SamplerEntry] = {
    "ddpm": SamplerEntry(sampler=ancestral),
    "ddim": SamplerEntry(sampler=ddim, options={"eta": Option(default=0.0, least=0.0, most=1.0)}),
    "ddpm-sigma-hat": SamplerEntry(sampler=partial(ddim, eta=1.0, sigma_hat=True)),
    "dpm-solver++": SamplerEntry(sampler=dpm_solver, package="diffusers"),
}


def find_sampler(name: str) -> SamplerEntry | None:
    """The sampler of that name: of this table, or of another installed package, which has an entry point of the group
    "ddpm_trainer.samplers" with that name for its `SamplerEntry`. None where there is none.
    """
    if name not in SAMPLERS:
        for extension in entry_points(group="ddpm_trainer.samplers", name=name):
            return extension.load()
    return SAMPLERS.get(name)
