"""Keyed randomness: every random number is a pure function of (seed, stream, index, sub) and its position.

There is no generator and no state. Sample `index` gets the same timestep, noise and flip on whatever rank, in
whatever batch and after however many restarts it comes up. Integers are the same on every device; floats are
the same up to the last bit of the device's log, sin and cos.

The bits come from Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
a keyed bijection of 128-bit counters. Our counter and key are

    counter = (block, stream << 24 | sub, index & 0xffffffff, index >> 32)     four 32-bit words
    key     = (seed & 0xffffffff, seed >> 32)                                  two 32-bit words

where `block` counts groups of four numbers of one sample. Each argument has bits of its own, so two different
(seed, stream, index, sub, block) never meet: under one seed all counters differ, and another seed is another
bijection.

The numbers are part of what a run is: to change any of them is to break the resuming of every run before.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10
# The paper's multipliers less 2^32: see `_multiply`.
MULTIPLIER_0 = 0xD2511F53 - 2**32
MULTIPLIER_1 = 0xCD9E8D57 - 2**32
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85

SUB_BITS = 24
# Normal numbers are made this many blocks at a time: the int64 temporaries of so many fit a CPU's cache (five times
# faster than all at once), and take a few hundred megabytes on an accelerator.
CPU_CHUNK = 2**16
ACCELERATOR_CHUNK = 2**21

Word = TypeVar("Word", int, Tensor)


class Stream(enum.IntEnum):
    """What the numbers are for. A number here is for ever, and below 256."""

    TIMESTEP = 0
    EPS = 1
    FLIP = 2
    INITIAL = 3  # x_T of a sample
    ANCESTRAL = 4  # z_t of a sample by any sampler, with sub = t
    DROPOUT = 5
    LIKELIHOOD = 6  # eps of an image when its bits are counted, with sub = t
    VALIDATION = 7  # t of a held-out image, with sub = 0, its eps, with sub = 1; level and eps of its low_res, 2 and 3
    LABEL_DROP = 8  # whether a training image's label is dropped
    CLASS = 9  # the class of a sample that is drawn
    LOW_RES = 10  # noise of an image to upsample: its level in training, sub = 0, its eps, sub = 1, of a sample sub = 2
    STAGE = 11  # the seed of each upsampler of a cascade


def philox4x32_10(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Salmon et al. 2011, section 3.3: ten rounds over four words in [0, 2^32), ints or int64 tensors that broadcast.

    Returns four words of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIER_0)
        high1, low1 = _multiply(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def _multiply(word: Word, multiplier: int) -> tuple[Word, Word]:
    """High and low 32 bits of word * (multiplier + 2^32), where the multiplier is in [-2^31, 0).

    The full multiplier would overflow int64, which a C++ compiler may take as never happening. Less 2^32 the product
    fits; its low half is the same, and its high half (>> rounds down) is short by exactly one word.
    """
    product = word * multiplier
    return (product >> 32) + word, product & MASK


def _key(seed: int) -> tuple[int, int]:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: must be in [0, 2^63)")
    return seed & MASK, seed >> 32


def _words(
    seed: int, stream: Stream, index: Tensor, blocks: Tensor, sub: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each block: (B,), (N,) -> four of (B, N)."""
    if isinstance(sub, Tensor):
        sub = sub.reshape(-1, 1)
    else:
        if not 0 <= sub < 2**SUB_BITS:
            raise ValueError(f"sub={sub}: must be in [0, 2^{SUB_BITS})")
        sub = index.new_full((1, 1), sub)
    index = index[:, None]
    # The mask changes no value. It keeps TorchInductor (seen in 2.13) from taking arange times a constant for an array
    # index, which it computes in 32 bits.
    blocks = blocks[None, :] & MASK
    return philox4x32_10((blocks, sub | (stream << SUB_BITS), index & MASK, index >> 32), _key(seed))


def keyed_bits(seed: int, stream: Stream, index: Tensor, count: int, sub: int | Tensor = 0) -> Tensor:
    """`count` random words for each sample: (B, count) int64 in [0, 2^32).

    seed: in [0, 2^63); index: (B,) int64, not negative; sub: in [0, 2^24), an int (checked) or an int64 tensor,
    () or (B,), on the index's device (not checked, for that would wait for the device). ValueError for other ints.
    """
    blocks = torch.arange(math.ceil(count / 4), device=index.device)
    words = _words(seed, stream, index, blocks, sub)
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def keyed_uniform(seed: int, stream: Stream, index: Tensor, count: int, sub: int | Tensor = 0) -> Tensor:
    """(B, count) float32, uniform over the midpoints (k + 1/2) / 2^23: never 0, never 1. Arguments: `keyed_bits`."""
    # 23 bits, not 24: the largest midpoint must still be a float32 below 1.
    return ((keyed_bits(seed, stream, index, count, sub) >> 9).float() + 0.5) * 2.0**-23


