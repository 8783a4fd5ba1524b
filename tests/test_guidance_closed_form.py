"""Guidance: what it draws where that is known in closed form."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.closed_form import WHOLE, Eps, Exact, ExactPrediction, mean_and_deviation, normal_eps, two_classes_eps
from tests.diffusion_reference import normal
from trainer.config.families import ReverseVariance
from trainer.diffusion.contract import Denoiser
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.respacing import kept_timesteps
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.sampling.ancestral import ancestral
from trainer.sampling.ddim import ddim
from trainer.sampling.guidance import (
    ClassifierGuided,
    Guided,
    Interval,
    class_gradient,
)
from trainer.sampling.steps import last_of

CLASS, ALL = normal_eps(1.0, 0.5), normal_eps(0.0, 1.0)  # p(x | y) = N(1, 0.5^2), p(x) = N(0, 1)
DDIM, ANCESTRAL = partial(ddim, clip=False), partial(ancestral, clip=False)
BY_DDIM, BY_ANCESTRAL = (partial(mean_and_deviation, each, samples=n) for each, n in ((DDIM, 2), (ANCESTRAL, 1002)))
SHAPE = (3, 4, 4)


def chain(spec: str = "all") -> GaussianDiffusion:
    return WHOLE if spec == "all" else WHOLE.respaced(kept_timesteps(1000, spec))


def in_float32(eps: Eps, diffusion: GaussianDiffusion, variance: ReverseVariance = "large") -> ReverseProcess:
    """The same optimal network in the family that is shipped."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        return eps(x.double(), WHOLE.abar64[t][:, None, None, None]).float()

    whole = ReverseProcess(network, WHOLE, variance=variance)
    return whole if diffusion is WHOLE else whole.respaced(diffusion.original_timesteps)


def class_of_normal_data(x: Tensor, t: Tensor) -> Tensor:
    """Logits of y and of everything else, t of the whole chain: p(y | x) = p(y) p(x | y) / p(x) with p(y) = 0.2."""
    abar = torch.cat((WHOLE.abar64, torch.ones(1)))[t][:, None]  # without noise at t = -1
    x = x.flatten(1)
    of_class = torch.distributions.Normal(abar.sqrt(), (abar / 4 + 1 - abar).sqrt()).log_prob(x)
    log_p = of_class - torch.distributions.Normal(0.0, 1.0).log_prob(x) + torch.tensor(0.2).log()
    return torch.cat((log_p, torch.log1p(-log_p.exp())), dim=1)


def by_classifier(main: Denoiser, scale: float, samples: int) -> ClassifierGuided:
    label = torch.zeros(samples, dtype=torch.int64)
    return ClassifierGuided(main, class_of_normal_data, label, scale=scale)


CLASSIFIER_FREE = [
    (1, "all", None, 0.99683315, 0.49849528),
    (2, "all", None, 1.37661216, 0.24869111),
    (4, "all", None, 1.51440851, 0.06169074),
    (2, "50", None, 1.37095480, 0.22553078),
    (2, "ddim25", None, 1.36421234, 0.20307738),
    (2, "all", (0.28, 2.9), 1.28834625, 0.28613304),
]


@pytest.mark.parametrize(("scale", "spec", "interval", "mean", "deviation"), CLASSIFIER_FREE)
@pytest.mark.parametrize(("kind", "tolerance"), [(Exact, 1e-8), pytest.param(in_float32, 1e-4, marks=pytest.mark.slow)])
def test_classifier_free_guidance_under_ddim(
    scale: float,
    spec: str,
    interval: Interval | None,
    mean: float,
    deviation: float,
    kind: Callable[..., Denoiser],
    tolerance: float,
) -> None:
    """Where the tilted p^(1-s) p_y^s would have 8/7 and 0.378 for s = 2: it is not what guidance samples from."""
    guided = Guided(kind(CLASS, chain(spec)), kind(ALL, chain(spec)), scale=scale, interval=interval)
    assert BY_DDIM(guided) == pytest.approx((mean, deviation), abs=tolerance)


@pytest.mark.parametrize(
    ("scale", "spec", "mean", "deviation"),
    [(s, spec, mean, deviation) for s, spec, interval, mean, deviation in CLASSIFIER_FREE if interval is None],
)
def test_a_classifier_under_ddim_is_classifier_free_guidance(
    scale: float, spec: str, mean: float, deviation: float
) -> None:
    """Of the unconditional denoiser with s, and of the conditional one with s - 1. With the index of a shorter chain in
    place of the timestep of the whole one, the classifier would give 1.3149 and 0 in 50 steps.
    """
    for eps, own in ((ALL, scale), (CLASS, scale - 1)):
        guided = by_classifier(Exact(eps, chain(spec)), own, 2)
        assert BY_DDIM(guided) == pytest.approx((mean, deviation), abs=1e-8)


