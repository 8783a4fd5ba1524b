"""Guidance: what it draws where that is known in closed form, and how often it calls which network."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.closed_form import WHOLE, Eps, Exact, ExactPrediction, mean_and_deviation, normal_eps, two_classes_eps
from tests.diffusion_reference import normal
from trainer.config.families import PredictionKind, ReverseVariance
from trainer.diffusion.contract import Conditioning, Denoiser
from trainer.diffusion.ddpm.objective import GaussianObjective
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.respacing import kept_timesteps
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.ddpm.schedules import make_betas
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.sampling.ancestral import ancestral
from trainer.sampling.ddim import ddim
from trainer.sampling.guidance import (
    ClassifierGuided,
    Guided,
    Interval,
    Thresholded,
    class_gradient,
    classifier_free,
    dynamic_threshold,
)
from trainer.sampling.request import SamplingRequest
from trainer.sampling.steps import last_of

CLASS, ALL = normal_eps(1.0, 0.5), normal_eps(0.0, 1.0)  # p(x | y) = N(1, 0.5^2), p(x) = N(0, 1)
DDIM, ANCESTRAL = partial(ddim, clip=False), partial(ancestral, clip=False)
BY_DDIM, BY_ANCESTRAL = (partial(mean_and_deviation, each, samples=n) for each, n in ((DDIM, 2), (ANCESTRAL, 1002)))
SHAPE = (3, 4, 4)


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Tensors of a thousand numbers are not worth a second thread, and on a busy machine they wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
@pytest.mark.parametrize(("kind", "tolerance"), [(Exact, 1e-8), (in_float32, 1e-4)])
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
        (2, "large", 1.24981211, 0.33165986),
        (4, "large", 1.32819289, 0.21892995),
        (2, "small", 1.24667909, 0.33324323),
    ],
)
@pytest.mark.parametrize(("kind", "tolerance"), [(Exact, 1e-8), (in_float32, 1e-4)])
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
@pytest.mark.parametrize(("kind", "tolerance"), [(Exact, 1e-8), (in_float32, 1e-4)])
def test_two_classes_under_ddim(scale: float, drawn: float, kind: Callable[..., Denoiser], tolerance: float) -> None:
    guided = Guided(kind(POSITIVE, WHOLE), kind(two_classes_eps, WHOLE), scale=scale)
    x = torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    noise = KeyedNoise.sampling(0, torch.arange(1))
    assert last_of(DDIM(guided, x, noise=noise)).item() == pytest.approx(drawn, abs=tolerance)


class LabelCounter:
    """A network of labels 0 to 2 (2: null) that counts the calls, and the samples of each label."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen = torch.zeros(3, dtype=torch.int64)

    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        self.calls += 1
        self.seen += label.bincount(minlength=3)
        shift = label[:, None, None, None] + t[:, None, None, None] / 7
        return torch.cat((0.8 * x + 0.3 * torch.sin(3 * x + shift), torch.cos(x + shift)), dim=1)


def objective(prediction: PredictionKind = "eps", timesteps: int = 20) -> GaussianObjective:
    diffusion = GaussianDiffusion(make_betas("cosine", timesteps))
    return GaussianObjective(diffusion, prediction=prediction, variance="learned-range", loss="hybrid")


LABEL: Conditioning = {"label": torch.tensor([0, 1])}
NULL: Conditioning = {"label": torch.tensor([2, 2])}
X, TIMES = normal(1, 2, *SHAPE), torch.tensor([5, 19])


def labelled(network: LabelCounter, scale: float, interval: Interval | None = None, **kinds: PredictionKind) -> Guided:
    return classifier_free(partial(objective(**kinds).denoiser, network), LABEL, NULL, scale=scale, interval=interval)


@pytest.mark.parametrize(("scale", "seen"), [(1, [20, 20, 0]), (0, [0, 0, 40]), (2.5, [20, 20, 40])])
def test_which_branch_is_called_how_often(scale: float, seen: list[int]) -> None:
    """Once a step in any case: the labels and the null class are one batch."""
    network = LabelCounter()
    noise = KeyedNoise.sampling(3, torch.arange(2))
    last_of(ancestral(labelled(network, scale), X, noise=noise))
    assert network.calls == 20
    assert network.seen.tolist() == seen


