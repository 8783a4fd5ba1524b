"""What every family and every backbone inherits from the engine, over all pairs of the tables, with tiny networks."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.faults import Fault
from tests.harness import (
    assert_same_state,
    largest_difference,
    launch,
    load_config,
    logged,
    make_dataset,
    overrides,
    tensors_of,
    write_config,
)
from trainer.config import Config
from trainer.data.images import read_images
from trainer.data.stream.batches import as_tensors, stacked
from trainer.data.training_data import open_training_data
from trainer.diffusion.contract import Batch, Losses
from trainer.diffusion.families import FAMILIES
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.diffusion.time_distribution import GivenTimes
from trainer.engine.build import build_objective
from trainer.engine.network.build import build_network
from trainer.models.backbones import BACKBONES, example_cond

# The smallest section of each kind, for 8 x 8 colour images; without dropout, whose masks depend on the micro-batch.
DIFFUSION = {"ddpm": "timesteps = 20", "classifier": "timesteps = 20"}
MODEL = {
    "ddpm-unet": "base_channels = 8\nchannel_multipliers = [1, 2]\nblocks_per_level = 1\nattention_resolutions = [4]\n"
    "norm_groups = 4",
    "adm-unet": "base_channels = 8\nchannel_multipliers = [1, 2]\nblocks_per_level = 1\nattention_resolutions = [4]\n"
    "norm_groups = 4\nheads = 2",
    "adm-classifier": "base_channels = 8\nchannel_multipliers = [1, 2]\nblocks_per_level = 1\n"
    "attention_resolutions = [4]\nnorm_groups = 4\nheads = 2\nclasses = 3",
}
CLASSIFIER = ("classifier", "adm-classifier")
EXPORTED = {("ddpm", "ddpm-unet"): "model_index.json", ("ddpm", "adm-unet"): "model.pt", CLASSIFIER: "model.pt"}
# A classifier goes with no other family or network.
PAIRS = [pair for pair in product(DIFFUSION, MODEL) if pair == CLASSIFIER or not set(pair) & set(CLASSIFIER)]
STEPS, DECAY = 6, 0.9


def test_every_kind_is_tested() -> None:
    assert DIFFUSION.keys() == FAMILIES.keys()
    assert MODEL.keys() == BACKBONES.keys()


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images in three uneven shards, of three classes, which classifiers are told."""
    return make_dataset(tmp_path_factory.mktemp("labelled"), classes=3)


def configured(folder: Path, data: Path, name: str, pair: tuple[str, str]) -> str:
    family, backbone = pair
    path = write_config(folder, data, name)
    text = path.read_text()
    start, end = text.index("[model]"), text.index("[optimizer]")
    sections = f'[model]\nkind = "{backbone}"\nimage_size = 8\n{MODEL[backbone]}\n'
    sections += f'[diffusion]\nkind = "{family}"\n{DIFFUSION[family]}\n'
    head = text[:start].replace("[data]\n", '[data]\ncond = ["label"]\n') if pair == CLASSIFIER else text[:start]
    path.write_text(head + sections + text[end:])
    return str(path)


@pytest.fixture(scope="module")
def whole(folder: Path, dataset: Path, pair: tuple[str, str]) -> Path:
    """A run of one process that nothing interrupted, with a checkpoint and a validation after every step."""
    name = f"whole-{'-'.join(pair)}"
    every_step = overrides(checkpoint__every="1 steps", data__holdout="0.2", log__validate_every="1 steps")
    launch(1, "--config", configured(folder, dataset, name, pair), *every_step)
    return folder / name


def moved(folder: Path, dataset: Path, name: str, pair: tuple[str, str], legs: list[tuple[int, str, str]]) -> Path:
    """The same run, each leg of which has its number of processes, strategy and micro-batch."""
    config = configured(folder, dataset, name, pair)
    for leg, (ranks, strategy, micro_batch) in enumerate(legs, start=1):
        until = f"{STEPS * leg // len(legs)} steps"
        changes = overrides(train__duration=until, train__strategy=strategy, train__micro_batch=micro_batch)
        launch(ranks, "--config", config, *changes, *overrides(data__holdout="0.2"))
    return folder / name


