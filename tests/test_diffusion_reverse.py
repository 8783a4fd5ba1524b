"""What a network's output means, for every prediction and variance."""

import math

import pytest
import torch

from tests.diffusion_reference import images, linear, normal
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.reverse import ReverseProcess, interpret, output_channels
from trainer.diffusion.ddpm.schedules import make_betas

T = torch.tensor([0, 1, 2, 499, 999])
REFERENCE = linear()
PREDICTIONS = ["eps", "x0", "mu", "v"]
VARIANCES = ["small", "large", "learned", "learned-range"]


@pytest.fixture(scope="module")
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(make_betas("linear", 1000))


def near_truth(prediction: str, variance: str, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and an output a little off the truth, so that x_0 stays of the order of 1 (or leaves [-1, 1] by a bit)."""
    x0, eps = images(1, len(T)), normal(2, len(T), 3, 4, 4)
    x_t = torch.stack([REFERENCE.x_t(*pair, t) for *pair, t in zip(x0.double(), eps.double(), T.tolist())]).float()
    outputs = []
    for row, t in enumerate(T.tolist()):
        target = REFERENCE.target(prediction, x0[row].double(), eps[row].double(), t)
        outputs.append(target + noise * math.sqrt(1e-4 if prediction == "mu" else 1) * normal(3 + row, 3, 4, 4))
    output = torch.stack(outputs)
    if output_channels(3, variance) == 6:
        output = torch.cat((output, normal(9, len(T), 3, 4, 4)), dim=1)
    return x_t, output.float()


def magnification(prediction: str, t: int) -> float:
    """How much x_0 moves with the prediction, and so with its rounding."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    slope = REFERENCE.x0_of(prediction, one, zero, t) - REFERENCE.x0_of(prediction, zero, zero, t)
    return max(abs(slope.item()), 1.0)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_is_what_the_equations_say(
    diffusion: GaussianDiffusion, prediction: str, variance: str, clip: bool
) -> None:
    x_t, output = near_truth(prediction, variance)
    reverse = ReverseProcess(lambda *_: output, diffusion, prediction=prediction, variance=variance)
    step = reverse(x_t, T).clipped() if clip else reverse(x_t, T)
    for row, t in enumerate(T.tolist()):
        expected = REFERENCE.reverse(prediction, variance, output[row].double(), x_t[row].double(), t, clip)
        scale = 4 * magnification(prediction, t)
        for ours, theirs, unit in (
            (step.x0, expected[0], scale),
            (step.eps, expected[1], scale / math.sqrt(1 - REFERENCE.abar(t))),
            (step.mean, expected[2], 4.0),
            (step.log_variance, expected[3], 10.0),
        ):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours[row].double(), theirs, rtol=0, atol=3e-7 * unit)
    # equation 4 holds between the three
    again = diffusion.q_sample(step.x0, T, step.eps)
    for row, t in enumerate(T.tolist()):
        torch.testing.assert_close(again[row], x_t[row], rtol=0, atol=1e-6 * magnification(prediction, t))


def test_the_clamp_reaches_x0_eps_and_mean(diffusion: GaussianDiffusion) -> None:
    """So that the test above would have seen it missing."""
    x_t, output = near_truth("eps", "small")
    free = interpret(output, x_t, T, diffusion=diffusion, prediction="eps", variance="small")
    clamped = free.clipped()
    assert clamped.x0.abs().max() == 1
    for name in ("x0", "eps", "mean"):
        assert (getattr(free, name) - getattr(clamped, name)).abs().max() > 1e-3


def test_a_mean_that_is_predicted_itself_stays_when_x0_is_clamped(diffusion: GaussianDiffusion) -> None:
    x_t, output = near_truth("mu", "small", noise=1)
    step = ReverseProcess(lambda *_: output, diffusion, prediction="mu", variance="small")(x_t, T).clipped()
    assert torch.equal(step.mean, output)
    assert step.x0.abs().max() == 1


@pytest.mark.parametrize("t", [0, 1, 500])
def test_a_learned_range_runs_from_beta_tilde_to_beta_and_beyond(diffusion: GaussianDiffusion, t: int) -> None:
    low = math.log(REFERENCE.beta_tilde(max(t, 1)))
    high = math.log(REFERENCE.betas[t])
    assert high > low
    for v, expected in ((-1, low), (1, high), (0, (low + high) / 2), (3, 2 * high - low), (-3, 2 * low - high)):
        output = torch.cat((torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), float(v))), dim=1)
        reverse = ReverseProcess(lambda *_, o=output: o, diffusion, variance="learned-range")
        step = reverse(torch.zeros(1, 1, 1, 1), torch.tensor([t]))
        assert step.log_variance.item() == pytest.approx(expected, rel=1e-6)


def test_the_first_half_of_the_channels_is_the_prediction(diffusion: GaussianDiffusion) -> None:
    assert [output_channels(3, variance) for variance in VARIANCES] == [3, 3, 6, 6]
    output = torch.arange(6.0).reshape(1, 6, 1, 1)
    x = torch.zeros(1, 3, 1, 1)
    step = ReverseProcess(lambda *_: output, diffusion, prediction="x0", variance="learned")(x, torch.tensor([7]))
    assert step.x0.flatten().tolist() == [0, 1, 2]
    assert step.log_variance.flatten().tolist() == [3, 4, 5]
    for variance, channels in (("learned", 3), ("small", 6)):
        reverse = ReverseProcess(lambda *_, c=channels: torch.zeros(1, c, 1, 1), diffusion, variance=variance)
        with pytest.raises(ValueError, match=f"output: must have {9 - channels} channels for variance='{variance}'"):
            reverse(x, torch.tensor([7]))


def test_names_that_are_not_known_are_refused(diffusion: GaussianDiffusion) -> None:
    with pytest.raises(ValueError, match="prediction='epsilon': must be one of eps, x0, mu, v"):
        ReverseProcess(lambda x, _: x, diffusion, prediction="epsilon", variance="small")
    with pytest.raises(ValueError, match="variance='fixed': must be one of small, large, learned, learned-range"):
        ReverseProcess(lambda x, _: x, diffusion, variance="fixed")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_is_float32_from_a_bfloat16_network_under_autocast(
    diffusion: GaussianDiffusion, prediction: str
) -> None:
    x_t, output = near_truth(prediction, "learned-range")
    arguments = {"diffusion": diffusion, "prediction": prediction, "variance": "learned-range"}
    exact = interpret(output.bfloat16().float(), x_t, T, **arguments).clipped()
    with torch.autocast("cpu", torch.bfloat16):
        step = interpret(output.bfloat16(), x_t, T, **arguments).clipped()
    for name in ("x0", "eps", "mean", "log_variance"):
        assert getattr(step, name).dtype == torch.float32
        assert torch.equal(getattr(step, name), getattr(exact, name))
