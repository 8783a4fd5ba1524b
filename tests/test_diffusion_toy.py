"""Data whose diffusion is known in closed form: what samplers and the bound give with the optimal network."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from tests.diffusion_reference import decoder_nll
from trainer.diffusion.contract import SamplingStep
from trainer.diffusion.ddpm.likelihood import bits_per_dim
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.respacing import kept_timesteps
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.ddpm.schedules import make_betas
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.sampling.ancestral import ancestral
from trainer.sampling.ddim import ddim
from trainer.sampling.steps import last_of

WHOLE = GaussianDiffusion(make_betas("linear", 1000))
ABAR = WHOLE.abar64
COUNT = 10_000
STEPS = "quadratic100"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Independent pixels of a mixture of Gaussians."""

    shares: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.tensor(v, dtype=torch.float64) for v in (self.shares, self.means, self.deviations))

    def posterior(self, x: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_0 given x_t, by Bayes in each component."""
        shares, means, deviations = self.components()
        x, abar = x.double()[..., None], abar[..., None]
        spread = abar * deviations**2 + 1 - abar
        log_weight = shares.log() - 0.5 * spread.log() - (x - abar.sqrt() * means) ** 2 / (2 * spread)
        weight = log_weight.softmax(dim=-1)
        mean = means + abar.sqrt() * deviations**2 / spread * (x - abar.sqrt() * means)
        second = mean**2 + deviations**2 * (1 - abar) / spread
        first = (weight * mean).sum(-1)
        return first, (weight * second).sum(-1) - first**2

    def moments(self) -> tuple[float, ...]:
        """Mean and second to fourth central moments."""
        shares, means, deviations = self.components()
        mean = (shares * means).sum()
        off = means - mean
        second = (shares * (off**2 + deviations**2)).sum()
        third = (shares * (off**3 + 3 * off * deviations**2)).sum()
        fourth = (shares * (off**4 + 6 * off**2 * deviations**2 + 3 * deviations**4)).sum()
        return tuple(moment.item() for moment in (mean, second, third, fourth))

    def masses(self) -> Tensor:
        """Probabilities of the 256 values: each has the mass of its bin, the outermost that of a tail."""
        shares, means, deviations = self.components()
        edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 127.5 - 1
        cdf = (shares * torch.special.ndtr((edges[:, None] - means) / deviations)).sum(-1)
        cdf[0], cdf[-1] = 0, 1
        return cdf.diff()


GAUSSIAN = Mixture(shares=(1.0,), means=(0.1,), deviations=(0.25,))
TWO_MODES = Mixture(shares=(0.3, 0.7), means=(-0.5, 0.4), deviations=(0.1, 0.15))


def optimal(data: Mixture, steps: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """eps = E[eps | x_t] and the v whose variance is Var[x_{t-1} | x_t], in the chain that visits `steps`."""
    chain = WHOLE.respaced(steps)
    betas = 1 - chain.abar64 / torch.cat((torch.ones(1), chain.abar64[:-1]))
    position_of = torch.zeros(1000, dtype=torch.int64)
    position_of[steps] = torch.arange(len(steps))

    def network(x: Tensor, t: Tensor) -> Tensor:
        expand = lambda table: table[:, None, None, None].expand_as(x)  # noqa: E731
        position = position_of[t]
        abar = expand(ABAR[t])
        x0, x0_variance = data.posterior(x, abar)
        eps = (x.double() - abar.sqrt() * x0) / (1 - abar).sqrt()
        beta, abar_prev = expand(betas[position]), expand(torch.where(position > 0, chain.abar64[position - 1], 1.0))
        beta_tilde = beta * (1 - abar_prev) / (1 - abar)
        variance = beta_tilde + (beta * abar_prev.sqrt() / (1 - abar)) ** 2 * x0_variance
        first = betas[1] * (1 - chain.abar64[0]) / (1 - chain.abar64[1])
        low = torch.where(expand(position) > 0, beta_tilde, first).log()
        v = 2 * (variance.log() - low) / (beta.log() - low) - 1
        return torch.cat((eps, v), dim=1).float()

    return network


def process(data: Mixture, variance: str, spec: str) -> ReverseProcess:
    steps = kept_timesteps(1000, spec)
    network = optimal(data, steps)
    if variance != "learned-range":
        both, network = network, lambda x, t: both(x, t)[:, :1]
    return ReverseProcess(network, WHOLE, variance=variance).respaced(steps)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sampler, with what 100 steps of it may at most add to the data's variance, as a share of it.

    Too small a variance, or an ODE solved by Euler's method, contracts the samples; too large a one spreads them.
    mean_eta: the eta of its mean (equation 12 of DDIM); noise: which variance it adds.
    """

    sampler: Callable[..., Iterator[SamplingStep]]
    bias: float
    variance: str = "small"
    mean_eta: float = 1.0
    noise: str = "small"


CASES = {
    "ancestral-small": Case(sampler=ancestral, bias=-0.09),
    "ancestral-large": Case(sampler=ancestral, bias=0.05, variance="large", noise="large"),
    "ancestral-learned-range": Case(sampler=ancestral, bias=-0.002, variance="learned-range", noise="learned-range"),
    "ddim-0": Case(sampler=ddim, bias=-0.04, mean_eta=0.0),
    "ddim-half": Case(sampler=functools.partial(ddim, eta=0.5), bias=-0.05, mean_eta=0.5),
    "ddim-1": Case(sampler=functools.partial(ddim, eta=1.0), bias=-0.09),
    "sigma-hat": Case(sampler=functools.partial(ddim, eta=1.0, sigma_hat=True), bias=0.05, noise="large"),
}


def draw(case: Case, data: Mixture) -> Tensor:
    index = torch.arange(COUNT)
    x = KeyedNoise.sampling(5, index).normal("initial", (1, 1, 1))
    reverse = process(data, case.variance, STEPS)
    return last_of(case.sampler(reverse, x, noise=KeyedNoise.sampling(5, index), clip=False)).double().flatten()


def gaussian_output(case: Case, spec: str) -> tuple[float, float]:
    """Mean and variance of a chain of affine steps on Gaussian data, by recursion."""
    steps = kept_timesteps(1000, spec).tolist()
    m, s2 = GAUSSIAN.means[0], GAUSSIAN.deviations[0] ** 2
    abars = [1.0, *(ABAR[t].item() for t in steps)]
    off, variance = -math.sqrt(abars[-1]) * m, 1.0
    for before, abar in reversed(list(itertools.pairwise(abars))):
        total = abar * s2 + 1 - abar
        slope_x0 = math.sqrt(abar) * s2 / total
        slope_eps = (1 - math.sqrt(abar) * slope_x0) / math.sqrt(1 - abar)
        beta = 1 - abar / before
        beta_tilde = beta * (1 - before) / (1 - abar)
        slope = math.sqrt(before) * slope_x0 + math.sqrt(1 - before - case.mean_eta**2 * beta_tilde) * slope_eps
        added = {"large": beta, "small": case.mean_eta**2 * beta_tilde}.get(
            case.noise, beta_tilde + (beta * math.sqrt(before) / (1 - abar)) ** 2 * s2 * (1 - abar) / total
        )
        off, variance = slope * off, slope**2 * variance + (added if before < 1 else 0)
    return m + off, variance


@pytest.mark.parametrize("name", list(CASES))
def test_samples_of_a_gaussian_have_exactly_the_moments_that_the_chain_gives_them(name: str) -> None:
    x = draw(CASES[name], GAUSSIAN)
    mean, variance = gaussian_output(CASES[name], STEPS)
    assert abs(x.mean() - mean) < 5 * math.sqrt(variance / COUNT)
    assert abs(x.var() / variance - 1) < 5 * math.sqrt(2 / COUNT)
    # a Gaussian, so nothing beyond its first two moments
    z = (x - x.mean()) / x.std()
    assert abs(z.pow(3).mean()) < 5 * math.sqrt(6 / COUNT)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(24 / COUNT)
    # and they are those of the data, up to the length of the steps
    assert abs(mean - GAUSSIAN.means[0]) < 0.003
    over, bias = variance / GAUSSIAN.deviations[0] ** 2 - 1, CASES[name].bias
    assert 0 < over / bias < 1
    if name != "ancestral-learned-range":  # it is right with any steps, less the last noise, which is not added
        _, with_all = gaussian_output(CASES[name], "all")
        assert 0 < (with_all / GAUSSIAN.deviations[0] ** 2 - 1) / over < 0.5


@pytest.mark.parametrize("name", list(CASES))
def test_samples_of_a_mixture_have_its_moments(name: str) -> None:
    x, case = draw(CASES[name], TWO_MODES), CASES[name]
    mean, second, third, fourth = TWO_MODES.moments()
    off = x - x.mean()
    assert abs(x.mean() - mean) < 5 * math.sqrt(second / COUNT) + 0.003
    # each within five standard errors, once those of the chain's own bias are allowed for
    low, high = min(case.bias, 0), max(case.bias, 0)
    error = 5 * math.sqrt((fourth - second**2) / COUNT) / second
    assert low - error < off.square().mean() / second - 1 < high + error
    error = 5 * off.pow(3).std() / math.sqrt(COUNT)
    assert abs(off.pow(3).mean() - third) < error + 2 * abs(case.bias * third)
    error = 5 * off.pow(4).std() / math.sqrt(COUNT) / fourth
    assert 2 * low - error < off.pow(4).mean() / fourth - 1 < 2 * high + error
    in_first = (x < 0).double().mean()  # no mode loses its share
    assert abs(in_first - 0.3 - 0.7 * 0.0038) < 5 * math.sqrt(0.21 / COUNT)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES], ids=["gaussian", "mixture"])
