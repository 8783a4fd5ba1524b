"""Which of the T timesteps a shorter chain visits. t runs over 0..T-1."""

import re

import numpy as np
import torch
from torch import Tensor

VALID = "'all', a count such as '50', counts by section such as '10,15,25', 'ddim50', 'quadratic50' or 'trailing50'"


def kept_timesteps(timesteps: int, spec: str) -> Tensor:
    """The timesteps that `spec` keeps of a chain of T: (S,) int64, increasing, 2 <= S <= T.

    "all"          every timestep.
    "50"           50 of them, spread evenly from 0 to T-1, both included (Nichol and Dhariwal 2021).
    "10,15,25"     the chain cut into as many equal sections as there are counts, each spread evenly (the same).
    "ddim50"       every k-th from 0, for the smallest integer k that gives exactly 50; T-1 is mostly not reached
                   (Song et al. 2021, "linear", in the form that Nichol and Dhariwal give it).
    "quadratic50"  the integer parts of linspace(0, sqrt(0.8 T), 50)^2, Song et al.'s choice for CIFAR-10. A timestep
                   that comes twice is kept once: the authors' second visit moves nothing, so S may fall short.
    "trailing50"   T-1 and down by T/50, rounded (Lin et al. 2024, table 2).

    Raises ValueError for anything else and for more steps than there are.
    """
    match = re.fullmatch(r"(ddim|quadratic|trailing)?(\d+)|(\d+(?:,\d+)+)|all", spec)
    if match is None:
        raise ValueError(f"respacing={spec!r}: must be {VALID}")
    kind, count, sections = match.groups()
    if spec == "all":
        steps = list(range(timesteps))
    elif sections is not None:
        steps = _by_section(timesteps, [int(part) for part in sections.split(",")], spec)
    elif not 2 <= int(count) <= timesteps:
        raise ValueError(f"respacing={spec!r}: must keep from 2 to {timesteps} timesteps")
    elif kind == "ddim":
        steps = _strided(timesteps, int(count), spec)
    elif kind == "quadratic":
        roots = np.linspace(0, np.sqrt(0.8 * timesteps), int(count))
        steps = sorted({min(int(step), timesteps - 1) for step in roots**2})
    elif kind == "trailing":
        steps = [round(timesteps - i * timesteps / int(count)) - 1 for i in reversed(range(int(count)))]
    else:
        steps = _by_section(timesteps, [int(count)], spec)
    return torch.tensor(steps, dtype=torch.int64)


def count_in_spec(timesteps: int, spec: str) -> int:
    """How many timesteps `spec` names; "quadratic..." may give fewer, since none is visited twice."""
    if spec == "all":
        return timesteps
    return sum(int(count) for count in re.findall(r"\d+", spec))


def _by_section(timesteps: int, counts: list[int], spec: str) -> list[int]:
    """Improved DDPM's striding, with its rounding: half to even, of a running sum."""
    size, longer = divmod(timesteps, len(counts))
    steps: list[int] = []
    start = 0
    for number, count in enumerate(counts):
        length = size + (number < longer)
        if not 1 <= count <= length:
            raise ValueError(f"respacing={spec!r}: a section of {length} timesteps cannot give {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return steps


def _strided(timesteps: int, count: int, spec: str) -> list[int]:
    for stride in range(1, timesteps):
        steps = range(0, timesteps, stride)
        if len(steps) == count:
            return list(steps)
    raise ValueError(f"respacing={spec!r}: no integer stride visits exactly {count} of {timesteps} timesteps")
