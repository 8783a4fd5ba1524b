"""Samplers: the papers' algorithms as plain float64 loops, and diffusers' schedulers step by step."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from tests.diffusion_reference import Reference, images, normal
from trainer.diffusion.contract import SamplingStep
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.respacing import kept_timesteps
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.diffusion.ddpm.schedules import make_betas
from trainer.diffusion.keyed_noise import KeyedNoise, Stream, keyed_normal
from trainer.sampling.ancestral import ancestral
from trainer.sampling.ddim import ddim, ddim_invert
from trainer.sampling.interpolation import interpolate
from trainer.sampling.steps import last_of

T = 50
SHAPE = (2, 3, 3)
SEED = 11
# Steeper than the paper's, so that 50 steps reach noise.
BETAS = torch.linspace(1e-4, 0.3, T, dtype=torch.float64)
REFERENCE = Reference(BETAS.tolist())
INDEX = torch.tensor([5, 2**40])
NOISE = KeyedNoise.sampling(SEED, INDEX)


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Not a good denoiser: its x0_hat leaves [-1, 1] on most steps, so that the clamp matters."""
    return 0.8 * x + 0.3 * torch.sin(3 * x + t[:, None, None, None] / 7)


def wide_model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.cat((model(x, t), torch.cos(2 * x)), dim=1)


def process(variance: str = "small", spec: str = "all", prediction: str = "eps") -> ReverseProcess:
    network = wide_model if variance.startswith("learned") else model
    reverse = ReverseProcess(network, GaussianDiffusion(BETAS), prediction=prediction, variance=variance)
    return reverse.respaced(kept_timesteps(T, spec))


def draw(
    sampler: Callable[..., object] = ancestral,
    reverse: ReverseProcess | None = None,
    index: torch.Tensor = INDEX,
    seed: int = SEED,
    **more: object,
) -> torch.Tensor:
    reverse = process() if reverse is None else reverse
    noise = KeyedNoise.sampling(seed, index)
    return last_of(sampler(reverse, noise.normal("initial", SHAPE), noise=noise, **more))


def noise(index: int, t: int) -> torch.Tensor:
    return keyed_normal(SEED, Stream.ANCESTRAL, torch.tensor([index]), SHAPE, sub=t)[0].double()


def algorithm_2(index: int, variance: str, steps: list[int], clip: bool = True) -> torch.Tensor:
    """One sample in float64 over the given timesteps."""
    abars = [REFERENCE.abar(t) for t in steps]
    chain = Reference([1 - a / before for a, before in zip(abars, [1.0, *abars])])
    x = keyed_normal(SEED, Stream.INITIAL, torch.tensor([index]), SHAPE)[0].double()
    network = wide_model if variance.startswith("learned") else model
    for position in range(len(steps) - 1, -1, -1):
        output = network(x[None], torch.tensor([steps[position]]))[0]
        _, _, mean, log_variance = chain.reverse("eps", variance, output, x, position, clip)
        x = mean + (0.5 * log_variance).exp() * noise(index, steps[position]) if position > 0 else mean
    return x


def algorithm_ddim(
    index: int, eta: float, steps: list[int], clip: bool = True, sigma_hat: bool = False
) -> torch.Tensor:
    """Song et al. 2021, equations 12 and 16, in float64."""
    x = keyed_normal(SEED, Stream.INITIAL, torch.tensor([index]), SHAPE)[0].double()
    for position in range(len(steps) - 1, -1, -1):
        a = REFERENCE.abar(steps[position])
        a_next = REFERENCE.abar(steps[position - 1]) if position > 0 else 1.0
        x0 = (x - math.sqrt(1 - a) * model(x[None], torch.tensor([steps[position]]))[0]) / math.sqrt(a)
        if clip:
            x0 = x0.clamp(-1, 1)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
        added = math.sqrt(1 - a / a_next) if sigma_hat else sigma
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * eps
        if position > 0:
            x = x + added * noise(index, steps[position])
    return x


@pytest.mark.parametrize("spec", ["all", "12", "quadratic10"])
@pytest.mark.parametrize("variance", ["small", "large", "learned", "learned-range"])
def test_ancestral_is_algorithm_2(variance: str, spec: str) -> None:
    steps = kept_timesteps(T, spec).tolist()
    for clip in (True, False) if variance == "small" else (True,):
        drawn = draw(ancestral, process(variance, spec), clip=clip)
        assert drawn.dtype == torch.float32
        assert drawn.shape == (2, *SHAPE)
        expected = torch.stack([algorithm_2(index, variance, steps, clip) for index in INDEX.tolist()])
        torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        if clip:
            assert drawn.abs().max() <= 1
        else:  # so the comparison would have seen the absence of the clamp
            assert drawn.abs().max() > 1


