"""Bits per dimension: the decoder, the divergences and the bound, against brute force and the paper's numbers."""

import math

import numpy as np
import pytest
import torch

from tests.diffusion_reference import decoder_nll, images, linear, normal
from trainer.diffusion.ddpm.likelihood import (
    BitsPerDim,
    bits_per_dim,
    discretised_gaussian_nll,
    normal_kl,
    prior_bits,
    rate_distortion,
    term_bits,
)
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.respacing import kept_timesteps
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.ddpm.schedules import make_betas
from trainer.diffusion.keyed_noise import Stream, keyed_normal

REFERENCE = linear()
VALUES = torch.arange(256) / 127.5 - 1
MEANS = torch.tensor([-1.3, -1.0, -0.5, 0.0, 0.003, 0.71, 1.0, 1.2])
# The decoder's own scale, one narrower than a bin and wide ones such as a learned variance may have.
SCALES = torch.tensor([1e-3, math.sqrt(5.45318766e-5), 0.05, 0.4, 1.0, 3.0])


@pytest.fixture(scope="module")
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(make_betas("linear", 1000))


def all_bins(cdf: str) -> torch.Tensor:
    """-log mass of every value under every mean and scale: (256, 8, 6)."""
    return discretised_gaussian_nll(VALUES[:, None, None], MEANS[:, None], SCALES.log(), cdf)


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
def test_the_decoders_bins_sum_to_one(cdf: str) -> None:
    """To 1e-6, but for a scale of an eighth of a bin, where an edge that float32 rounds two ways shows."""
    sums = all_bins(cdf).double().neg().exp().sum(dim=0)
    torch.testing.assert_close(sums[:, 0], torch.ones_like(sums[:, 0]), rtol=0, atol=3e-5)
    torch.testing.assert_close(sums[:, 1:], torch.ones_like(sums[:, 1:]), rtol=0, atol=4e-6)


def test_the_exact_decoder_is_exact_in_both_tails_and_narrow_bins() -> None:
    ours = all_bins("exact").double()
    x, mean, scale = torch.broadcast_tensors(VALUES[:, None, None], MEANS[:, None], SCALES)
    theirs = decoder_nll(x.double(), mean.double(), scale.double())
    assert theirs.max() == pytest.approx(-math.log(1e-12))
    assert ((theirs > 20) & (theirs < 27)).sum() > 10  # far out, where a difference of float32 CDFs is 0
    # z itself is known to 1e-7 / scale, and the loss moves by |z| times that
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-4)
    usual = (scale >= 0.05) & (scale <= 0.4)
    torch.testing.assert_close(ours[usual], theirs[usual], rtol=3e-6, atol=3e-5)


def test_bins_have_half_width_1_255_and_the_outermost_have_no_end() -> None:
    """One value in the middle and the two ends, by integration of the density."""
    mean, scale = 0.1, 0.02
    grid = np.linspace(-3, 3, 6_000_001)
    density = np.exp(-((grid - mean) ** 2) / (2 * scale**2)) / (scale * math.sqrt(2 * math.pi)) * (grid[1] - grid[0])
    for value in (140, 136):
        x = value / 127.5 - 1
        mass = density[(grid > x - 1 / 255) & (grid < x + 1 / 255)].sum()
        nll = discretised_gaussian_nll(torch.tensor(x), torch.tensor(mean), torch.tensor(math.log(scale)))
        assert nll.item() == pytest.approx(-math.log(mass), rel=1e-3)
    for end in (-1.0, 1.0):
        beyond = discretised_gaussian_nll(torch.tensor(end), torch.tensor(end * 1.5), torch.tensor(math.log(0.01)))
        assert beyond.item() == pytest.approx(0, abs=1e-6)


