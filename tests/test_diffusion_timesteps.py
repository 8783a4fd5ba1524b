"""Importance sampling of t: the published algorithm, one loss at a time."""

import itertools
import math

import pytest
import torch

from trainer.diffusion.ddpm.timesteps import ImportanceSampling, UniformTimesteps, timestep_uniform
from trainer.diffusion.keyed_noise import KeyedNoise


class Sequential:
    """Nichol and Dhariwal 2021, section 3.3, with lists."""

    def __init__(self, timesteps: int) -> None:
        self.losses: list[list[float]] = [[] for _ in range(timesteps)]

    def record(self, t: int, loss: float) -> None:
        self.losses[t] = [*self.losses[t], loss][-10:]

    def probabilities(self) -> list[float]:
        timesteps = len(self.losses)
        if any(len(losses) < 10 for losses in self.losses):
            return [1 / timesteps] * timesteps
        roots = [math.sqrt(sum(loss**2 for loss in losses) / 10) for losses in self.losses]
        return [0.999 * root / sum(roots) + 0.001 / timesteps for root in roots]


def filled(timesteps: int, seed: int = 0) -> ImportanceSampling:
    sampling = ImportanceSampling(timesteps)
    t = torch.arange(timesteps).repeat(10)
    spread = torch.exp(torch.linspace(2, -4, timesteps))[t]
    sampling.record(t, spread * torch.rand(len(t), generator=torch.Generator().manual_seed(seed)))
    return sampling


@pytest.mark.parametrize("size", [1, 3, 17, 120])
def test_a_batch_counts_as_its_losses_one_by_one(size: int) -> None:
    """Batches of many repeats: fewer than the history, as many, and several times as many."""
    generator = torch.Generator().manual_seed(size)
    sampling, reference = ImportanceSampling(7), Sequential(7)
    history, counts = sampling.history, sampling.counts
    for batch in range(40 if size < 100 else 8):
        # uneven: timestep 6 comes rarely, so that histories of all lengths meet
        t = torch.randint(0, 49, (size,), generator=generator).double().sqrt().long().sub(6).abs()
        losses = torch.rand(size, generator=generator) * 10
        sampling.record(t, losses)
        for step, loss in zip(t.tolist(), losses.tolist()):
            reference.record(step, loss)
        padded = [row + [0.0] * (10 - len(row)) for row in reference.losses]
        assert sampling.history.tolist() == padded, batch
        assert sampling.counts.tolist() == [len(row) for row in reference.losses]
        assert sampling.probabilities().tolist() == pytest.approx(reference.probabilities(), rel=1e-6)
    assert sampling.history is history  # whoever holds the tensors sees the state
    assert sampling.counts is counts
    assert (size < 17) or min(sampling.counts.tolist()) == 10


def test_it_is_uniform_until_the_last_timestep_is_full() -> None:
    sampling = ImportanceSampling(4)
    t = torch.arange(4).repeat(10)
    sampling.record(t[:-1], 1 + t[:-1].float())
    assert sampling.probabilities().tolist() == [0.25] * 4
    _, weight = sampling.quantiles(torch.tensor([0.1, 0.9]))
    assert weight.tolist() == [1, 1]
    sampling.record(t[-1:], torch.tensor([4.0]))
    expected = [0.999 * loss / 10 + 0.00025 for loss in (1, 2, 3, 4)]
    assert sampling.probabilities().tolist() == pytest.approx(expected, rel=1e-12)


def test_draws_invert_the_distribution_function() -> None:
    sampling = filled(50)
    probabilities = sampling.probabilities().tolist()
    edges = [sum(probabilities[:t]) for t in range(51)]
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(edges)], dtype=torch.float64)
    t, weight = sampling.quantiles(middles)
    assert t.tolist() == list(range(50))
    assert weight.dtype == torch.float32
    assert weight.tolist() == pytest.approx([1 / (50 * p) for p in probabilities], rel=1e-6)
    assert sampling.quantiles(torch.tensor([0.0]))[0].item() == 0
    assert sampling.quantiles(torch.tensor([1.0]))[0].item() == 49  # and not one beyond


def test_the_weighted_mean_is_unbiased() -> None:
    sampling = filled(40)
    loss_of = torch.exp(torch.linspace(2, -4, 40, dtype=torch.float64))
    probabilities = sampling.probabilities()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    count = 400_000
    t, weight = sampling.quantiles(timestep_uniform(KeyedNoise.training(3, torch.arange(count))))
    # by chi-squared, the draws have these probabilities
    expected = count * probabilities
    chi_squared = ((torch.bincount(t, minlength=40) - expected) ** 2 / expected).sum().item()
    assert abs(chi_squared - 39) < 5 * math.sqrt(2 * 39)
    # and so the weighted loss has the mean of the plain one, with far less spread than uniform draws give it
    weighted = weight.double() * loss_of[t]
    assert abs(weighted.mean() - loss_of.mean()) < 5 * weighted.std() / math.sqrt(count)
    assert weighted.std() < 0.3 * loss_of.std()


def test_draws_are_keyed_by_position_with_all_bits() -> None:
    index = torch.arange(100_000)
    uniform = timestep_uniform(KeyedNoise.training(9, index))
    assert uniform.dtype == torch.float64
    assert torch.equal(timestep_uniform(KeyedNoise.training(9, index[500:600])), uniform[500:600])
    assert not torch.equal(timestep_uniform(KeyedNoise.training(8, index)), uniform)
    assert 0 <= uniform.min() < 1e-4
    assert 1 - 1e-4 < uniform.max() < 1
    # before there is a history, t is what the uniform draw would be
    t, _ = ImportanceSampling(1000).quantiles(uniform)
    assert torch.equal(t, UniformTimesteps(1000).draw(KeyedNoise.training(9, index))[0])
    assert (uniform.float().double() != uniform).double().mean() > 0.8  # float32 would round most of them


def test_it_needs_no_word_from_the_device() -> None:
    """A tensor on "meta" has no values: any read of one by the host is an error."""
    sampling = ImportanceSampling(30, device="meta")
    t, weight = sampling.quantiles(timestep_uniform(KeyedNoise.training(0, torch.arange(8, device="meta"))))
    sampling.record(t, torch.zeros(8, device="meta"))
    assert (t.dtype, weight.dtype) == (torch.int64, torch.float32)
    assert (sampling.history.dtype, sampling.history.shape) == (torch.float32, (30, 10))
    assert (sampling.counts.dtype, sampling.counts.shape) == (torch.int64, (30,))


def test_losses_with_a_graph_leave_none_in_the_history() -> None:
    sampling = ImportanceSampling(3)
    sampling.record(torch.tensor([0, 2]), torch.ones(2, requires_grad=True) * 2)
    assert not sampling.history.requires_grad
    assert sampling.history[[0, 2], 0].tolist() == [2, 2]