def test_a_resume_is_exact(folder: Path, dataset: Path, pair: tuple[str, str], whole: Path) -> None:
    resumed = moved(folder, dataset, f"resumed-{'-'.join(pair)}", pair, [(1, "ddp", "8")] * 2)
    assert_same_state(whole, resumed, STEPS)
    assert logged(resumed) == logged(whole)


@pytest.mark.parametrize(
    "legs",
    [
        [(2, "ddp", "4"), (1, "ddp", "2"), (2, "zero2", "2")],
        pytest.param([(2, "fsdp2", "4"), (2, "zero2", "4"), (2, "ddp", "1")], marks=pytest.mark.slow),
        pytest.param([(1, "fsdp2", "4"), (2, "fsdp2", "2"), (1, "zero2", "8")], marks=pytest.mark.slow),
    ],
    ids=["ddp-zero2", "fsdp2-zero2-ddp", "fsdp2-zero2"],
)
def test_ranks_strategy_and_accumulation_may_change(
    folder: Path, dataset: Path, pair: tuple[str, str], whole: Path, legs: list[tuple[int, str, str]]
) -> None:
    name = "-".join([*pair, *(strategy for _, strategy, _ in legs), str(legs[0][0])])
    run = moved(folder, dataset, name, pair, legs)
    assert logged(run) == pytest.approx(logged(whole), abs=1e-5)
    one, other = (without_bias_of_keys(tensors_of(each, STEPS)) for each in (run, whole))
    assert largest_difference(one, other) < 1e-4


