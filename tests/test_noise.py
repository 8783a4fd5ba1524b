"""Keyed randomness: the published Philox, good statistics, and values that never change."""

import math
from itertools import combinations

import pytest
import torch

from trainer.diffusion.ddpm.timesteps import UniformTimesteps
from trainer.diffusion.keyed_noise import (
    KeyedNoise,
    Stream,
    keyed_bits,
    keyed_choice,
    keyed_flips,
    keyed_int,
    keyed_normal,
    keyed_uniform,
    philox4x32_10,
)
from trainer.diffusion.label_drop import drop_labels

# kat_vectors of Random123, philox4x32 10: counter, key, result
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

BITS = [[3168345069, 294131662], [1351774640, 1738018559], [1349362231, 936669740]]
TIMESTEPS = [612, 10, 398, 40, 156, 482, 736, 405]
FLIPS = [False, False, False, True, False, False, False, False]
CLASSES = [279, 432, 362, 858, 633, 430, 271, 631]
DROPS = [1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
INTEGER = 4048845223259112823
UNIFORM = [
    [0.46522051095962524, 0.00021213293075561523],
    [0.45431727170944214, 0.2989881634712219],
    [0.24767369031906128, 0.1987174153327942],
]
NORMAL = [
    [1.2371277, 0.001649, 1.5093116, 0.1736968],
    [-0.3805691, 1.1971158, -1.3397557, 0.4383338],
    [0.5290663, 1.5847318, 1.3497214, -0.6502137],
]


def timesteps(seed: int, index: torch.Tensor) -> torch.Tensor:
    return UniformTimesteps(1000).draw(KeyedNoise.training(seed, index))[0]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, result: str) -> None:
    assert philox4x32_10(words(counter), words(key)) == words(result)
    tensors = tuple(torch.tensor([word]) for word in words(counter))
    assert tuple(word.item() for word in philox4x32_10(tensors, words(key))) == words(result)


def test_counter_and_key_are_laid_out_as_documented() -> None:
    seed, index, sub = 0x7EDCBA9876543210, 0x123456789ABCDEF, 0xFEDCBA
    bits = keyed_bits(seed, Stream.ANCESTRAL, torch.tensor([index]), 6, sub)
    key = (0x76543210, 0x7EDCBA98)
    expected = [philox4x32_10((block, 0x04FEDCBA, 0x89ABCDEF, 0x1234567), key) for block in range(2)]
    assert bits.tolist() == [[*expected[0], *expected[1][:2]]]
    low, high = keyed_bits(seed, Stream.DROPOUT, torch.tensor([index]), 2)[0].tolist()
    assert keyed_int(seed, Stream.DROPOUT, index) == (high >> 1 << 32) + low


def test_the_values_are_pinned_for_ever() -> None:
    """Runs are resumed across releases by these numbers: if this test fails, the code is wrong, not the test."""
    index = torch.tensor([0, 1, 2**33 + 5])
    assert [int(stream) for stream in Stream] == list(range(12))
    assert keyed_bits(42, Stream.EPS, index, 2, sub=9).tolist() == BITS
    assert timesteps(42, torch.arange(8)).tolist() == TIMESTEPS
    assert keyed_flips(42, torch.arange(8)).tolist() == FLIPS
    assert keyed_int(42, Stream.DROPOUT, 7) == INTEGER
    assert keyed_choice(42, Stream.CLASS, torch.arange(8), 1000).tolist() == CLASSES
    label, position = torch.zeros(16, dtype=torch.int64), torch.arange(16)
    assert drop_labels(label, position, seed=42, probability=0.3, null=1).tolist() == DROPS
    torch.testing.assert_close(keyed_uniform(42, Stream.EPS, index, 2), torch.tensor(UNIFORM), rtol=0, atol=0)
    torch.testing.assert_close(keyed_normal(42, Stream.EPS, index, (4,)), torch.tensor(NORMAL), rtol=0, atol=2e-6)


@pytest.mark.parametrize("stream", list(Stream))
def test_normal_numbers_have_a_normal_distributions_moments(stream: Stream) -> None:
    z = keyed_normal(1, stream, torch.arange(500), (2000,)).double().flatten()
    n = len(z)
    # each within five standard errors
    assert abs(z.mean().item()) < 5 / n**0.5
    assert abs(z.square().mean().item() - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.pow(3).mean().item()) < 5 * (15 / n) ** 0.5
    assert abs(z.pow(4).mean().item() - 3) < 5 * (96 / n) ** 0.5
    for threshold in (0.5, 1.0, 2.0, 3.0, 4.0):
        tail = math.erfc(threshold / 2**0.5)
        assert abs((z.abs() > threshold).double().mean().item() - tail) < 5 * (tail / n) ** 0.5


def test_streams_seeds_samples_subs_and_positions_are_uncorrelated() -> None:
    rows = [
        keyed_normal(seed, stream, torch.tensor([5, 6, 5 + 2**32]), (40_000,), sub=sub)
        for seed in (0, 1, 2**32, 2**62)
        for stream in (Stream.EPS, Stream.INITIAL, Stream.ANCESTRAL)
        for sub in (0, 1)
    ]
    z = torch.cat(rows)
    z = torch.cat((z, z[:3].roll(1, dims=1), z[:3].roll(2, dims=1), z[:3].roll(4, dims=1)))
    for values in (z, z.square() / 2**0.5):
        correlation = torch.corrcoef(values)
        off_diagonal = correlation[~torch.eye(len(z), dtype=torch.bool)]
        assert off_diagonal.abs().max() < 6 / 40_000**0.5