def test_outside_the_interval_the_null_branch_is_not_called() -> None:
    sigma = (1 / objective().diffusion.abar64 - 1).sqrt()
    low, high = sigma[4].item(), sigma[11].item()  # open below, closed above
    network = LabelCounter()
    last_of(ancestral(labelled(network, 2.5, (low, high)), X, noise=KeyedNoise.sampling(3, torch.arange(2))))
    assert network.seen.tolist() == [20, 20, 14]
    plain = objective().denoiser(LabelCounter(), LABEL)
    guided = labelled(network, 2.5, (low, high))
    for step in (4, 12):
        t = torch.tensor([step, step])
        assert torch.equal(guided(X, t).x0, plain(X, t).x0)
    mixed = guided(X, torch.tensor([4, 5]))
    torch.testing.assert_close(mixed.x0[:1], plain(X, torch.tensor([4, 5])).x0[:1])
    assert not torch.allclose(mixed.x0[1:], plain(X, torch.tensor([4, 5])).x0[1:])


def test_both_branches_see_the_same_x_and_t() -> None:
    given: list[tuple[Tensor, Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        given.append((x, t, label))
        return torch.cat((x, x), dim=1)

    classifier_free(partial(objective().denoiser, network), LABEL, NULL, scale=3)(X, TIMES)
    ((x, t, label),) = given
    assert torch.equal(x, torch.cat((X, X)))
    assert t.tolist() == [5, 19, 5, 19]
    assert label.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("prediction", ["eps", "x0", "mu", "v"])
def test_the_prediction_is_guided_and_the_variance_is_the_conditional_one(prediction: PredictionKind) -> None:
    """By hand, from the two halves of the network's output: each parameterisation is affine in x_0."""
    network = LabelCounter()
    cond, null = network(X, TIMES, **LABEL), network(X, TIMES, **NULL)
    predicted = null[:, :3] + 2.5 * (cond[:, :3] - null[:, :3])
    expected = objective(prediction).denoiser(lambda *_: torch.cat((predicted, cond[:, 3:]), dim=1))(X, TIMES)
    found = labelled(network, 2.5, prediction=prediction)(X, TIMES)
    for name in ("x0", "eps", "mean"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    for scale in (1.0, 2.5, 7.0):
        guided = labelled(network, scale, prediction=prediction)(X, TIMES)
        assert torch.equal(guided.log_variance, expected.log_variance)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddpm-sigma-hat", "dpm-solver++"])
def test_every_sampler_takes_every_guidance(sampler: str) -> None:
    """And x_0 is clipped after the guidance: samples end within [-1, 1]."""

    def classifier(x: Tensor, _: Tensor) -> Tensor:
        return torch.stack((x.sum(dim=(1, 2, 3)), x.square().sum(dim=(1, 2, 3))), dim=1)

    network = LabelCounter()
    own, weak = (objective().denoiser(net, LABEL, respacing="10") for net in (network, LabelCounter()))
    free = classifier_free(partial(objective().denoiser, network, respacing="10"), LABEL, NULL, scale=2)
    kinds: list[Denoiser] = [
        free,
        Guided(own, weak, scale=2),
        Thresholded(free, 0.9),
        ClassifierGuided(Thresholded(free, 0.9), classifier, LABEL["label"], scale=0.1),
    ]
    run = SamplingRequest(sampler=sampler, count=2, seed=0, batch=2).chain
    noise = KeyedNoise.sampling(3, torch.arange(2))
    plain = last_of(run(own, X, noise))
    for denoiser in (kinds[0], *kinds[2:]):
        drawn = last_of(run(denoiser, X, noise))
        assert drawn.isfinite().all()
        assert (drawn - plain).abs().max() > 1e-3
    for denoiser in kinds[:3]:
        assert last_of(run(denoiser, X, noise)).abs().max() <= 1 + 1e-5
    torch.testing.assert_close(last_of(run(kinds[1], X, noise)), plain)  # a guide that is the same changes nothing


def test_autoguidance_extrapolates_from_the_weaker_network() -> None:
    main, weak = (
        objective().denoiser(net) for net in (lambda x, _: x.repeat(1, 2, 1, 1), lambda x, _: 0 * x.repeat(1, 2, 1, 1))
    )
    guided = Guided(main, weak, scale=1.5)(X, TIMES)
    torch.testing.assert_close(guided.eps, 1.5 * X, rtol=1e-4, atol=1e-4)


def test_a_guide_of_another_process_is_refused() -> None:
    network = LabelCounter()
    main, other = objective().denoiser(network, LABEL), objective(timesteps=21).denoiser(network, LABEL)
    with pytest.raises(ValueError, match="must have the noise levels"):
        Guided(main, other, scale=2)


def test_a_dynamic_threshold_scales_what_is_beyond_it() -> None:
    x0 = torch.tensor([[-2.0, -1, 0, 1, 4], [-0.5, 0.1, 0, 0.2, 1.5]])[:, None, None, :]
    expected = torch.tensor([[-1, -0.5, 0, 0.5, 1], [-0.5, 0.1, 0, 0.2, 1.0]])  # the second's quantile is below 1
    assert torch.equal(dynamic_threshold(x0, 0.75)[:, 0, 0], expected)
    random = 3 * normal(2, 4, *SHAPE).double()
    s = random.abs().flatten(1).quantile(0.93, dim=1)[:, None, None, None]
    torch.testing.assert_close(dynamic_threshold(random, 0.93), random.clamp(-s, s) / s)


def test_clipping_after_a_threshold_changes_nothing() -> None:
    p = Thresholded(labelled(LabelCounter(), 4), 0.8)(X, TIMES)
    assert (p.x0.abs().amax(dim=(1, 2, 3)) == 1).all()
    for name in ("x0", "eps", "mean"):
        assert torch.equal(getattr(p, name), getattr(p.clipped(), name))


def test_the_gradient_is_that_of_the_sum_in_float32_also_under_no_grad() -> None:
    """Of a classifier in bfloat16, at x_t as it is; each sample's own, whatever else is in the batch."""
    weight = normal(4, 48, 5).bfloat16()

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return (x.bfloat16().flatten(1) @ weight) / (1 + t[:, None])

    x, label = X.clone(), torch.tensor([3, 0])
    with torch.no_grad():
        g = class_gradient(classifier, x, TIMES, label)
        alone = torch.cat(
            [class_gradient(classifier, x[i : i + 1], TIMES[i : i + 1], label[i : i + 1]) for i in (0, 1)]
        )
    assert g.dtype == torch.float32
    torch.testing.assert_close(g, alone)
    assert not x.requires_grad
    logits = classifier(x, TIMES).float()
    by_logits = (F.one_hot(label, 5) - logits.softmax(dim=1)) / (1 + TIMES[:, None])
    torch.testing.assert_close(g.flatten(1), by_logits @ weight.float().T, rtol=0.02, atol=0.02)


def test_a_classifier_moves_the_clipped_prediction_and_is_not_clipped_again() -> None:
    """DDIM's x_0 leaves [-1, 1]; the mean moves by Sigma shift, and the x_0 that ancestral sampling shows stays."""

    def classifier(x: Tensor, _: Tensor) -> Tensor:
        return torch.stack((x.sum(dim=(1, 2, 3)) / 40, torch.zeros(len(x))), dim=1)

    family = objective()
    plain = family.denoiser(lambda x, _: x.repeat(1, 2, 1, 1).sin())
    guided = ClassifierGuided(plain, classifier, torch.tensor([1, 1]), scale=200)
    clipped, before = guided(X, TIMES).clipped(), plain(X, TIMES).clipped()
    shift = 200 * class_gradient(classifier, X, TIMES, torch.tensor([1, 1]))
    assert shift.abs().max() > 1
    abar = family.diffusion.abar[TIMES][:, None, None, None]
    eps = before.eps - (1 - abar).sqrt() * shift
    torch.testing.assert_close(clipped.eps, eps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clipped.x0, family.diffusion.predict_x0(X, TIMES, eps), rtol=1e-4, atol=1e-2)
    assert clipped.x0.abs().max() > 1.5
    torch.testing.assert_close(clipped.mean, before.mean + before.log_variance.exp() * shift)
    assert torch.equal(clipped.x0_of_mean, before.x0)
    assert torch.equal(clipped.log_variance, before.log_variance)


def test_the_classifier_gets_the_timestep_that_it_was_trained_with() -> None:
    told: list[int] = []

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        told.extend(t.tolist())
        return torch.stack((x.sum(dim=(1, 2, 3)), torch.zeros(len(x))), dim=1)

    short = objective().denoiser(LabelCounter(), LABEL, respacing="5")
    guided = ClassifierGuided(short, classifier, LABEL["label"], scale=1)
    last_of(ddim(guided, X, noise=KeyedNoise.sampling(0, torch.arange(2))))
    assert told == [t for t in reversed(kept_timesteps(20, "5").tolist()) for _ in range(2)]
