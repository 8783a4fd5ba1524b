"""An exported run draws in diffusers what it draws here, and says truly what it is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tests.harness import checkpoint, overrides
from tests.networks import make_run
from trainer import convert
from trainer.config import Config
from trainer.diffusion.ddpm.schedules import ScheduleName, make_betas
from trainer.diffusion.keyed_noise import KeyedNoise, Stream, keyed_normal
from trainer.engine.build import build_objective
from trainer.engine.checkpointing.checkpoints import read_weights
from trainer.engine.network.build import build_network
from trainer.interop import export as export_module
from trainer.models.ddpm_unet import UNet
from trainer.sampling.ancestral import ancestral
from trainer.sampling.steps import last_of

CIFAR_LIKE = overrides(
    model__image_size=16,
    model__base_channels=16,
    model__channel_multipliers="[1, 2, 2, 2]",
    model__blocks_per_level=2,
    model__attention_resolutions="[8]",
    model__norm_groups=16,
    diffusion__variance="large",
)[1::2]
TWO_LEVELS = overrides(
    model__image_size=16,
    model__channels=1,
    model__base_channels=8,
    model__channel_multipliers="[1, 2, 3]",
    model__attention_resolutions="[8, 4]",
)[1::2]
SHORT = "diffusion.timesteps=25"
LONG = "diffusion.timesteps=1000"
SEED = 5


def run_convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["trainer/convert.py", *map(str, arguments)])
    return convert.main()


def network_of(run: Path, config: Config, kind: str = "ema", step: int = 3) -> UNet:
    network = build_network(config).eval()
    weights, _ = read_weights(checkpoint(run, step), kind)  # type: ignore[arg-type]
    network.load_state_dict(weights)
    return network


def export(monkeypatch: pytest.MonkeyPatch, run: Path, *arguments: object) -> Path:
    out = run.parent / "exported"
    assert run_convert(monkeypatch, "export", "--run", run, "--out", out, *arguments) == 0
    return out


def image_shape(config: Config) -> tuple[int, int, int]:
    return config.model.channels, config.model.image_size, config.model.image_size


@pytest.mark.parametrize(
    "network",
    [
        pytest.param((*CIFAR_LIKE, "diffusion.schedule=linear"), id="cifar-linear-large"),
        pytest.param((*TWO_LEVELS, "diffusion.schedule=cosine"), id="two-levels-cosine-small"),
        pytest.param((*TWO_LEVELS, "diffusion.schedule=linear"), id="two-levels-linear-small"),
        pytest.param((*TWO_LEVELS, "diffusion.prediction=v", "diffusion.schedule=sigmoid"), id="v-sigmoid"),
        pytest.param((*TWO_LEVELS, "diffusion.prediction=x0"), id="x0"),
        pytest.param(
            (*TWO_LEVELS, "diffusion.variance=learned-range", "diffusion.loss=hybrid", "diffusion.schedule=cosine"),
            id="learned-range",
        ),
    ],
)
def test_the_ddpm_pipeline_draws_our_images_from_our_noise(
    network: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = make_run(tmp_path, *network, SHORT)
    pipeline = DDPMPipeline.from_pretrained(export(monkeypatch, run))
    pipeline.set_progress_bar_config(disable=True)
    index, shape = torch.arange(2), image_shape(config)

    def noises() -> Iterator[torch.Tensor]:
        yield keyed_normal(SEED, Stream.INITIAL, index, shape)
        for t in reversed(range(1, 25)):
            yield keyed_normal(SEED, Stream.ANCESTRAL, index, shape, sub=t)

    denoiser = build_objective(config, torch.device("cpu")).denoiser(network_of(run, config))
    keyed = KeyedNoise.sampling(SEED, index)
    ours = last_of(ancestral(denoiser, keyed.normal("initial", shape), noise=keyed))
    noise = noises()
    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: next(noise))
    theirs = pipeline(batch_size=2, num_inference_steps=25, output_type="pt").images
    assert next(noise, None) is None  # all of it was used
    assert (theirs * 2 - 1 - ours).abs().max() < 1e-4
    assert (ours.abs() < 0.99).float().mean() > 0.2  # the clamp at the end hides little


@pytest.mark.parametrize("schedule", [pytest.param("linear", marks=pytest.mark.slow), "cosine"])
def test_the_ddim_pipeline_draws_equation_12_of_its_paper(
    schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 of 1000 timesteps, eta = 0; the reference is written from the equation, in float64 but for the network."""
    run, config = make_run(tmp_path, *TWO_LEVELS, LONG, f"diffusion.schedule={schedule}")
    pipeline = DDIMPipeline.from_pretrained(export(monkeypatch, run))
    pipeline.set_progress_bar_config(disable=True)
    network = network_of(run, config)
    initial = keyed_normal(SEED, Stream.INITIAL, torch.arange(2), image_shape(config))
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: initial)
    theirs = pipeline(batch_size=2, num_inference_steps=50, use_clipped_model_output=True, output_type="pt").images

    abar = torch.cumprod(1 - make_betas(config.diffusion.schedule, 1000), dim=0)
    x = initial.double()
    for t in reversed(range(0, 1000, 20)):
        with torch.no_grad():
            eps = network(x.float(), torch.full((2,), t)).double()
        x0 = ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
        eps = (x - abar[t].sqrt() * x0) / (1 - abar[t]).sqrt()
        before = abar[t - 20] if t >= 20 else torch.tensor(1.0)
        x = before.sqrt() * x0 + (1 - before).sqrt() * eps
    assert (theirs * 2 - 1 - x).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_exported_weights_give_the_same_output_elsewhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = make_run(tmp_path, *TWO_LEVELS)
    exported = export(monkeypatch, run, "--weights", kind)
    elsewhere = exported.rename(tmp_path / "elsewhere")
    run.rename(tmp_path / "away")
    unet = DDPMPipeline.from_pretrained(elsewhere).unet
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([0, 17])
    with torch.no_grad():
        ours = network_of(tmp_path / "away", config, kind)(x, t)
        other = network_of(tmp_path / "away", config, {"ema": "model", "model": "ema"}[kind])(x, t)
        theirs = unet(x, t).sample
    assert (theirs - ours).abs().max() < 1e-5
    assert (other - ours).abs().max() > 0.1
    assert not list(elsewhere.rglob("*.bin"))