@pytest.mark.parametrize(
    ("scale", "variance", "mean", "deviation"),
    [
        (1, "large", 0.99889383, 0.50118424),
        pytest.param(2, "large", 1.24981211, 0.33165986, marks=pytest.mark.slow),
        pytest.param(4, "large", 1.32819289, 0.21892995, marks=pytest.mark.slow),
        (2, "small", 1.24667909, 0.33324323),
    ],
)
@pytest.mark.parametrize(("kind", "tolerance"), [(Exact, 1e-8), pytest.param(in_float32, 1e-4, marks=pytest.mark.slow)])
def test_a_classifier_under_ancestral_sampling(
    scale: float, variance: str, mean: float, deviation: float, kind: Callable[..., Denoiser], tolerance: float
) -> None:
    """The mean moves by s Sigma g. By s sigma g it would be 1.3333 and 0.034 for s = 2; with g at mu 1.25106561."""
    guided = by_classifier(kind(ALL, WHOLE, variance=variance), scale, 1002)
    assert BY_ANCESTRAL(guided) == pytest.approx((mean, deviation), abs=tolerance)


@pytest.mark.parametrize(("at_mean", "power", "mean"), [(True, 1.0, 1.25106561), (False, 0.5, 1.33333333)])
def test_the_wrong_ways_would_draw_something_else(at_mean: bool, power: float, mean: float) -> None:
    """The gradient at mu, or sigma in place of Sigma: the tests above tell them from the right way."""
    main, label = Exact(ALL), torch.zeros(1002, dtype=torch.int64)

    def wrong(x: Tensor, t: Tensor) -> ExactPrediction:
        p = main(x, t)
        g = (
            class_gradient(class_of_normal_data, p.mean, t - 1, label)
            if at_mean
            else class_gradient(class_of_normal_data, x, t, label)
        )
        return replace(p, mean=p.mean + 2 * p.variance**power * g)

    wrong.diffusion = WHOLE  # type: ignore[attr-defined]
    assert BY_ANCESTRAL(wrong)[0] == pytest.approx(mean, abs=1e-8)


@pytest.mark.parametrize("variance", ["small", "large", "learned-range"])
def test_the_variance_of_the_last_step_is_guided_diffusions(variance: ReverseVariance) -> None:
    """At t = 0 the small one is 0, while its logarithm, like that of the large one, is beta~_1's."""
    x, t = normal(1, 2, *SHAPE), torch.tensor([0, 3])
    learned = variance == "learned-range"
    step = ReverseProcess(lambda x, _: torch.cat((x, x), dim=1) if learned else x, WHOLE, variance=variance)(x, t)
    expected = step.log_variance.exp()
    assert (expected > 0).all()
    torch.testing.assert_close(step.variance[1:], expected[1:])
    torch.testing.assert_close(step.variance[:1], expected[:1] if variance != "small" else torch.zeros(1, *SHAPE))


POSITIVE = normal_eps(1.0, 0.5)


def test_two_classes_at_one_point() -> None:
    """Classes N(1, 1/4) and N(-1, 1/4), at x = 0.3 and t = 99."""

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        abar = WHOLE.abar64[t]
        half = abar.sqrt() * x.flatten() / (abar / 4 + 1 - abar)
        return torch.stack((half, -half), dim=1)

    x, t = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64), torch.tensor([99])
    assert classifier(x, t).softmax(dim=1)[0, 0].item() == pytest.approx(0.8502498373, abs=1e-10)
    g = class_gradient(classifier, x, t, torch.tensor([0]))
    assert g.item() == pytest.approx(0.8668347614, abs=1e-10)
    cond, uncond = Exact(POSITIVE), Exact(two_classes_eps)
    assert uncond(x, t).eps.item() == pytest.approx(-0.3564216518, abs=1e-10)
    assert cond(x, t).eps.item() == pytest.approx(-0.6345957397, abs=1e-10)
    label = torch.tensor([0])
    for guided in (
        Guided(cond, uncond, scale=3),
        ClassifierGuided(uncond, classifier, label, scale=3),
        ClassifierGuided(cond, classifier, label, scale=2),
    ):
        assert guided(x, t).eps.item() == pytest.approx(-1.1909439155, abs=1e-10)


@pytest.mark.parametrize(("scale", "drawn"), [(0, -1.23613888), (1, 0.49833787), (2, 0.96104915), (4, 1.38866356)])
@pytest.mark.parametrize(("kind", "tolerance"), [(Exact, 1e-8), pytest.param(in_float32, 1e-4, marks=pytest.mark.slow)])
def test_two_classes_under_ddim(scale: float, drawn: float, kind: Callable[..., Denoiser], tolerance: float) -> None:
    guided = Guided(kind(POSITIVE, WHOLE), kind(two_classes_eps, WHOLE), scale=scale)
    x = torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    noise = KeyedNoise.sampling(0, torch.arange(1))
    assert last_of(DDIM(guided, x, noise=noise)).item() == pytest.approx(drawn, abs=tolerance)
