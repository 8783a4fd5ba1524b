"""The classifier of noisy images: its loss and accuracy, its runs and their optimizer, what it guides, refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.adm import classifier, normal
from tests.data_prep_harness import data_prep
from tests.harness import launch, load_config, logged, overrides, tensors_of, write_config
from trainer.config import ClassifierConfig
from trainer.diffusion.classifier import ClassifierObjective
from trainer.diffusion.contract import Batch, Losses
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.engine.network.build import build_network
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.errors import ConfigError

LABEL = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
BATCH = Batch(x=normal(1, 8, 3, 32, 32), position=torch.arange(8), cond={"label": LABEL})
NOISE = KeyedNoise.training(0, BATCH.position)


def objective(timesteps: int = 20) -> ClassifierObjective:
    return ClassifierObjective(ClassifierConfig(timesteps=timesteps), torch.device("cpu"))


# The objective


def test_the_loss_is_the_cross_entropy_of_the_class_of_x_t() -> None:
    logits = normal(2, 8, 3)
    given: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        given.append((x, t))
        return logits

    family = objective()
    losses = family.training_losses(network, BATCH, NOISE)
    ((x_t, t),) = given
    eps = NOISE.normal("eps", (3, 32, 32))
    assert torch.equal(x_t, family.diffusion.q_sample(BATCH.x, t, eps))
    assert torch.equal(losses.t, t)
    assert torch.equal(losses.level, t / 20)
    exact = logits.double()
    torch.testing.assert_close(losses.loss.double(), exact.logsumexp(dim=1) - exact[torch.arange(8), LABEL])
    assert losses.figures["accuracy"].tolist() == (logits.argmax(dim=1) == LABEL).float().tolist()
    assert 0 < losses.figures["accuracy"].sum() < 8


def test_a_fresh_adaptive_classifier_has_the_loss_ln_k() -> None:
    losses = objective(1000).training_losses(classifier("adaptive"), BATCH, NOISE)
    torch.testing.assert_close(losses.loss, torch.full((8,), math.log(10)))


def test_losses_of_parts_are_joined_with_their_figures() -> None:
    whole = objective().training_losses(lambda x, _: x.mean(dim=(2, 3)), BATCH, NOISE)
    parts = []
    for some in (slice(0, 3), slice(3, 8)):
        batch = Batch(x=BATCH.x[some], position=BATCH.position[some], cond={"label": LABEL[some]})
        noise = KeyedNoise.training(0, batch.position)
        parts.append(objective().training_losses(lambda x, _: x.mean(dim=(2, 3)), batch, noise))
    joined = Losses.join(parts)
    assert torch.equal(joined.t, whole.t)
    torch.testing.assert_close(joined.loss, whole.loss)
    assert torch.equal(joined.figures["accuracy"], whole.figures["accuracy"])


# AdamW and its learning rate


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_weight_decay_makes_adam_adamw(decay: float) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    own = GuardedAdam(
        ours.parameters(), learning_rate=0.1, betas=(0.9, 0.999), eps=1e-8, clip_norm=math.inf, weight_decay=decay
    )
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, eps=1e-8, weight_decay=decay)
    x = normal(3, 4, 5)
    for _ in range(3):
        for network in (ours, theirs):
            network.zero_grad()
            network(x).square().mean().backward()
        own.prepare_step(learning_rate=0.1, loss=torch.tensor(0.0))
        own.step()
        reference.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "left"),
    [
        ("constant", [1.0] * 6),
        ("linear", [1 - step / 6 for step in range(6)]),
        ("cosine", [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]),
    ],
)
def test_the_schedule_leads_the_learning_rate_to_0(
    schedule: str, left: list[float], dataset: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, dataset)
    launch(1, "--config", str(config), *overrides(optimizer__schedule=schedule, optimizer__warmup="0 steps"))
    rates = logged(tmp_path / "run", "train/learning_rate")
    assert rates == pytest.approx({step: 1e-3 * rate for step, rate in enumerate(left, start=1)})


# Whole runs


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark images, of class 0, and bright ones, of class 1: 24 of each."""
    folder = tmp_path_factory.mktemp("shades")
    random = np.random.default_rng(0)
    for number in range(48):
        place = folder / "images" / ("0-dark", "1-bright")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        shade = random.integers(0, 100, (8, 8, 3), dtype=np.uint8) + 155 * (number % 2)
        Image.fromarray(shade.astype(np.uint8)).save(place / f"{number:02d}.png")
    assert data_prep(folder / "images", folder / "shards", "--size", 8, "--workers", 1) == 0
    return folder / "shards"


def write_classifier(folder: Path, data: Path, name: str = "classifier") -> str:
    config = write_config(folder, data, name)
    text = config.read_text().replace('variance = "small"\n', 'kind = "classifier"\n')
    model = 'kind = "adm-classifier"\nclasses = 2\nheads = 2\n'
    text = text.replace("[model]\n", f"[model]\n{model}").replace("[data]\n", '[data]\ncond = ["label"]\n')
    config.write_text(text.replace("flip = true", "flip = false"))
    return str(config)


