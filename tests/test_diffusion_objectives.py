"""GaussianObjectives: losses and gradients against float64 autograd through the papers' equations."""

import pytest
import torch

from tests.diffusion_reference import images, linear, normal
from trainer.diffusion.ddpm.objective import GaussianObjective
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.reverse import output_channels
from trainer.diffusion.ddpm.schedules import make_betas

T = torch.tensor([0, 0, 1, 2, 499, 999])
REFERENCE = linear()

TABLE_2 = [
    ("mu", "learned", "bound"),
    ("mu", "small", "bound"),
    ("mu", "large", "bound"),
    ("mu", "small", "mse"),
    ("eps", "learned", "bound"),
    ("eps", "small", "bound"),
    ("eps", "large", "bound"),
    ("eps", "large", "mse"),
]
SUCCESSORS = [
    ("eps", "learned-range", "hybrid"),
    ("eps", "learned-range", "bound"),
    ("mu", "learned-range", "hybrid"),
    ("x0", "learned-range", "hybrid"),
    ("x0", "small", "mse"),
    ("x0", "large", "bound"),
    ("v", "small", "mse"),
    ("v", "learned-range", "bound"),
    ("v", "learned-range", "hybrid"),
    ("v", "learned", "bound"),
]


@pytest.fixture(scope="module")
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(make_betas("linear", 1000))


def batch(prediction: str, variance: str) -> dict[str, torch.Tensor]:
    """Images, noise and a network's output not far from the truth; at t = 0 one image is off by many bins."""
    x0, eps = images(1, len(T)), normal(2, len(T), 3, 4, 4)
    rows = [(x0[row].double(), eps[row].double(), t) for row, t in enumerate(T.tolist())]
    x_t = torch.stack([REFERENCE.x_t(*row) for row in rows]).float()
    targets = torch.stack([REFERENCE.target(prediction, *row) for row in rows]).float()
    off = torch.full((len(T), 1, 1, 1), 0.003 if prediction == "mu" else 0.3)
    if prediction == "x0":
        off[:2] = 0.003
    output = targets + off * normal(3, *x0.shape)
    output[1] += 20 * off[1]
    if output_channels(3, variance) == 6:
        spread = normal(4, *x0.shape)
        if variance == "learned":
            logs = torch.tensor([REFERENCE.log_variance(t, "small") for t in T.tolist()])
            spread = logs[:, None, None, None] + 0.5 * spread
        output = torch.cat((output, spread), dim=1)
    return {"x0": x0, "x_t": x_t, "t": T, "eps": eps, "output": output}


