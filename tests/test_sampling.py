"""One way to draw: what a request says, what a sampler may see, and that all who draw the same draw the same images."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.diffusion_reference import normal
from tests.harness import checkpoint, launch, overrides, write_config
from trainer.config import Config
from trainer.data.images import to_uint8
from trainer.diffusion.contract import Denoiser, Network, Prediction, SamplingStep
from trainer.diffusion.ddpm.objective import GaussianObjective
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.schedules import make_betas
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.drawing.trained import TrainedRequest
from trainer.engine.build import build_objective
from trainer.engine.monitoring.sample_grids import plan_grid
from trainer.errors import ConfigError
from trainer.evaluation import bits_per_dim
from trainer.sampling.request import RequestError, ReverseRequest, SamplingRequest
from trainer.sampling.samplers import SAMPLERS, SamplerEntry
from trainer.sampling.steps import last_of
from trainer.telemetry.pictures import grid

SHAPE = (3, 4, 4)


def request(**fields: object) -> SamplingRequest:
    return SamplingRequest(**{"count": 4, "seed": 3, "batch": 2} | fields)


def objective(prediction: str = "eps", variance: str = "small", loss: str = "mse") -> GaussianObjective:
    diffusion = GaussianDiffusion(make_betas("cosine", 20))
    return GaussianObjective(diffusion, prediction=prediction, variance=variance, loss=loss)


def network(x: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
    label = cond.get("label", torch.zeros(len(x)))[:, None, None, None]
    return 0.8 * x + 0.3 * torch.sin(3 * x + label + t[:, None, None, None] / 7)


def test_names_identity_and_description_of_a_request() -> None:
    assert request().name_parts == ["ddpm", "seed-3"]
    half = request(sampler="ddim", options={"eta": 0.5}, respacing="10,15,25", variance="large")
    assert half.name_parts == ["ddim-eta-0.5", "10-15-25", "large", "seed-3"]
    assert half.identity == {"sampler": "ddim-eta-0.5", "respacing": "10,15,25", "batch": 2, "seed": 3}
    assert half.describe(50) == "ddim-eta-0.5, 50 steps, seed 3"
    assert request(sampler="ddim").how == "ddim-eta-0"
    assert ReverseRequest().name_parts == []
    assert request(count=5).batches == [range(2), range(2, 4), range(4, 5)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "dim"}, "sampler='dim': unknown; did you mean ddim?"),
        ({"sampler": "qqq"}, "sampler='qqq': unknown; known: ddpm, ddim, ddpm-sigma-hat, dpm-solver++"),
        ({"options": {"eta": 0.5}}, "eta=0.5: goes with sampler ddim"),
        ({"sampler": "ddim", "options": {"eta": 1.5}}, "eta=1.5: should be from 0 to 1"),
        ({"sampler": "ddim", "options": {"eta": float("nan")}}, "eta=nan: should be from 0 to 1"),
        ({"sampler": "ddim", "options": {"churn": 1.0}}, "churn=1.0: unknown; ddim has eta"),
        ({"sampler": "ddim", "options": {"etas": 1.0}}, "etas=1.0: unknown; did you mean eta?"),
        ({"options": {"churn": 0.0}}, "churn=0.0: unknown; ddpm has no options"),
        ({"options": {"eta": 0.0}}, "eta=0.0: goes with sampler ddim, not ddpm"),
        ({"seed": -1}, "seed=-1: should be at least 0 and below 2^63"),
        ({"seed": 2**63}, "should be at least 0 and below 2^63"),
    ],
)
def test_a_request_that_cannot_be_says_why(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        request(**fields)
    assert message in str(error.value)


def test_a_sampler_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "odd", SamplerEntry(sampler=SAMPLERS["ddpm"].sampler, package="no_such_package"))
    with pytest.raises(RequestError, match="needs no_such_package"):
        request(sampler="odd")


def test_a_sampler_is_a_function_and_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees x_0 only through the denoiser, and noise only by its keys."""

    def jump(denoiser: Denoiser, x: torch.Tensor, *, noise: KeyedNoise) -> Iterator[SamplingStep]:
        last = denoiser.diffusion.timesteps - 1
        x0 = denoiser(x, torch.full_like(noise.index, last)).clipped().x0
        yield SamplingStep(t=0, original_t=0, x=x0, x0=x0)

    monkeypatch.setitem(SAMPLERS, "jump", SamplerEntry(sampler=jump))
    denoiser = objective().denoiser(network, respacing="5")
    told: list[int] = []
    drawn = request(sampler="jump").draw(denoiser, range(2, 4), shape=SHAPE, on_step=told.append)
    x = KeyedNoise.sampling(3, torch.tensor([2, 3])).normal("initial", SHAPE)
    expected = denoiser(x, torch.tensor([4, 4])).x0.clamp(-1, 1)
    assert np.array_equal(drawn, to_uint8(expected).numpy())
    assert told == [2]


def test_the_conditioning_reaches_the_network() -> None:
    x, t, label = normal(1, 2, *SHAPE), torch.tensor([5, 19]), torch.tensor([0.5, 2.0])
    conditional = objective().denoiser(network, {"label": label}, respacing="10")
    plain = objective().denoiser(lambda x, t: network(x, t, label=label), respacing="10")
    t = torch.tensor([5, 9])
    assert torch.equal(conditional(x, t).x0, plain(x, t).x0)
    assert not torch.equal(conditional(x, t).x0, objective().denoiser(network, respacing="10")(x, t).x0)