def test_the_authors_cdf_is_off_by_at_most_1_8e_4() -> None:
    """The first value's mass is a CDF."""
    mean = torch.linspace(-6, 4, 20_001)
    masses = {
        cdf: discretised_gaussian_nll(torch.tensor(-1.0), mean, torch.tensor(0.0), cdf).double().neg().exp()
        for cdf in ("exact", "tanh")
    }
    error = (masses["exact"] - masses["tanh"]).abs().max().item()
    assert 1.7e-4 < error < 1.8e-4
    # and it is their formula
    z = -1 + 1 / 255 - mean.double()
    theirs = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    torch.testing.assert_close(masses["tanh"], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
def test_no_mass_counts_as_less_than_1e_12(cdf: str) -> None:
    x, log_scale = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(math.log(0.007))
    nll = discretised_gaussian_nll(x, torch.tensor([0.9, 0.9, -0.9]), log_scale, cdf)
    assert nll.tolist() == pytest.approx([-math.log(1e-12)] * 3, rel=1e-6)


def test_the_divergence_of_normals_is_its_integral() -> None:
    grid = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    for mean1, variance1, mean2, variance2 in ((0.3, 0.5, -0.2, 2.0), (1.0, 2.0, 1.0, 0.4), (0.0, 1.0, 2.0, 1.0)):
        p = torch.distributions.Normal(mean1, math.sqrt(variance1)).log_prob(grid)
        q = torch.distributions.Normal(mean2, math.sqrt(variance2)).log_prob(grid)
        integral = ((p.exp() * (p - q)).sum() * (grid[1] - grid[0])).item()
        ours = normal_kl(*(torch.tensor(v) for v in (mean1, math.log(variance1), mean2, math.log(variance2))))
        assert ours.item() == pytest.approx(integral, rel=1e-5)


def test_the_divergence_of_nearly_equal_variances_is_not_rounding() -> None:
    """A thousand of these make up the bound; d^2 / 4 is 2.5e-9 here, where float32's 1 has a last bit of 6e-8."""
    log_variance = torch.tensor(0.0)
    ours = normal_kl(torch.zeros(()), log_variance, torch.zeros(()), torch.tensor(1e-4))
    assert ours.item() == pytest.approx(2.5e-9, rel=0.02)


@pytest.mark.parametrize(("second_moment", "golden"), [(0.25, 7.3e-6), (0.4, 1.16e-5)])
def test_the_prior_has_its_golden_values(diffusion: GaussianDiffusion, second_moment: float, golden: float) -> None:
    x0 = torch.full((2, 3, 4, 4), math.sqrt(second_moment))
    x0[:, 1] *= -1
    bits = prior_bits(diffusion, x0)
    assert bits.shape == (2,)
    assert bits.tolist() == pytest.approx([golden] * 2, rel=7e-3)  # as printed
    abar = REFERENCE.abar(999)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(math.sqrt(abar) * x0.double(), math.sqrt(1 - abar)),
        torch.distributions.Normal(0.0, torch.ones((), dtype=torch.float64)),
    )
    assert bits.tolist() == pytest.approx([kl.mean().item() / math.log(2)] * 2, rel=1e-5)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """No good denoiser, and its x_0 leaves [-1, 1]; its second half is a variance near the posterior's."""
    phase = t[:, None, None, None] / 300
    return torch.cat((0.9 * x + 0.2 * torch.sin(3 * x + phase), torch.cos(x + phase)), dim=1)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["small", "large", "learned-range"])
def test_a_term_is_that_of_the_equations(diffusion: GaussianDiffusion, variance: str, clip: bool) -> None:
    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(x, t)[:, : 6 if variance == "learned-range" else 3]

    x0, eps, t = images(1, 5), normal(2, 5, 3, 4, 4), torch.tensor([0, 1, 30, 600, 999])
    x_t = diffusion.q_sample(x0, t, eps)
    terms = term_bits(ReverseProcess(net, diffusion, variance=variance), x0, x_t, t, clip=clip)
    output = net(x_t, t)
    for row, step in enumerate(t.tolist()):
        x, noised = x0[row].double(), x_t[row].double()
        x0_hat, eps_hat, *p = REFERENCE.reverse("eps", variance, output[row].double(), noised, step, clip)
        assert terms.bits[row].item() == pytest.approx(REFERENCE.bound_bits(x, noised, step, *p).item(), rel=1e-4)
        assert terms.x0_mse[row].item() == pytest.approx(((x0_hat - x) ** 2).mean().item(), rel=1e-4)
        assert terms.eps_mse[row].item() == pytest.approx(((eps_hat - eps[row]) ** 2).mean().item(), rel=1e-3)