def expected_losses(prediction: str, variance: str, loss: str, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same in float64, one image at a time; differentiable in data["output"]."""
    losses = []
    for row, t in enumerate(T.tolist()):
        x0, x_t, eps, output = (data[name][row].double() for name in ("x0", "x_t", "eps", "output"))
        squared = ((REFERENCE.target(prediction, x0, eps, t) - output[:3]) ** 2).mean()
        if loss == "hybrid":
            output = torch.cat((output[:3].detach(), output[3:]))
        _, _, mean, log_variance = (
            REFERENCE.reverse(prediction, variance, output, x_t, t) if loss != "mse" else [None] * 4
        )
        if loss == "mse":
            losses.append(squared)
        elif loss == "bound":
            losses.append(REFERENCE.bound_bits(x0, x_t, t, mean, log_variance))
        else:  # 0.001 L_vlb, of which one term stands for all T
            losses.append(squared + 0.001 * 1000 * REFERENCE.bound_bits(x0, x_t, t, mean, log_variance))
    return torch.stack(losses)


@pytest.mark.parametrize(("prediction", "variance", "loss"), TABLE_2 + SUCCESSORS)
def test_losses_and_gradients_are_those_of_the_equations(
    diffusion: GaussianDiffusion, prediction: str, variance: str, loss: str
) -> None:
    data = batch(prediction, variance)
    objective = GaussianObjective(diffusion, prediction=prediction, variance=variance, loss=loss)
    output = data.pop("output")
    ours, theirs = output.clone().requires_grad_(), output.double().requires_grad_()
    losses = objective.losses_and_bound(ours, **data)[0]
    expected = expected_losses(prediction, variance, loss, {**data, "output": theirs})
    assert losses.dtype == torch.float32
    assert losses.shape == (len(T),)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-6)
    losses.sum().backward()
    expected.sum().backward()
    scale = theirs.grad.flatten(1).abs().amax(dim=1)
    error = (ours.grad.double() - theirs.grad).flatten(1).abs().amax(dim=1)
    assert (scale > 0).all()
    # At t = 999 the two means differ by 1e-4 of their size, of which float32 keeps three digits.
    assert (error < 3e-3 * scale).all(), error / scale
    assert (error[:-2] < 2e-4 * scale[:-2]).all(), error / scale


@pytest.mark.parametrize(("prediction", "variance", "loss"), TABLE_2 + SUCCESSORS)
def test_every_loss_tells_its_term_of_the_bound(
    diffusion: GaussianDiffusion, prediction: str, variance: str, loss: str
) -> None:
    """Where it is a squared error too: exact but for t = 0, where density times width stands for the bin's mass."""
    data = batch(prediction, variance)
    objective = GaussianObjective(diffusion, prediction=prediction, variance=variance, loss=loss)
    losses, terms = objective.losses_and_bound(**{**data, "output": data["output"].requires_grad_()})
    assert losses.requires_grad
    assert not terms.requires_grad
    expected = expected_losses(prediction, variance, "bound", data).detach()
    inner = T > 0
    assert 0 < inner.sum() < len(T)
    torch.testing.assert_close(terms[inner].double(), expected[inner], rtol=2e-3, atol=1e-6)
    if loss != "mse":
        torch.testing.assert_close(terms.double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "mu", "v"])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_decoders_term_from_a_squared_error(prediction: str, variance: str) -> None:
    """For a network that is as good as it can be at t = 0 of a rough schedule: its density is flat over a bin."""
    diffusion = GaussianDiffusion(torch.tensor([0.01, 0.1], dtype=torch.float64))
    x0, eps, t = images(1, 64).clamp(-0.5, 0.5), normal(2, 64, 3, 4, 4), torch.zeros(64, dtype=torch.int64)
    x0 = ((x0 * 127.5).round() / 127.5).float()
    x_t = diffusion.q_sample(x0, t, eps)
    mean = x0 + diffusion.posterior_log_variance(t, variance).mul(0.5).exp()[:, None, None, None] * normal(
        3, 64, 3, 4, 4
    )
    output = {
        "x0": mean,
        "mu": mean,
        "eps": diffusion.predict_eps(x_t, t, mean),
        "v": (diffusion.sqrt_abar[0] * x_t - mean) / diffusion.sqrt_one_minus_abar[0],
    }[prediction]
    data = {"x0": x0, "x_t": x_t, "t": t, "eps": eps}
    by_loss = {
        loss: GaussianObjective(diffusion, prediction=prediction, variance=variance, loss=loss).losses_and_bound(
            output, **data
        )
        for loss in ("mse", "bound")
    }
    torch.testing.assert_close(by_loss["mse"][1], by_loss["bound"][1], rtol=2e-3, atol=2e-3)


def test_hybrid_teaches_the_mean_by_the_squared_error_alone(diffusion: GaussianDiffusion) -> None:
    data = batch("eps", "learned-range")
    output = data.pop("output")
    gradients = {}
    for loss, variance, channels in (("hybrid", "learned-range", 6), ("mse", "small", 3)):
        leaf = output[:, :channels].clone().requires_grad_()
        objective = GaussianObjective(diffusion, prediction="eps", variance=variance, loss=loss)
        objective.losses_and_bound(leaf, **data)[0].sum().backward()
        gradients[loss] = leaf.grad
    assert torch.equal(gradients["hybrid"][:, :3], gradients["mse"])
    assert gradients["hybrid"][:, 3:].abs().flatten(1).amax(dim=1).min() > 0