def keyed_normal(seed: int, stream: Stream, index: Tensor, shape: tuple[int, ...], sub: int | Tensor = 0) -> Tensor:
    """Standard normal numbers for each sample: (B, *shape) float32, contiguous, |z| < 6.8. Arguments: `keyed_bits`."""
    count = math.prod(shape)
    blocks = torch.arange(math.ceil(count / 4), device=index.device)
    if torch.compiler.is_compiling():
        chunk = len(blocks)  # the compiler fuses everything into one pass and keeps no temporaries
    else:
        chunk = (CPU_CHUNK if index.device.type == "cpu" else ACCELERATOR_CHUNK) // max(len(index), 1)
    chunks = []
    for some in blocks.split(max(chunk, 1)):
        w0, w1, w2, w3 = _words(seed, stream, index, some, sub)
        chunks.append(torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), dim=-1))
    return torch.cat(chunks, dim=1).flatten(1)[:, :count].reshape(len(index), *shape).contiguous()


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Box and Muller 1958: two uniform words make two independent normal numbers."""
    radius = ((word0.float() + 0.5) * 2.0**-32).log().mul(-2).sqrt()  # + 0.5: log never sees 0
    angle = word1.float() * (2 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


def keyed_flips(seed: int, index: Tensor, probability: float = 0.5) -> Tensor:
    """Whether to mirror each sample: (B,) bool, True with the given probability."""
    return keyed_uniform(seed, Stream.FLIP, index, 1)[:, 0] < probability


def keyed_choice(seed: int, stream: Stream, index: Tensor, choices: int) -> Tensor:
    """A number of 0..choices-1 for each sample, all as likely but for less than choices / 2^32: (B,) int64.

    choices: from 1 to 2^31; other arguments: `keyed_bits`.
    """
    return (keyed_bits(seed, stream, index, 1)[:, 0] * choices) >> 32


def keyed_int(seed: int, stream: Stream, index: int) -> int:
    """One number in [0, 2^63), without torch: to seed a generator that is not ours, such as dropout's."""
    word0, word1, _, _ = philox4x32_10((0, stream << SUB_BITS, index & MASK, index >> 32), _key(seed))
    return ((word1 >> 1) << 32) | word0


Purpose = Literal["t", "eps", "initial", "step", "low_res_level", "low_res"]


class NoiseKey(NamedTuple):
    """Where the numbers for one purpose come from."""

    stream: Stream
    sub: int = 0


_TRAINING: Mapping[Purpose, NoiseKey] = {
    "t": NoiseKey(Stream.TIMESTEP),
    "eps": NoiseKey(Stream.EPS),
    "low_res_level": NoiseKey(Stream.LOW_RES, 0),
    "low_res": NoiseKey(Stream.LOW_RES, 1),
}
_VALIDATION: Mapping[Purpose, NoiseKey] = {
    "t": NoiseKey(Stream.VALIDATION, 0),
    "eps": NoiseKey(Stream.VALIDATION, 1),
    "low_res_level": NoiseKey(Stream.VALIDATION, 2),
    "low_res": NoiseKey(Stream.VALIDATION, 3),
}
_SAMPLING: Mapping[Purpose, NoiseKey] = {
    "initial": NoiseKey(Stream.INITIAL),
    "step": NoiseKey(Stream.ANCESTRAL),
    "low_res": NoiseKey(Stream.LOW_RES, 2),
}


@dataclass(frozen=True)
class KeyedNoise:
    """The random numbers of some samples that families and samplers take, by what they are for.

    Flips, dropped labels, dropout, classes of samples and the evaluation of the bound have streams of their own.

    seed: in [0, 2^63); index: (B,) int64, what each sample's numbers are keyed by; keys: the stream of each purpose:
    "t" is for the times of training and "eps" for its noise, "initial" for x_T of a drawn sample and "step" for the
    noise of each step that draws it; "low_res_level" and "low_res" are for the level and the noise of an image to
    upsample. KeyError for a purpose without a stream.
    """

    seed: int
    index: Tensor
    keys: Mapping[Purpose, NoiseKey]

    @classmethod
    def training(cls, seed: int, position: Tensor) -> Self:
        """Of training images, keyed by their positions in the run."""
        return cls(seed, position, _TRAINING)

    @classmethod
    def validation(cls, seed: int, sample: Tensor) -> Self:
        """Of held-out images, keyed by their ids in the dataset, so the same in every validation."""
        return cls(seed, sample, _VALIDATION)

    @classmethod
    def sampling(cls, seed: int, number: Tensor) -> Self:
        """Of images that are drawn, keyed by their numbers."""
        return cls(seed, number, _SAMPLING)

    def bits(self, purpose: Purpose) -> Tensor:
        """One random word for each sample: (B,) int64 in [0, 2^32)."""
        stream, sub = self.keys[purpose]
        return keyed_bits(self.seed, stream, self.index, 1, sub)[:, 0]

    def normal(self, purpose: Purpose, shape: tuple[int, ...], sub: int | Tensor | None = None) -> Tensor:
        """Standard normal numbers for each sample: (B, *shape) float32; `sub` as of `keyed_bits`."""
        stream, default = self.keys[purpose]
        return keyed_normal(self.seed, stream, self.index, shape, default if sub is None else sub)