def test_a_second_order_solver_runs_on_our_conventions(data: Mixture) -> None:
    """diffusers' multistep DPM-Solver++ over 39 of our timesteps: nearer to the data than its own first order."""
    reverse = process(data, "small", "quadratic40")
    mean, second, *_ = data.moments()
    over = {}
    for order in (1, 2):
        scheduler = DPMSolverMultistepScheduler(trained_betas=make_betas("linear", 1000).numpy(), solver_order=order)
        scheduler.set_timesteps(timesteps=reverse.diffusion.original_timesteps.tolist()[::-1])
        x = KeyedNoise.sampling(5, torch.arange(COUNT)).normal("initial", (1, 1, 1))
        for t in scheduler.timesteps:
            x = scheduler.step(reverse.network(x, t.repeat(COUNT)), t, x).prev_sample
        assert abs(x.mean() - mean) < 5 * math.sqrt(second / COUNT)
        over[order] = abs(x.var().item() / second - 1)
    assert over[2] < 0.035
    assert over[2] < 0.6 * over[1]


def expected_bound(data: Mixture, variance: str, spec: str, shares: Tensor) -> float:
    """Bits per dimension of the optimal network on pixels of which shares (256,) have each value.

    Quadrature over the values and the noise, in float64.
    """
    steps = kept_timesteps(1000, spec)
    abars = torch.cat((torch.ones(1, dtype=torch.float64), ABAR[steps]))
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(48))
    x0 = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    weights = shares[:, None] * weights / weights.sum()
    total = (weights * 0.5 * (abars[-1] * x0**2 - abars[-1] - torch.log1p(-abars[-1]))).sum()
    for position in range(len(steps)):
        before, abar = abars[position], abars[position + 1]
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * nodes
        x0_hat, x0_variance = data.posterior(x_t, abar)
        beta = 1 - abar / before
        beta_tilde = beta * (1 - before) / (1 - abar)
        coefficient = beta * before.sqrt() / (1 - abar)
        if variance == "learned-range":
            sigma2 = beta_tilde + coefficient**2 * x0_variance
        else:
            first = (1 - abars[2] / abars[1]) * (1 - abars[1]) / (1 - abars[2])
            fixed = first if position == 0 else (beta if variance == "large" else beta_tilde)
            sigma2 = fixed.expand_as(x_t)
        if position == 0:
            term = decoder_nll(x0.expand_as(x_t), x0_hat, sigma2.sqrt())
        else:
            ratio = beta_tilde / sigma2
            term = 0.5 * (ratio - 1 - ratio.log() + coefficient**2 * (x0 - x0_hat) ** 2 / sigma2)
        total = total + (weights * term).sum()
    return total.item() / math.log(2)