@pytest.mark.parametrize(
    ("schedule", "named"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("sigmoid", None), ("table", None)]
)
def test_a_schedule_goes_by_name_where_diffusers_knows_it_else_as_a_table_and_comes_back(
    schedule: ScheduleName, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [0.01 + 0.001 * t**1.5 for t in range(25)]
    given = [f"diffusion.betas={table}"] if schedule == "table" else []
    run, _ = make_run(tmp_path, SHORT, f"diffusion.schedule={schedule}", *given)
    out = export(monkeypatch, run)
    scheduler = DDPMPipeline.from_pretrained(out).scheduler
    betas = make_betas(schedule, 25, table if schedule == "table" else None)
    torch.testing.assert_close(scheduler.betas.double(), betas, rtol=1e-6, atol=0)
    assert scheduler.config.trained_betas is None or named is None
    assert named is None or scheduler.config.beta_schedule == named
    assert run_convert(monkeypatch, "import", out, "--out", tmp_path / "back") == 0
    again = Config.load(tmp_path / "back" / "config.toml").diffusion
    assert again.schedule == schedule
    assert schedule != "table" or again.betas == pytest.approx(table)


def test_the_model_card_says_what_was_trained_on_what_and_how_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(tmp_path)
    out = export(monkeypatch, run, "--license", "cc-by-4.0")
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "diffusers"
    parameters = sum(value.numel() for value in load_file(out / "unet/diffusion_pytorch_model.safetensors").values())
    for line in (
        "| weights | exponential moving average of the weights, decay 0.9 |",
        f"| parameters | {parameters:,} |",
        "| optimizer steps | 3 |",
        "| images seen | 24 |",
        f"| data | fingerprint {'f' * 64} |",
        "| `model.base_channels` | `8` |",
        "| `optimizer.learning_rate` | `0.001` |",
        f"python trainer/convert.py export --run {run} --out {out} --license cc-by-4.0",
    ):
        assert line in card.text.splitlines()
    assert "DDIMPipeline" in card.text
    out.rename(tmp_path / "licensed")
    card = ModelCard.load(export(monkeypatch, run) / "README.md")
    assert card.data.license is None
    assert "Licence of the weights: not stated" in card.text


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (["diffusion.prediction=mu"], [], "diffusion.prediction = 'mu': has no like in diffusers"),
        (["diffusion.variance=learned", "diffusion.loss=bound"], [], "diffusion.variance = 'learned': has no like"),
        (["model.channel_multipliers=[2, 2]"], [], "model.channel_multipliers = [2, 2]: in diffusers the first level"),
        ([], ["--run", "nowhere"], "--run nowhere: holds no config.toml"),
        ([], ["--checkpoint", "nowhere"], "nowhere: damaged: manifest.json is missing"),
        ([], ["--out", "."], "--out .: exists already"),
        ([], ["--out", "/proc/nowhere"], "--out /proc/nowhere: cannot be written"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    changes: list[str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = make_run(tmp_path, *changes)
    out = tmp_path / "exported"
    assert run_convert(monkeypatch, "export", "--run", run, "--out", out, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.toml"]


def test_an_export_that_fails_leaves_nothing_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path)

    def full(*_: object, **__: object) -> str:
        assert not (tmp_path / "exported").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "model_card", full)
    assert run_convert(monkeypatch, "export", "--run", run, "--out", tmp_path / "exported") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.toml"]


def test_the_card_of_a_learned_variance_offers_only_what_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path, "diffusion.variance=learned-range", "diffusion.loss=hybrid")
    card = (export(monkeypatch, run) / "README.md").read_text()
    assert "DDPMPipeline" in card
    assert "DDIMPipeline" not in card