def test_the_clamp_and_the_cdf_are_options_of_a_term(diffusion: GaussianDiffusion) -> None:
    reverse = ReverseProcess(lambda x, t: network(x, t)[:, :3], diffusion, variance="small")
    x0, t = images(1, 2), torch.tensor([0, 700])
    x_t = diffusion.q_sample(x0, t, normal(2, 2, 3, 4, 4))
    default, free, tanh = (term_bits(reverse, x0, x_t, t, **kw) for kw in ({}, {"clip": False}, {"cdf": "tanh"}))
    assert default.bits[1] < 0.9 * free.bits[1]
    assert tanh.bits[0] != default.bits[0]
    assert tanh.bits[0].item() == pytest.approx(default.bits[0].item(), rel=0.01)
    assert tanh.bits[1] == default.bits[1]


@pytest.mark.parametrize("spec", ["all", "ddim10", "quadratic10"])
def test_the_bound_has_one_keyed_draw_for_each_image_and_timestep(spec: str) -> None:
    whole = GaussianDiffusion(make_betas("linear", 50))
    steps = kept_timesteps(50, spec)
    told: list[int] = []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told.append(int(t[0]))
        return network(x, t)[:, :3]

    reverse = ReverseProcess(net, whole, variance="small").respaced(steps)
    x0, index, seen = images(3, 3), torch.tensor([4, 2**40, 7]), []
    result = bits_per_dim(reverse, x0, index, 5, on_step=seen.append)
    assert told == steps.tolist()[::-1]
    assert seen == list(range(len(steps)))[::-1]
    assert result.bits.shape == result.x0_mse.shape == result.eps_mse.shape == (3, len(steps))
    for column, original in enumerate(steps.tolist()):
        t = torch.full((3,), column)
        eps = keyed_normal(5, Stream.LIKELIHOOD, index, (3, 4, 4), sub=original)
        terms = term_bits(reverse, x0, reverse.diffusion.q_sample(x0, t, eps), t)
        assert torch.equal(result.bits[:, column], terms.bits)
        assert torch.equal(result.x0_mse[:, column], terms.x0_mse)
        assert torch.equal(result.eps_mse[:, column], terms.eps_mse)
    assert torch.equal(result.prior, prior_bits(reverse.diffusion, x0))
    torch.testing.assert_close(result.total, result.prior + result.bits.sum(1))
    alone = bits_per_dim(reverse, x0[[2]], index[[2]], 5)
    assert torch.equal(alone.bits, result.bits[[2]])


def test_evaluation_passes_its_options_on_and_leaves_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    diffusion = GaussianDiffusion(make_betas("linear", 20))
    reverse = ReverseProcess(lambda x, t: weight * network(x, t)[:, :3], diffusion, variance="small")
    x0, index = images(3, 2), torch.arange(2)
    default = bits_per_dim(reverse, x0, index, 5)
    assert not default.bits.requires_grad
    free = bits_per_dim(reverse, x0, index, 5, clip=False)
    assert (free.bits[:, 10:] > default.bits[:, 10:]).any()
    tanh = bits_per_dim(reverse, x0, index, 5, cdf="tanh")
    assert torch.equal(tanh.bits[:, 1:], default.bits[:, 1:])
    assert not torch.equal(tanh.bits[:, 0], default.bits[:, 0])


def test_rate_and_distortion_add_up_as_in_figure_5() -> None:
    """After one reverse step a receiver has paid the prior; after the last, all but the decoder."""
    bits = torch.tensor([[1.9, 0.5, 0.25, 0.125]])  # t = 0 (the decoder), 1, 2, 3
    mse = torch.tensor([[0.01, 0.04, 0.09, 0.16]])
    prior = torch.tensor([0.001])
    curve = rate_distortion(BitsPerDim(bits=bits, x0_mse=mse, eps_mse=mse, prior=prior))
    assert curve.rate[0].tolist() == pytest.approx([0.001, 0.126, 0.376, 0.876])
    assert curve.mse.sqrt()[0].tolist() == pytest.approx([0.4 * 127.5, 0.3 * 127.5, 0.2 * 127.5, 0.1 * 127.5])
