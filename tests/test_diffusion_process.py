"""Schedules, q and its posterior: the paper's numbers, and formulas written again here in float64."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.schedules import cosine_betas, linear_betas, make_betas, sigmoid_betas, sqrt_linear_betas

T = 1000
BETAS = [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)]
ABAR = [math.prod(1 - beta for beta in BETAS[: i + 1]) for i in range(T)]


@pytest.fixture
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(make_betas("linear", T))


def images(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def test_the_linear_schedule_has_its_golden_values(diffusion: GaussianDiffusion) -> None:
    abar = torch.cumprod(1 - linear_betas(T), dim=0)
    assert abar.dtype == torch.float64
    assert abar[[0, 499, 999]].tolist() == pytest.approx([0.9999, 0.07858724288, 4.035829765e-5], rel=1e-9)
    assert diffusion.abar[[0, 499, 999]].tolist() == pytest.approx([0.9999, 0.07858724288, 4.035829765e-5], rel=6e-8)
    assert diffusion.log_beta_tilde[1].exp().item() == pytest.approx(5.45318766e-5, rel=1e-6)
    assert diffusion.timesteps == T


def test_the_cosine_schedule_has_its_golden_values() -> None:
    betas = cosine_betas(T)
    assert betas.dtype == torch.float64
    assert betas[0].item() == pytest.approx(4.128422482e-5, rel=1e-9)
    assert betas[-1].item() == 0.999
    assert (betas == 0.999).sum() == 1
    assert torch.cumprod(1 - betas, dim=0)[499].item() == pytest.approx(0.4938435904, rel=1e-9)


def test_linear_betas_are_scaled_with_the_length_of_the_chain() -> None:
    assert linear_betas(50)[[0, -1]].tolist() == pytest.approx([0.002, 0.4], rel=1e-14)
    assert linear_betas(4000)[[0, -1]].tolist() == pytest.approx([2.5e-5, 0.005], rel=1e-14)
    assert linear_betas(4).tolist() == pytest.approx([0.025, 0.999, 0.999, 0.999], rel=1e-14)


def test_sqrt_linear_betas_are_what_diffusers_calls_scaled_linear() -> None:
    betas = sqrt_linear_betas(T)
    assert betas.dtype == torch.float64
    assert betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02], rel=1e-14)
    assert betas[500].item() == pytest.approx((0.01 + 500 / 999 * (math.sqrt(0.02) - 0.01)) ** 2, rel=1e-12)
    theirs = DDPMScheduler(T, beta_schedule="scaled_linear").betas
    torch.testing.assert_close(betas, theirs.double(), rtol=3e-6, atol=0)
    assert sqrt_linear_betas(250)[[0, -1]].tolist() == pytest.approx([4e-4, 0.08], rel=1e-13)
    assert sqrt_linear_betas(10).max().item() == 0.999


def test_sigmoid_abar_is_that_of_jabri_and_chen() -> None:
    """Algorithm 1 of Chen 2023 with start = -3, end = 3, tau = 1."""

    def gamma(u: float) -> float:
        sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
        return (sigmoid(3) - sigmoid(6 * u - 3)) / (sigmoid(3) - sigmoid(-3))

    betas = sigmoid_betas(T)
    assert betas.dtype == torch.float64
    abar = torch.cumprod(1 - betas, dim=0)
    assert abar[[0, 99, 499, 899]].tolist() == pytest.approx([gamma(u) for u in (0.001, 0.1, 0.5, 0.9)], rel=1e-9)
    assert gamma(0.5) == pytest.approx(0.5)
    assert betas[-1].item() == 0.999
    assert (betas == 0.999).sum() == 1


def test_a_table_of_betas_is_taken_as_it_is() -> None:
    table = [0.1, 0.5, 0.3]
    assert make_betas("table", 3, table).tolist() == table
    assert make_betas("table", 3, torch.tensor(table)).dtype == torch.float64
    for betas, message in (
        ([0.1, 0.2], r"table: must hold timesteps=3 betas, got shape \(2,\)"),
        ([0.1, 0.2, 1.0], r"table: betas must lie in \(0, 1\), got 0.1 to 1"),
        ([0.0, 0.2, 0.3], r"table: betas must lie in \(0, 1\), got 0 to 0.3"),
        ([math.nan, 0.2, 0.3], r"table: betas must lie in \(0, 1\)"),
        (None, "schedule='table': goes with a table"),
    ):
        with pytest.raises(ValueError, match=message):
            make_betas("table", 3, betas)
    with pytest.raises(ValueError, match="schedule='linear': goes without a table"):
        make_betas("linear", 3, table)


def test_schedules_are_chosen_by_name() -> None:
    for name, betas in (
        ("linear", linear_betas(30)),
        ("cosine", cosine_betas(30)),
        ("sqrt-linear", sqrt_linear_betas(30)),
        ("sigmoid", sigmoid_betas(30)),
    ):
        assert torch.equal(make_betas(name, 30), betas)
        assert ((betas > 0) & (betas < 1)).all()
        GaussianDiffusion(betas)
    with pytest.raises(ValueError, match="schedule='quad': must be one of linear, cosine, sqrt-linear, sigmoid, table"):
        make_betas("quad", 10)


@pytest.mark.parametrize(
    "betas",
    [
        linear_betas(10).float(),
        linear_betas(10)[None],
        linear_betas(10)[:1],
        torch.tensor([0.0, 0.1], dtype=torch.float64),
        torch.tensor([0.1, 1.0], dtype=torch.float64),
        torch.tensor([0.1, math.nan], dtype=torch.float64),
    ],
    ids=["float32", "2-D", "one step", "zero", "one", "nan"],
)
def test_betas_that_are_no_schedule_are_refused(betas: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="betas: must"):
        GaussianDiffusion(betas)


def test_q_sample_and_predict_x0_follow_equations_4_and_15(diffusion: GaussianDiffusion) -> None:
    x0, eps, t = images(1), images(2), torch.tensor([0, 1, 499, 999])
    x_t, x0_hat = diffusion.q_sample(x0, t, eps), diffusion.predict_x0(x0, t, eps)
    for row, step in enumerate(t.tolist()):
        a = ABAR[step]
        expected = math.sqrt(a) * x0[row].double() + math.sqrt(1 - a) * eps[row].double()
        torch.testing.assert_close(x_t[row].double(), expected, rtol=1e-6, atol=5e-7)
        expected = (x0[row].double() - math.sqrt(1 - a) * eps[row].double()) / math.sqrt(a)
        torch.testing.assert_close(x0_hat[row].double(), expected, rtol=1e-6, atol=5e-7 / math.sqrt(a))
    torch.testing.assert_close(diffusion.predict_x0(x_t, t, eps)[:3], x0[:3], rtol=0, atol=1e-5)


def test_eps_v_and_mu_are_undone_by_what_makes_them(diffusion: GaussianDiffusion) -> None:
    x0, eps, t = images(1), images(2), torch.tensor([0, 1, 300, 999])
    x_t, v = diffusion.q_sample(x0, t, eps), diffusion.v_target(x0, t, eps)
    for row, step in enumerate(t.tolist()):  # Salimans and Ho 2022: a rotation of (x_0, eps)
        expected = math.sqrt(ABAR[step]) * eps[row].double() - math.sqrt(1 - ABAR[step]) * x0[row].double()
        torch.testing.assert_close(v[row].double(), expected, rtol=0, atol=5e-7)
    torch.testing.assert_close(diffusion.x0_from_v(x_t, t, v), x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(diffusion.eps_from_v(x_t, t, v), eps, rtol=0, atol=1e-6)
    torch.testing.assert_close(diffusion.predict_eps(x_t, t, x0), eps, rtol=0, atol=5e-5)
    mu = diffusion.posterior_mean(x0, x_t, t)
    torch.testing.assert_close(diffusion.x0_from_mu(x_t, t, mu)[:3], x0[:3], rtol=0, atol=2e-4)
    torch.testing.assert_close(diffusion.x0_from_mu(x_t, t, mu)[3], x0[3], rtol=0, atol=5e-3)


def test_every_timestep_gets_its_noise_to_float32s_last_bits(diffusion: GaussianDiffusion) -> None:
    t = torch.arange(T)
    noise = diffusion.q_sample(torch.zeros(T, 1, 1, 1), t, torch.ones(T, 1, 1, 1)).flatten().double()
    expected = torch.tensor([math.sqrt(1 - a) for a in ABAR], dtype=torch.float64)
    torch.testing.assert_close(noise, expected, rtol=6e-8, atol=0)


@pytest.mark.parametrize("t", [1, 2, 300, 999])
def test_the_posterior_is_bayes_rule_on_a_grid(diffusion: GaussianDiffusion, t: int) -> None:
    x0, x_t = 0.3, 0.3 * math.sqrt(ABAR[t]) + 0.7 * math.sqrt(1 - ABAR[t])
    center = diffusion.posterior_mean(*torch.tensor([x0, x_t]).reshape(2, 1, 1, 1, 1), torch.tensor([t])).item()
    width = math.sqrt(BETAS[t])
    x = np.linspace(center - 12 * width, center + 12 * width, 400_001)  # candidates for x_{t-1}
    # q(x_t | x_{t-1}) q(x_{t-1} | x_0), equations 2 and 4
    log_density = -((x_t - math.sqrt(1 - BETAS[t]) * x) ** 2) / (2 * BETAS[t])
    log_density -= (x - math.sqrt(ABAR[t - 1]) * x0) ** 2 / (2 * (1 - ABAR[t - 1]))
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (x * density).sum()
    variance = ((x - mean) ** 2 * density).sum()
    assert center == pytest.approx(mean, abs=1e-6)
    log_variance = diffusion.posterior_log_variance(torch.tensor([t]), "small").item()
    assert log_variance == pytest.approx(math.log(variance), abs=2e-6)


def test_logs_of_variances(diffusion: GaussianDiffusion) -> None:
    t = torch.tensor([0, 1, 999])
    beta_tilde = [BETAS[i] * (1 - ABAR[i - 1]) / (1 - ABAR[i]) for i in (1, 1, 999)]  # index 0 is clipped to beta~_1
    betas = [beta_tilde[0], BETAS[1], BETAS[999]]
    for variance, expected in (("small", beta_tilde), ("large", betas)):
        logs = diffusion.posterior_log_variance(t, variance)
        assert logs.tolist() == pytest.approx([math.log(v) for v in expected], rel=1e-6)


def test_the_posterior_at_the_first_timestep_is_x0_itself(diffusion: GaussianDiffusion) -> None:
    assert torch.equal(diffusion.posterior_mean(images(1), images(2), torch.zeros(4, dtype=torch.int64)), images(1))


def test_everything_is_float32_under_bfloat16_autocast(diffusion: GaussianDiffusion) -> None:
    t = torch.tensor([0, 1, 499, 999])
    low, high = images(1).bfloat16(), images(2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = [
            diffusion.q_sample(low, t, high),
            diffusion.predict_x0(high, t, low),
            diffusion.posterior_mean(low, low, t),
        ]
    exact = [
        diffusion.q_sample(low.float(), t, high),
        diffusion.predict_x0(high, t, low.float()),
        diffusion.posterior_mean(low.float(), low.float(), t),
    ]
    for one, other in zip(cast, exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_float64_images_come_back_in_float32(diffusion: GaussianDiffusion) -> None:
    t, x = torch.tensor([0, 1, 499, 999]), images(1).double()
    for function in (
        diffusion.q_sample,
        diffusion.predict_x0,
        diffusion.predict_eps,
        diffusion.v_target,
        diffusion.x0_from_v,
        diffusion.eps_from_v,
        diffusion.x0_from_mu,
    ):
        assert function(x, t, images(2)).dtype == function(images(2), t, x).dtype == torch.float32
    assert diffusion.posterior_mean(x, images(2), t).dtype == torch.float32
    assert diffusion.posterior_mean(images(2), x, t).dtype == torch.float32


def test_tables_are_float32_and_move_together(diffusion: GaussianDiffusion) -> None:
    tables = {name: table for name, table in vars(diffusion).items() if name not in ("abar64", "original_timesteps")}
    assert {table.dtype for table in tables.values()} == {torch.float32}
    assert diffusion.to("meta") is diffusion
    assert {getattr(diffusion, name).device.type for name in tables} == {"meta"}
    assert diffusion.original_timesteps.device.type == "meta"
    assert (diffusion.abar64.device.type, diffusion.abar64.dtype) == ("cpu", torch.float64)