@pytest.mark.parametrize("spec", ["all", "12", "quadratic10"])
@pytest.mark.parametrize(("eta", "sigma_hat"), [(0.0, False), (0.4, False), (1.0, False), (1.0, True)])
def test_ddim_is_equation_12(eta: float, sigma_hat: bool, spec: str) -> None:
    steps = kept_timesteps(T, spec).tolist()
    for clip in (True, False):
        drawn = draw(ddim, process(spec=spec), eta=eta, sigma_hat=sigma_hat, clip=clip)
        expected = torch.stack([algorithm_ddim(i, eta, steps, clip, sigma_hat) for i in INDEX.tolist()])
        torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=1e-4 * max(expected.abs().max().item(), 1))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("spec", ["all", "10", "quadratic10"])
def test_eta_1_is_ancestral_step_by_step(spec: str, clip: bool) -> None:
    """With the small variance; sigma-hat with the large one."""
    for variance, sigma_hat in (("small", False), ("large", True)):
        x, reverse = NOISE.normal("initial", SHAPE), process(variance, spec)
        ours = ddim(reverse, x, noise=NOISE, eta=1.0, sigma_hat=sigma_hat, clip=clip)
        for one, other in zip(ours, ancestral(reverse, x, noise=NOISE, clip=clip), strict=True):
            assert (one.t, one.original_t) == (other.t, other.original_t)
            scale = max(other.x.abs().max().item(), 1)
            torch.testing.assert_close(one.x, other.x, rtol=0, atol=5e-5 * scale)