def test_the_terms_of_hybrid_grow_with_the_chain() -> None:
    """0.001 L_vlb is 0.001 T times one term: at T = 50 a twentieth of a term."""
    diffusion = GaussianDiffusion(make_betas("cosine", 50))
    x0, eps, t = images(1, 3), normal(2, 3, 3, 4, 4), torch.tensor([1, 20, 49])
    data = {"x0": x0, "x_t": diffusion.q_sample(x0, t, eps), "t": t, "eps": eps}
    output = torch.cat((eps + 0.1, normal(3, 3, 3, 4, 4)), dim=1)
    loss = {
        name: GaussianObjective(diffusion, prediction="eps", variance="learned-range", loss=name).losses_and_bound(
            output, **data
        )[0]
        for name in ("hybrid", "bound")
    }
    torch.testing.assert_close(loss["hybrid"], 0.01 + 0.05 * loss["bound"], rtol=1e-5, atol=1e-6)


def test_under_the_bound_x0_is_not_clipped(diffusion: GaussianDiffusion) -> None:
    x0 = images(1, 1)
    t = torch.tensor([300])
    x_t = diffusion.q_sample(x0, t, torch.zeros_like(x0))
    objective = GaussianObjective(diffusion, prediction="x0", variance="small", loss="bound")
    for beyond in (1.5, 3.0):
        output = torch.full_like(x0, beyond).requires_grad_()
        objective.losses_and_bound(output, x0=x0, x_t=x_t, t=t, eps=torch.zeros_like(x0))[0].sum().backward()
        assert (output.grad > 0).all()


@pytest.mark.parametrize(("prediction", "variance", "loss"), [*TABLE_2[4:], *SUCCESSORS])
def test_losses_are_float32_under_autocast_and_need_no_word_from_the_device(
    diffusion: GaussianDiffusion, prediction: str, variance: str, loss: str
) -> None:
    data = batch(prediction, variance)
    output = data.pop("output").bfloat16()
    objective = GaussianObjective(diffusion, prediction=prediction, variance=variance, loss=loss)
    exact = objective.losses_and_bound(output.float(), **data)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.losses_and_bound(output, **data)[0], exact)
    # A tensor on "meta" has no values: any read of one by the host is an error.
    meta = GaussianObjective(
        GaussianDiffusion(make_betas("linear", 1000)).to("meta"), prediction=prediction, variance=variance, loss=loss
    )
    losses = meta.losses_and_bound(output.to("meta"), **{name: value.to("meta") for name, value in data.items()})[0]
    assert (losses.shape, losses.dtype) == ((len(T),), torch.float32)


def test_gradients_stay_finite_far_from_the_truth(diffusion: GaussianDiffusion) -> None:
    """A network that has learned nothing, or the wrong thing, with the decoder's tails and huge variances."""
    data = batch("eps", "learned")
    data.pop("output")
    objective = GaussianObjective(diffusion, prediction="eps", variance="learned", loss="bound")
    for scale in (0.0, 1.0, 30.0):
        output = (scale * normal(5, len(T), 6, 4, 4)).requires_grad_()
        losses = objective.losses_and_bound(output, **data)[0]
        losses.sum().backward()
        assert losses.isfinite().all()
        assert output.grad.isfinite().all()


@pytest.mark.parametrize(
    ("prediction", "variance", "loss", "message"),
    [
        ("eps", "learned", "mse", "loss='mse': gives no gradient to variance='learned'"),
        ("mu", "learned-range", "mse", "loss='mse': gives no gradient to variance='learned-range'"),
        ("eps", "learned", "hybrid", "loss='hybrid': needs variance='learned-range', got 'learned'"),
        ("eps", "small", "hybrid", "loss='hybrid': needs variance='learned-range', got 'small'"),
        ("noise", "small", "mse", "prediction='noise': must be one of eps, x0, mu, v"),
        ("eps", "tiny", "mse", "variance='tiny': must be one of small, large, learned, learned-range"),
        ("eps", "small", "mae", "loss='mae': must be one of mse, bound, hybrid"),
    ],
)
def test_combinations_without_a_meaning_are_refused(
    diffusion: GaussianDiffusion, prediction: str, variance: str, loss: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianObjective(diffusion, prediction=prediction, variance=variance, loss=loss)
