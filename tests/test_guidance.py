"""Guidance: how often it calls which network, and what each kind does to a prediction."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.diffusion_reference import normal
from trainer.config.families import PredictionKind
from trainer.diffusion.contract import Conditioning, Denoiser
from trainer.diffusion.ddpm.objective import GaussianObjective
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.respacing import kept_timesteps
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

SHAPE = (3, 4, 4)


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