def test_ddim_refuses_what_has_no_meaning() -> None:
    for options, message in (
        ({"eta": -0.1}, r"eta=-0.1: must be in \[0, 1\]"),
        ({"eta": 1.1}, r"eta=1.1: must be in \[0, 1\]"),
        ({"sigma_hat": True}, "sigma_hat=True: goes with the mean of eta=1, got eta=0"),
        ({"start": T}, f"start={T}: must be a timestep of the chain, 0 to {T - 1}"),
        ({"start": -1}, "start=-1: must be a timestep of the chain"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(ddim, **options)


def test_steps_tell_where_they_are_and_what_they_believe() -> None:
    reverse = process(spec="ddim10")
    steps: list[SamplingStep] = []
    x = NOISE.normal("initial", SHAPE)
    drawn = last_of(ancestral(reverse, x, noise=NOISE), steps.append)
    assert [step.t for step in steps] == list(range(10))[::-1]
    assert [step.original_t for step in steps] == list(range(0, T, 5))[::-1]
    assert torch.equal(steps[-1].x, drawn)
    assert torch.equal(steps[-1].x0, drawn)  # the mean at t = 0 is x_0
    first = reverse(x, torch.full((2,), 9)).clipped()
    assert torch.equal(steps[0].x0, first.x0)


def test_a_chain_may_start_below_the_top() -> None:
    """What a whole chain goes through after some step is what one that starts there does from there."""
    x = NOISE.normal("initial", SHAPE)
    for sampler in (ancestral, functools.partial(ddim, eta=0.7)):
        whole = list(sampler(process(), x, noise=NOISE))
        tail = list(sampler(process(), whole[19].x, noise=NOISE, start=29))
        assert [step.t for step in tail] == list(range(30))[::-1]
        assert torch.equal(tail[-1].x, whole[-1].x)


def test_a_sample_is_the_same_in_whatever_batch() -> None:
    for sampler in (ancestral, functools.partial(ddim, eta=0.5), ddim):
        together = draw(sampler, index=torch.tensor([7, 8, 9, 10, 11]))
        assert torch.equal(together[[2]], draw(sampler, index=torch.tensor([9])))
        assert torch.equal(together[[4, 0]], draw(sampler, index=torch.tensor([11, 7])))
        assert not torch.equal(draw(sampler, index=torch.tensor([9]), seed=12), together[[2]])


def test_no_graph_is_left() -> None:
    weight = torch.ones((), requires_grad=True)
    reverse = ReverseProcess(lambda x, t: weight * model(x, t), GaussianDiffusion(BETAS), variance="small")
    assert not draw(ancestral, reverse).requires_grad
    assert not draw(ddim, reverse).requires_grad
    assert not last_of(ddim_invert(reverse, torch.zeros(1, *SHAPE))).requires_grad
    assert torch.is_grad_enabled()


def test_an_empty_chain_has_no_sample() -> None:
    with pytest.raises(ValueError, match="chain: must have a step"):
        last_of(iter(()))


PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
PAPER = make_betas("linear", 1000)


def one_step(
    sampler: Callable[..., object], reverse: ReverseProcess, x: torch.Tensor, t: int, **more: object
) -> SamplingStep:
    return next(iter(sampler(reverse, x, noise=KeyedNoise.sampling(SEED, torch.arange(len(x))), start=t, **more)))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("variance", "theirs"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned-range", "learned_range")]
)
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_our_ancestral_steps_are_those_of_diffusers(
    prediction: str, variance: str, theirs: str, clip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDPMScheduler(
        trained_betas=PAPER.numpy(), variance_type=theirs, clip_sample=clip, prediction_type=PREDICTIONS[prediction]
    )
    index, output = torch.arange(3), normal(1, 3, 6 if variance == "learned-range" else 3, 4, 4)
    reverse = ReverseProcess(lambda *_: output, GaussianDiffusion(PAPER), prediction=prediction, variance=variance)
    for t in (0, 1, 2, 10, 500, 998, 999):
        z = keyed_normal(SEED, Stream.ANCESTRAL, index, (3, 4, 4), sub=t)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z)
        x = normal(2, 3, 3, 4, 4)
        ours, other = one_step(ancestral, reverse, x, t, clip=clip), scheduler.step(output, t, x)
        scale = max(other.pred_original_sample.abs().max().item(), 1)
        # their tables are float32 products: 1 - abar_0 = 1e-4 has three digits, beta = 1 - abar / abar' as few
        torch.testing.assert_close(ours.x0, other.pred_original_sample, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(ours.x, other.prev_sample, rtol=0, atol=3e-4)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_our_ddim_steps_are_those_of_diffusers(prediction: str, eta: float) -> None:
    """With "leading" spacing, whose distance to the timestep before is the one that diffusers assumes."""
    scheduler = DDIMScheduler(
        trained_betas=PAPER.numpy(), prediction_type=PREDICTIONS[prediction], timestep_spacing="leading"
    )
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == kept_timesteps(1000, "ddim50").tolist()[::-1]
    output = normal(1, 3, 3, 4, 4)
    reverse = ReverseProcess(lambda *_: output, GaussianDiffusion(PAPER), prediction=prediction, variance="small")
    reverse = reverse.respaced(kept_timesteps(1000, "ddim50"))
    for clip in (True, False):
        scheduler.register_to_config(clip_sample=clip)
        for t in (1, 2, 10, 49):
            x = normal(2, 3, 3, 4, 4)
            z = keyed_normal(SEED, Stream.ANCESTRAL, torch.arange(3), (3, 4, 4), sub=20 * t)
            other = scheduler.step(output, 20 * t, x, eta=eta, use_clipped_model_output=clip, variance_noise=z)
            ours = one_step(ddim, reverse, x, t, eta=eta, clip=clip)
            scale = max(other.pred_original_sample.abs().max().item(), 1)
            torch.testing.assert_close(ours.x0, other.pred_original_sample, rtol=0, atol=1e-5 * scale)
            torch.testing.assert_close(ours.x, other.prev_sample, rtol=0, atol=1e-4 * scale)


def test_a_first_order_dpm_solver_is_our_ddim() -> None:
    """Lu et al. 2022: DPM-Solver-1 is DDIM with eta = 0, so its higher orders may be driven with our conventions."""
    steps = kept_timesteps(1000, "20")
    scheduler = DPMSolverMultistepScheduler(trained_betas=PAPER.numpy(), solver_order=1)
    scheduler.set_timesteps(timesteps=steps.tolist()[::-1])
    network = lambda x, t: model(x, t / 20)  # noqa: E731
    reverse = ReverseProcess(network, GaussianDiffusion(PAPER), variance="small").respaced(steps)
    x = NOISE.normal("initial", SHAPE)
    for step in ddim(reverse, x, noise=NOISE, clip=False):
        t = scheduler.timesteps[19 - step.t]
        assert t.item() == step.original_t
        x = scheduler.step(network(x, t.repeat(2)), t, x).prev_sample
        torch.testing.assert_close(step.x, x, rtol=0, atol=2e-4 * max(x.abs().max().item(), 1))


ABAR = GaussianDiffusion(PAPER).abar


def smooth(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The optimal eps for pixels of mean 0.1 and standard deviation 0.4 under the paper's schedule: a smooth ODE."""
    a = ABAR[t][:, None, None, None]
    return (1 - a).sqrt() * (x - a.sqrt() * 0.1) / (a * 0.16 + 1 - a)


def test_inversion_over_all_steps_gives_the_image_back() -> None:
    reverse = ReverseProcess(smooth, GaussianDiffusion(PAPER), variance="small")
    x0, index = images(7, 2), torch.arange(2)
    for options, error in (({"refinements": 0}, 1e-2), ({}, 1e-3)):
        steps = list(ddim_invert(reverse, x0, **options))
        assert [step.t for step in steps] == list(range(1000))
        latent = steps[-1].x
        again = last_of(ddim(reverse, latent, noise=KeyedNoise.sampling(0, index), clip=False))
        assert (again - x0).abs().max() < error
        # and the latent is that of the ODE: this one is linear, and takes an image to (x_0 - 0.1) / 0.4
        torch.testing.assert_close(latent, (x0 - 0.1) / 0.4, rtol=0, atol=0.012)


def test_refinements_invert_few_steps_as_well() -> None:
    """Over 20 steps the plain inverse is off; each refinement calls the network once more and comes nearer."""
    x0, index, calls = images(7, 2), torch.arange(2), []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(t[0].item())
        return smooth(x, t)

    reverse = ReverseProcess(network, GaussianDiffusion(PAPER), variance="small").respaced(kept_timesteps(1000, "20"))
    errors = []
    for refinements in (0, 2, 8):
        calls.clear()
        latent = last_of(ddim_invert(reverse, x0, refinements=refinements))
        assert calls == [t for t in kept_timesteps(1000, "20").tolist() for _ in range(1 + refinements)]
        errors.append(
            (last_of(ddim(reverse, latent, noise=KeyedNoise.sampling(0, index), clip=False)) - x0).abs().max().item()
        )
    assert errors[0] > 0.02
    assert errors[1] < errors[0] / 3
    assert errors[2] < 1e-3


def interpolation(t: int, lambdas: list[float], first: int, second: int, steps: list[int]) -> list[torch.Tensor]:
    """Section 4.3 in float64 for one pair; t of the paper's steps."""
    mixed = []
    eps = keyed_normal(SEED, Stream.INITIAL, INDEX[:1], SHAPE)[0].double()
    abars = [REFERENCE.abar(step) for step in steps]
    chain = Reference([1 - a / before for a, before in zip(abars, [1.0, *abars])])
    for share in lambdas:
        ends = [images(number, 1, SHAPE)[0].double() for number in (first, second)]
        if t > 0:
            ends = [chain.x_t(end, eps, t - 1) for end in ends]
        x = (1 - share) * ends[0] + share * ends[1]
        for position in range(t - 1, -1, -1):
            output = model(x[None], torch.tensor([steps[position]]))[0]
            _, _, mean, log_variance = chain.reverse("eps", "small", output, x, position, clip=True)
            x = mean + (0.5 * log_variance).exp() * noise(5, steps[position]) if position > 0 else mean
        mixed.append(x)
    return mixed


@pytest.mark.parametrize(
    ("t", "spec"), [(0, "all"), (1, "all"), (20, "all"), (T, "all"), (5, "ddim10"), (10, "ddim10")]
)
def test_interpolation_is_that_of_the_paper(t: int, spec: str) -> None:
    lambdas = [0.0, 0.3, 1.0]
    pair = images(1, 1, SHAPE), images(2, 1, SHAPE)
    ours = interpolate(process(spec=spec), *pair, t=t, lambdas=lambdas, noise=KeyedNoise.sampling(SEED, INDEX[:1]))
    assert ours.shape == (3, 1, *SHAPE)
    expected = interpolation(t, lambdas, 1, 2, kept_timesteps(T, spec).tolist())
    for one, other in zip(ours[:, 0], expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-4)


def test_interpolation_undoes_as_many_steps_as_it_was_noised_by() -> None:
    told: list[int] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told.append(t[0].item())
        return model(x, t)

    reverse = ReverseProcess(network, GaussianDiffusion(BETAS), variance="small")
    pairs = images(1, 2, SHAPE), images(2, 2, SHAPE)
    shared = interpolate(reverse, *pairs, t=4, lambdas=[0.5], noise=KeyedNoise.sampling(SEED, torch.tensor([5, 5])))
    assert told == [3, 2, 1, 0]
    chain = functools.partial(ddim, eta=0.0)
    smoothly = interpolate(
        reverse, *pairs, t=4, lambdas=[0.5], noise=KeyedNoise.sampling(SEED, torch.tensor([5, 5])), sampler=chain
    )
    assert not torch.equal(shared, smoothly)
    for t in (-1, T + 1):
        with pytest.raises(ValueError, match=f"t={t}: must be from 0 to the chain's {T} steps"):
            interpolate(reverse, *pairs, t=t, lambdas=[0.5], noise=NOISE)