class Guided:
    """Classifier-free guidance (Ho and Salimans 2022), which does not depend on the family."""

    def __init__(self, cond: Denoiser, uncond: Denoiser, scale: float) -> None:
        self.cond, self.uncond, self.scale = cond, uncond, scale
        self.diffusion = cond.diffusion

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> Prediction:
        p = self.uncond(x, t)
        return p.with_x0(p.x0 + self.scale * (self.cond(x, t).x0 - p.x0))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "mu", "v"])
def test_guidance_wraps_denoisers_of_any_parameterisation(prediction: str, sampler: str) -> None:
    """The network's output is affine in x_0, so guiding x_0 is guiding the output: eps, as in the paper."""
    label = torch.tensor([0.5, 2.0])

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        plain = network(x, t)
        return plain + 2.5 * (network(x, t, label=label) - plain)

    def denoiser(net: Network, **cond: torch.Tensor) -> Denoiser:
        return objective(prediction).denoiser(net, cond, respacing="5")  # few steps magnify no rounding

    wrapped = Guided(denoiser(network, label=label), denoiser(network), 2.5)
    noise = KeyedNoise.sampling(3, torch.arange(2))
    x = noise.normal("initial", SHAPE)
    one, other, plain = (
        last_of(request(sampler=sampler).chain(each, x, noise))
        for each in (wrapped, denoiser(guided), denoiser(network))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert (one - plain).abs().max() > 0.1


def test_another_x0_takes_eps_and_the_mean_with_it_and_leaves_the_variance() -> None:
    family = objective(variance="learned-range", loss="hybrid")
    x, t, x0 = normal(1, 3, *SHAPE), torch.tensor([0, 7, 19]), normal(2, 3, *SHAPE)
    step = family.denoiser(lambda x, _: torch.cat((x, x.sin()), dim=1))(x, t)
    other = step.with_x0(x0)
    assert torch.equal(other.x0, x0)
    torch.testing.assert_close(family.diffusion.q_sample(x0, t, other.eps), x, rtol=0, atol=1e-5)
    assert torch.equal(other.mean, family.diffusion.posterior_mean(x0, x, t))
    assert torch.equal(other.log_variance, step.log_variance)


def test_bits_per_dimension_are_refused_where_the_family_has_no_such_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = objective().denoiser(network)
    opened = SimpleNamespace(denoiser=Guided(plain, plain, 2.0))
    monkeypatch.setattr(bits_per_dim, "open_trained", lambda *_: opened)
    request = bits_per_dim.BoundRequest(
        trained=TrainedRequest(run=Path("run"), checkpoint=None, weights="ema"),
        reverse=ReverseRequest(),
        data=None,
        held_out=False,
        images=None,
        decoder="exact",
        seed=0,
        batch=2,
        out=None,
    )
    with pytest.raises(ConfigError, match="--run run: its family has no bound that is a sum over timesteps"):
        bits_per_dim.evaluate_bound(request)


def settings(**log: object) -> Config:
    model = {"image_size": 8, "base_channels": 32, "channel_multipliers": [1], "attention_resolutions": []}
    raw = {"run_dir": "run", "data": {"path": "data"}, "model": model, "diffusion": {"timesteps": 20}, "log": log}
    return Config.parse(raw, source="test")


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"samples_sampler": "dim"}, "log.samples_sampler = 'dim': unknown; did you mean ddim?"),
        ({"samples_eta": 0.5}, "log.samples_eta = 0.5: goes with sampler ddim"),
        ({"samples_respacing": "21"}, "log.samples_respacing='21': must keep from 2 to 20 timesteps"),
        ({"samples_respacing": "ten"}, "log.samples_respacing='ten': must be 'all', a count"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused_at_the_start(log: dict[str, object], message: str) -> None:
    config = settings(**log)
    with pytest.raises(ConfigError) as error:
        plan_grid(config, build_objective(config, torch.device("cpu")), ranks=1)
    assert str(error.value).startswith(message)


def test_a_run_with_such_a_grid_does_not_begin(tmp_path: Path, dataset: Path) -> None:
    config = str(write_config(tmp_path, dataset))
    said = launch(1, "--config", config, *overrides(log__samples_sampler="dim"), expect=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert line == "error: log.samples_sampler = 'dim': unknown; did you mean ddim?"
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_grid_is_what_sample_draws_with_the_same_request(processes: int, tmp_path: Path, dataset: Path) -> None:
    """By any sampler, on any number of processes; the batch is what the ranks divide the grid into."""
    how = {"log__samples_sampler": "ddim", "log__samples_eta": 0.5, "log__samples_respacing": "5"}
    grids = overrides(log__samples_every="2 steps", log__samples=6, train__duration="2 steps", **how)
    launch(processes, "--config", str(write_config(tmp_path, dataset)), *grids)  # respacing as a number in TOML
    run, out = tmp_path / "run", tmp_path / "drawn"
    again = ("--sampler", "ddim", "--eta", "0.5", "--respacing", "5", "--seed", "3")
    arguments = ("--run", str(run), "--checkpoint", str(checkpoint(run, 2)), "--n", "6", *again)
    batch = ("--batch", str(6 // processes))
    launch(3 - processes, *arguments, *batch, "--format", "npz", "--out", str(out), script="sample")
    with np.load(out / "samples.npz") as stored:
        expected = grid(stored["arr_0"].transpose(0, 3, 1, 2))
    assert np.array_equal(np.asarray(Image.open(run / "samples" / "step-00000002.png")), expected)