def test_no_two_different_arguments_share_a_word() -> None:
    """64 bits each of many neighbouring keys: a clash would mean that two of them share a counter."""
    seen: set[tuple[int, ...]] = set()
    count = 0
    for seed in (0, 1, 2**31, 2**32, 2**33):
        for stream in Stream:
            for sub in (0, 1, 2, 2**23):
                index = torch.tensor([0, 1, 2, 2**24, 2**31, 2**32, 2**33])
                bits = keyed_bits(seed, stream, index, 8, sub).reshape(-1, 2)
                seen.update(map(tuple, bits.tolist()))
                count += len(bits)
    assert len(seen) == count


def test_any_slicing_of_the_batch_gives_the_same_rows_bit_for_bit() -> None:
    index = torch.arange(100, 137) * 12_345_678_901
    # 70,003 numbers a row: more than one chunk for the whole batch, an odd tail, and rows that start unaligned
    whole = keyed_normal(3, Stream.EPS, index, (70_003,))
    for start, stop in ((0, 1), (36, 37), (5, 22), (1, 37)):
        assert torch.equal(keyed_normal(3, Stream.EPS, index[start:stop], (70_003,)), whole[start:stop])
    scattered = torch.tensor([30, 2, 17])
    assert torch.equal(keyed_normal(3, Stream.EPS, index[scattered], (70_003,)), whole[scattered])
    for function in (lambda i: timesteps(3, i), lambda i: keyed_flips(3, i)):
        assert torch.equal(function(index)[5:22], function(index[5:22]))


def test_shape_only_folds_the_numbers_and_a_shorter_row_is_a_beginning() -> None:
    index = torch.arange(3)
    flat = keyed_normal(3, Stream.EPS, index, (30,))
    folded = keyed_normal(3, Stream.EPS, index, (2, 3, 5))
    assert folded.is_contiguous()
    assert torch.equal(folded.flatten(1), flat)
    assert torch.equal(keyed_normal(3, Stream.EPS, index, (7,)), flat[:, :7])
    assert keyed_normal(3, Stream.EPS, index[:0], (2, 5)).shape == (0, 2, 5)


def test_sub_may_be_a_number_or_a_tensor_with_one_for_each_sample() -> None:
    index = torch.arange(4)
    one = keyed_bits(3, Stream.ANCESTRAL, index, 5, sub=17)
    assert torch.equal(keyed_bits(3, Stream.ANCESTRAL, index, 5, sub=torch.tensor(17)), one)
    mixed = keyed_bits(3, Stream.ANCESTRAL, index, 5, sub=torch.tensor([17, 0, 17, 1]))
    assert torch.equal(mixed[[0, 2]], one[[0, 2]])
    assert torch.equal(mixed[1], keyed_bits(3, Stream.ANCESTRAL, index, 5)[1])


def test_uniform_and_normal_stay_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for extreme in (0, 2**32 - 1):
        monkeypatch.setattr(
            "trainer.diffusion.keyed_noise.philox4x32_10",
            lambda counter, _key, extreme=extreme: (torch.full((len(counter[2]), counter[0].shape[1]), extreme),) * 4,
        )
        uniform = keyed_uniform(0, Stream.EPS, torch.arange(2), 4)
        assert uniform.min() > 0
        assert uniform.max() < 1
        assert keyed_normal(0, Stream.EPS, torch.arange(2), (4,)).abs().max() < 6.8
        assert 0 <= timesteps(0, torch.arange(2)).max() < 1000


def test_timesteps_are_uniform_over_all_of_the_chain() -> None:
    t = timesteps(4, torch.arange(1_000_000))
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=1000).double()
    assert len(counts) == 1000
    chi_squared = ((counts - 1000) ** 2 / 1000).sum().item()
    assert abs(chi_squared - 999) < 5 * (2 * 999) ** 0.5


def test_flips_have_their_probability() -> None:
    index = torch.arange(100_000)
    for probability in (0.0, 0.3, 0.5, 1.0):
        share = keyed_flips(4, index, probability).double().mean().item()
        assert abs(share - probability) <= 5 * (probability * (1 - probability) / 100_000) ** 0.5
    assert keyed_flips(4, index).dtype == torch.bool


def test_integers_for_other_generators_differ_and_fit() -> None:
    numbers = [keyed_int(5, Stream.DROPOUT, index) for index in range(1000)]
    assert all(0 <= number < 2**63 for number in numbers)
    assert len(set(numbers)) == 1000
    assert max(numbers) > 2**62
    assert all(a != b for a, b in combinations([keyed_int(5, stream, 0) for stream in Stream], 2))
    torch.Generator().manual_seed(max(numbers))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_into_one_graph_with_the_same_bits(backend: str) -> None:
    index = torch.arange(6)

    def draw(index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        exact = timesteps(3, index), keyed_flips(3, index), keyed_bits(3, Stream.EPS, index, 301)
        return *exact, keyed_normal(3, Stream.EPS, index, (3, 9, 9))

    *exact, normal = draw(index)
    *compiled_exact, compiled_normal = torch.compile(draw, backend=backend, fullgraph=True)(index)
    for one, other in zip(compiled_exact, exact, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(compiled_normal, normal, rtol=0, atol=2e-6)  # another log, sin and cos


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed=.*must be in"):
        keyed_bits(seed, Stream.EPS, torch.arange(2), 1)
    with pytest.raises(ValueError, match=r"seed=.*must be in"):
        keyed_int(seed, Stream.EPS, 0)


@pytest.mark.parametrize("sub", [-1, 2**24])
def test_subs_out_of_range_are_refused(sub: int) -> None:
    with pytest.raises(ValueError, match=r"sub=.*must be in"):
        keyed_bits(0, Stream.EPS, torch.arange(2), 1, sub)
