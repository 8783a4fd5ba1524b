"""What is to be drawn, and a batch of it: for sample.py, evaluate.py, the grids of a run and its feature distance."""

import difflib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.data.images import Pixels, to_uint8
from trainer.diffusion.contract import Denoiser, SamplingStep
from trainer.diffusion.keyed_noise import KeyedNoise, Stream, keyed_int
from trainer.sampling.conditions import Conditions
from trainer.sampling.request_error import RequestError
from trainer.sampling.samplers import SAMPLERS, SamplerEntry, find_sampler
from trainer.sampling.steps import last_of

DEFAULT_SAMPLER = "ddpm"


@dataclass(frozen=True, kw_only=True)
class ReverseRequest:
    """How a trained network's reverse process is run.

    respacing: the timesteps, see trainer/diffusion/ddpm/respacing.py; variance: a fixed one in place of the
    configuration's, or None; conditions: classes and guidance.
    """

    respacing: str = "all"
    variance: Literal["small", "large"] | None = None
    conditions: Conditions = field(default_factory=Conditions)

    @property
    def name_parts(self) -> list[str]:
        """For names of files: what differs from the whole process as configured."""
        respacing = [] if self.respacing == "all" else [self.respacing.replace(",", "-")]
        variance = [] if self.variance is None else [self.variance]
        return [*respacing, *variance, *self.conditions.name_parts]


@dataclass(frozen=True, kw_only=True)
class SamplingRequest(ReverseRequest):
    """`count` samples, keyed by the seed and their numbers 0..count-1, in batches of `batch`.

    sampler: a name in the table of samplers; options: of that sampler, its defaults where they are left out; stage: its
    place in a cascade, each of which has noise of its own, 0 for what draws from noise alone. RequestError where
    sampler and options do not go together, or where the seed is outside [0, 2^63).
    """

    sampler: str = DEFAULT_SAMPLER
    options: Mapping[str, float] = field(default_factory=dict)
    count: int
    seed: int
    batch: int
    stage: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise RequestError("seed", self.seed, "should be at least 0 and below 2^63")
        if find_sampler(self.sampler) is None:
            nearest = difflib.get_close_matches(self.sampler, SAMPLERS, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(SAMPLERS)}"
            raise RequestError("sampler", self.sampler, f"unknown; {hint}")
        for name, value in self.options.items():
            if (option := self._entry.options.get(name)) is None:
                raise RequestError(name, value, self._where_it_belongs(name))
            if not option.least <= value <= option.most:
                raise RequestError(name, value, f"should be from {option.least:g} to {option.most:g}")
        package = self._entry.package
        if package is not None and importlib.util.find_spec(package) is None:
            raise RequestError("sampler", self.sampler, f"needs {package}; pip install 'ddpm-trainer[solvers]'")

    @property
    def how(self) -> str:
        """The sampler with its options: "ddpm", "ddim-eta-0.5"."""
        return "-".join([self.sampler, *(f"{name}-{value:g}" for name, value in self._options.items())])

    @property
    def how_parts(self) -> list[str]:
        """For names of files: the sampler, where it is not the default one, and what is not as configured."""
        return [*([] if self.how == DEFAULT_SAMPLER else [self.how]), *super().name_parts]

    @property
    def name_parts(self) -> list[str]:
        """For names of files: the sampler, what is not as configured, the seed."""
        return [self.how, *super().name_parts, f"seed-{self.seed}"]

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the samples besides the weights and the variance of the reverse process."""
        return {"sampler": self.how, "respacing": self.respacing, "batch": self.batch, "seed": self.seed}

    def describe(self, steps: int) -> str:
        """For people; steps: what the respacing came to."""
        return f"{self.how}, {steps} steps, seed {self.seed}"

    @property
    def batches(self) -> list[range]:
        """The numbers 0..count-1."""
        return batches_of(self.count, self.batch)

    def noise(self, numbers: Sequence[int], device: torch.device) -> KeyedNoise:
        """The noise of the samples with these numbers."""
        # The same numbers for all stages would make an upsampler's x_T begin with that of the base.
        seed = keyed_int(self.seed, Stream.STAGE, self.stage) if self.stage else self.seed
        return KeyedNoise.sampling(seed, torch.tensor(list(numbers), device=device))

    def chain(self, denoiser: Denoiser, x: Tensor, noise: KeyedNoise) -> Iterator[SamplingStep]:
        """The sampler's steps, with its options, from x_T: (B, C, H, W)."""
        return self._entry.sampler(denoiser, x, noise=noise, **self._options)

    @torch.no_grad()
    def draw(
        self,
        denoiser: Denoiser,
        numbers: range,
        *,
        shape: tuple[int, int, int],
        on_step: Callable[[int], object] = lambda _: None,
    ) -> Pixels:
        """The samples of these numbers, (B, C, H, W) uint8; they do not depend on the number of processes.

        denoiser: visits the request's timesteps; shape: (C, H, W); on_step: called after each denoising step with the
        number of images that advanced. What it raises ends the sampling.
        """
        device = denoiser.diffusion.original_timesteps.device
        noise = self.noise(numbers, device)
        chain = self.chain(denoiser, noise.normal("initial", shape), noise)
        return to_uint8(last_of(chain, lambda _: on_step(len(numbers)))).cpu().numpy()

    def _where_it_belongs(self, option: str) -> str:
        """What is wrong with an option that the sampler does not have."""
        if others := [sampler for sampler, entry in SAMPLERS.items() if option in entry.options]:
            return f"goes with sampler {' or '.join(others)}, not {self.sampler}"
        known = self._entry.options
        nearest = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
        return (
            f"unknown; did you mean {nearest[0]}?"
            if nearest
            else f"unknown; {self.sampler} has {', '.join(known) or 'no options'}"
        )

    @property
    def _entry(self) -> SamplerEntry:
        entry = find_sampler(self.sampler)
        assert entry is not None
        return entry

    @property
    def _options(self) -> dict[str, Any]:  # so typed since they are keyword arguments
        return {name: self.options.get(name, option.default) for name, option in self._entry.options.items()}


def batches_of(count: int, batch: int) -> list[range]:
    """The indices 0..count-1 in batches of `batch`.

    The batches do not depend on the number of ranks: a network's rounding may depend on the batch size.
    """
    return [range(first, min(first + batch, count)) for first in range(0, count, batch)]