@pytest.fixture(scope="module")
def run(shades: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    longer = overrides(train__duration="60 steps", checkpoint__every="60 steps", optimizer__learning_rate=3e-3)
    validated = overrides(data__holdout=0.3, log__validate_every="30 steps", optimizer__weight_decay=0.05)
    said = launch(1, "--config", write_classifier(folder, shades), *longer, *validated)
    assert "; accuracy " in said
    return folder / "classifier"


def test_a_run_learns_the_classes_and_logs_its_accuracy_by_noise_level(run: Path) -> None:
    assert len(logged(run)) == 60
    for name in ("validation/accuracy", "validation/ema_accuracy"):
        assert list(logged(run, name)) == [30, 60]
        assert logged(run, f"{name}_q1")[60] > 0.9  # chance is 0.5; nothing is left to see where there is most noise
        loss = logged(run, f"{name.replace('accuracy', 'loss')}_q1")
        assert loss[60] < loss[30] < 0.5 * math.log(2)  # half that of a classifier that knows nothing
        quarters = [logged(run, f"{name}_q{number}") for number in range(1, 5)]
        assert sum(map(len, quarters)) >= 4
        assert all(0 <= value <= 1 for quarter in quarters for value in quarter.values())
    assert logged(run, "validation/loss_class_0").keys() == {30, 60}
    assert launch(1, str(run), script="report")
    page = (run / "report.html").read_text()
    assert "Validation accuracy by timestep, averaged weights" in page


@pytest.fixture(scope="module")
def denoiser(shades: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without classes, of a few steps."""
    folder = tmp_path_factory.mktemp("denoiser")
    launch(1, "--config", str(write_config(folder, shades)))
    return folder / "run"


def drawn(run: Path, out: Path, *arguments: str, processes: int = 1) -> tuple[np.ndarray, list[int]]:
    wanted = ("--run", str(run), "--out", str(out), "--n", "6", "--batch", "2", "--format", "npz", "--seed", "5")
    said = launch(processes, *wanted, *arguments, script="sample")
    assert "classifier: 20 calls and gradients of it a sample" in said
    with np.load(out / "samples.npz", allow_pickle=False) as stored:
        return stored["arr_0"].astype(int), stored["arr_1"].tolist()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_of_a_network_without_classes_move_to_the_class(
    run: Path, denoiser: Path, tmp_path: Path, sampler: str
) -> None:
    guided = ("--classifier", str(run), "--classifier-scale", "10", "--sampler", sampler)
    dark, _ = drawn(denoiser, tmp_path / "dark", *guided, "--classes", "0")
    bright, _ = drawn(denoiser, tmp_path / "bright", *guided, "--classes", "1")
    assert bright.mean() > dark.mean() + 5
    both, labels = drawn(denoiser, tmp_path / "both", *guided, "--classes", "balanced", processes=2)
    assert labels == [0, 1] * 3
    assert np.abs(both[0::2] - dark[0::2]).max() <= 1  # rounding, for it is the same batch with other classes
    assert np.abs(both[1::2] - bright[1::2]).max() <= 1


def test_what_a_classifier_cannot_guide_is_one_line(run: Path, denoiser: Path, shades: Path, tmp_path: Path) -> None:
    other = write_classifier(tmp_path, shades, "other")
    launch(1, "--config", other, *overrides(diffusion__timesteps=10, train__duration="1 steps"))
    for arguments, line in (
        (("--classifier", str(denoiser)), 'diffusion.kind = "ddpm"; should be the run of a classifier'),
        (("--classifier", str(tmp_path)), "is neither a run nor a checkpoint of one"),
        (("--classifier", str(tmp_path / "other")), "its noise levels are not those of the run that it guides"),
        (("--guide", str(run), "--guidance", "2"), "is a classifier; give it as --classifier"),
        (("--classifier-scale", "2"), "--classifier-scale 2: goes with a classifier"),
        (("--classifier", str(run), "--classifier-scale", "-1"), "--classifier-scale -1.0: should be a number above"),
        (("--classifier", str(run), "--classes", "2"), "--classes 2: should be from 0 to 1"),
    ):
        said = launch(1, "--run", str(denoiser), "--n", "1", *arguments, script="sample", expect=2)
        (error,) = [found for found in said.splitlines() if found.startswith("error:")]
        assert line in error


def test_a_classifier_is_not_judged_by_samples(run: Path) -> None:
    said = launch(1, "bpd", "--run", str(run), script="evaluate", expect=2)
    assert "model.kind = adm-classifier: a classifier draws no samples; it guides others" in said


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["log.samples_every=5 steps"], 'log.samples_every = "5 steps": a classifier draws no samples; set "0 steps"'),
        (["log.distance_every=5 steps"], 'log.distance_every = "5 steps": a classifier draws no samples'),
        (["diffusion.kind=ddpm"], 'model.kind = "adm-classifier", diffusion.kind = "ddpm": a classifier has'),
        (["model.pool=mean"], "model.pool = 'mean': should be 'attention', 'adaptive' or 'spatial'"),
        (["diffusion.schedule=table"], 'diffusion: schedule = "table" and betas go together'),
    ],
)
def test_a_configuration_that_cannot_be_is_one_line(tmp_path: Path, changes: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(Path(write_classifier(tmp_path, tmp_path)), *changes)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_classifier_must_be_given_labels(tmp_path: Path) -> None:
    config = load_config(Path(write_classifier(tmp_path, tmp_path)), "data.cond=[]")
    with pytest.raises(ConfigError, match=r"^data.cond = \[\]: the network takes label; add it$"):
        build_network(config)


def test_a_run_goes_out_to_openais_layout_and_comes_back(run: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "exported", tmp_path / "again"
    launch(1, "export", "--run", str(run), "--weights", "model", "--out", str(out), script="convert")
    published = torch.load(out / "model.pt", weights_only=True)
    assert published["out.2.c_proj.weight"].shape == (2, 16, 1)
    source = ("import", str(out / "model.pt"), "--config", str(out / "config.toml"), "--out", str(again))
    launch(1, *source, script="convert")
    before, after = tensors_of(run, 60), tensors_of(again, 0)
    weights = [name for name in before if name.startswith("model/")]
    assert all(torch.equal(before[name], after[name]) for name in weights)