def pixels(data: Mixture) -> tuple[Tensor, Tensor]:
    """16 images (16, 1, 16, 16), and the share of each value among their pixels (256,)."""
    values = torch.multinomial(data.masses(), 16 * 256, replacement=True, generator=torch.Generator().manual_seed(3))
    shares = torch.bincount(values, minlength=256).double() / len(values)
    return (values / 127.5 - 1).reshape(16, 1, 16, 16), shares


@pytest.mark.parametrize(
    "data", [GAUSSIAN, pytest.param(TWO_MODES, marks=pytest.mark.slow)], ids=["gaussian", "mixture"]
)
def test_bits_per_dim_are_the_entropy_of_the_data(data: Mixture) -> None:
    """With the optimal network and variance, and 1000 steps: to 0.002 bits by quadrature, and as measured."""
    masses = data.masses().clamp(min=1e-300)
    entropy = -(masses * masses.log2()).sum().item()
    assert entropy - 1e-4 < expected_bound(data, "learned-range", "all", masses) < entropy + 0.002
    x0, _ = pixels(data)
    own = -masses[((x0 + 1) * 127.5).round().long()].log2().mean(dim=(1, 2, 3))  # of just these pixels
    over = bits_per_dim(process(data, "learned-range", "all"), x0, torch.arange(16), 3).total - own
    error = over.std() / 4
    assert error < 0.05
    assert abs(over.mean()) < 4 * error


# Of these pixels; the entropy of their distribution is 7.01.
BOUNDS = {"small": 7.92, "large": 7.18, "learned-range": 7.00}


@pytest.mark.parametrize("variance", list(BOUNDS))
def test_bits_per_dim_over_few_steps_are_the_bound_by_quadrature(variance: str) -> None:
    """Where the bound is not tight, each variance has its own."""
    x0, shares = pixels(TWO_MODES)
    bound = expected_bound(TWO_MODES, variance, STEPS, shares)
    total = bits_per_dim(process(TWO_MODES, variance, STEPS), x0, torch.arange(16), 3).total
    error = total.std() / 4
    assert error < 0.06
    assert abs(total.mean() - bound) < 4 * error
    assert bound - BOUNDS[variance] == pytest.approx(0, abs=0.02)