def without_bias_of_keys(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the bias of the keys in the classifier's pool, the second third of [q, k, v]: it adds the same to a
    query's products with all keys, which softmax takes away. So its gradient is nothing but rounding, of which Adam
    makes steps of full length, in directions that differ with the micro-batch; the output does not depend on it.
    """
    named = {f"{kind}/pool.qkv.bias" for kind in ("model", "ema")}
    return {n: torch.cat(tensor.chunk(3)[::2]) if n in named else tensor for n, tensor in tensors.items()}


def test_the_average_is_that_of_the_weights(whole: Path) -> None:
    expected = {n: t.double() for n, t in tensors_of(whole, 1).items() if n.startswith("ema/")}
    for step in range(2, STEPS + 1):
        tensors = tensors_of(whole, step)
        for name, average in expected.items():
            weights = tensors[name.replace("ema/", "model/", 1)].double()
            expected[name] = DECAY * average + (1 - DECAY) * weights
            torch.testing.assert_close(tensors[name].double(), expected[name], rtol=1e-5, atol=1e-7)


def losses_of(config: Config, batch: Batch, noise: KeyedNoise, times: GivenTimes | None = None) -> Losses:
    torch.manual_seed(config.seed)
    network = build_network(config).eval()
    for parameter in network.parameters():  # the output of a fresh network is near 0
        torch.nn.init.normal_(parameter, std=0.1)
    objective = build_objective(config, torch.device("cpu"))
    times = objective.validation_times if times is None else times
    with torch.no_grad():
        return objective.training_losses(network, batch, noise, times=times)


@pytest.fixture
def config(folder: Path, dataset: Path, pair: tuple[str, str]) -> Config:
    return load_config(Path(configured(folder, dataset, "losses", pair)))


def batch_of(config: Config, positions: list[int]) -> Batch:
    cond = example_cond(config.model, len(positions))
    pixels = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(position)) for position in positions]
    return Batch(x=2 * torch.stack(pixels) - 1, position=torch.tensor(positions), cond=cond)


def test_losses_belong_to_samples(config: Config) -> None:
    """Whatever else is in the batch, however it is divided, and whether t is drawn anew (training, validation) or was
    recorded (replay): a sample has one loss.
    """
    positions = list(range(100, 108))
    batch = batch_of(config, positions)
    losses = losses_of(config, batch, KeyedNoise.training(config.seed, batch.position))
    assert losses.loss.shape == losses.level.shape == (8,)
    assert (losses.level >= 0).all()
    assert (losses.level < 1).all()
    assert len(set(losses.loss.tolist())) == 8
    for some in (positions[:3], positions[3:], positions[::-1]):
        part = batch_of(config, some)
        again = losses_of(config, part, KeyedNoise.training(config.seed, part.position))
        chosen = [positions.index(position) for position in some]
        torch.testing.assert_close(again.loss, losses.loss[chosen])
        assert torch.equal(again.t, losses.t[chosen])
    replayed = losses_of(
        config, batch, KeyedNoise.training(config.seed, batch.position), GivenTimes(losses.t, losses.weight)
    )
    assert torch.equal(replayed.loss, losses.loss)
    validated = losses_of(config, batch, KeyedNoise.validation(config.seed, batch.position))
    assert not torch.equal(validated.loss, losses.loss)  # by noise of its own


def test_validation_is_the_objective_on_the_held_out_images(whole: Path) -> None:
    config = load_config(whole / "config.toml")
    data = open_training_data(config, index_folder=None)
    values = logged(whole, "validation/loss")
    assert values.keys() == set(range(1, STEPS + 1))
    assert len(data.held_out) > 0
    network = build_network(config).eval()
    weights = {name: tensor for name, tensor in tensors_of(whole, 3).items() if name.startswith("model/")}
    network.load_state_dict({name.removeprefix("model/"): tensor for name, tensor in weights.items()})
    pixels, further, _ = read_images(data.dataset, data.held_out.tolist())
    cond = as_tensors(stacked(further))
    batch = Batch(x=pixels.float() / 127.5 - 1, position=torch.from_numpy(data.held_out), cond=cond)
    objective = build_objective(config, torch.device("cpu"))
    with torch.no_grad():
        losses = objective.training_losses(
            network, batch, KeyedNoise.validation(config.seed, batch.position), times=objective.validation_times
        )
    assert values[3] == pytest.approx(losses.loss.double().mean().item(), rel=1e-5)


def test_samples_do_not_depend_on_the_number_of_processes(whole: Path, pair: tuple[str, str], tmp_path: Path) -> None:
    if pair == CLASSIFIER:
        told = launch(1, "--run", str(whole), "--n", "1", script="sample", expect=2)
        assert "error: model.kind = adm-classifier: a classifier draws no samples; it guides others\n" in told
        return
    pictures: list[np.ndarray] = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        drawn = ("--run", str(whole), "--n", "6", "--batch", "2", "--seed", "5", "--out", str(out))
        launch(ranks, *drawn, script="sample")
        pictures.append(np.asarray(Image.open(out / "grid.png")))
    assert pictures[0].std() > 0
    assert np.array_equal(*pictures)


def test_a_step_that_is_not_finite_changes_nothing_and_is_replayed(
    folder: Path, dataset: Path, pair: tuple[str, str], whole: Path
) -> None:
    name = f"nan-{'-'.join(pair)}"
    config = configured(folder, dataset, name, pair)
    fault = Fault(action="nan", point="device_batch", call=4, rank=1)
    launch(2, "--config", config, *overrides(checkpoint__every="1 steps", data__holdout="0.2"), fault=fault)
    before, after = tensors_of(folder / name, 3), tensors_of(folder / name, 4)
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    assert sorted(logged(folder / name)) == [1, 2, 3, 5, 6]
    dump = folder / name / "nonfinite" / "step-00000004.json"
    told = launch(1, str(dump), script="replay", expect=1)  # the images themselves are sound
    (loss,) = re.findall(r"^loss (\S+), .* finite; NOT reproduced$", told, re.MULTILINE)
    assert float(loss) == pytest.approx(logged(whole)[4], rel=1e-4)


def test_it_is_exported_or_says_in_one_line_that_it_cannot(whole: Path, pair: tuple[str, str], tmp_path: Path) -> None:
    arguments = ("export", "--run", str(whole), "--out", str(tmp_path / "out"))
    if pair in EXPORTED:
        launch(1, *arguments, script="convert")
        assert (tmp_path / "out" / EXPORTED[pair]).is_file()
    else:
        line = launch(1, *arguments, script="convert", expect=2)
        assert line.count("\n") == 1
        assert "cannot be converted" in line
