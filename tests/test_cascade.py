"""Upsamplers: what they are given is made of the image, noised by position; cascades: drawn alike by any processes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.adm import CONDITIONAL, GOLDEN, normal, unet
from tests.data_harness import pixels
from tests.data_prep_harness import data_prep
from tests.faults import Fault
from tests.harness import (
    assert_same_state,
    checkpoint,
    launch,
    load_config,
    logged,
    overrides,
    read_verified,
    tensors_of,
    write_config,
)
from trainer.config.backbones import ADMUNetConfig
from trainer.data.images import from_uint8, to_uint8
from trainer.data.training_data import open_training_data
from trainer.diffusion.keyed_noise import KeyedNoise, Stream, keyed_flips, keyed_int
from trainer.diffusion.low_res import area_downsample, low_res_conditioning, with_noise
from trainer.engine.build import build_objective
from trainer.engine.network.build import build_network
from trainer.engine.step.train_step import conditioning, device_batch
from trainer.errors import ConfigError, ConversionError
from trainer.interop.supported import adm_network
from trainer.sampling.conditioned import check_drawable
from trainer.sampling.conditions import Conditions
from trainer.sampling.ddim import ddim
from trainer.sampling.request import RequestError, SamplingRequest
from trainer.sampling.steps import last_of

CLASSES, SEED = 3, 5
LABELLED = {"model__classes": CLASSES, "model__label_drop": 0.3, "data__cond": '["label"]', "model__dropout": 0.0}
BASE = overrides(**LABELLED, model__image_size=4, train__ema_decay=0.5, train__duration="3 steps")
ADM = {"model__kind": "adm-unet", "model__heads": 2, "model__low_res_size": 4, "train__ema_decay": 0.5}
NOISED = overrides(**LABELLED, **ADM, model__low_res_noise=0.5)
PLAIN = overrides(**ADM, model__dropout=0.0, train__duration="1 steps")
OPTIONS = "sampler=ddim,respacing=5,guidance=2,low-res-noise=0.3"
SECTION = ADMUNetConfig.model_validate(GOLDEN | {"low_res_size": 8, "low_res_noise": 0.4})


def upsampler_config(tmp_path: Path, data: Path, *further: str) -> Path:
    """Of an upsampler from 4 x 4 to 8 x 8 without classes."""
    path = write_config(tmp_path, data)
    load_config(path, *PLAIN[1::2], *further)
    return path


# What the network is given


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_area_downsampling_is_the_means_of_blocks(size: int) -> None:
    x, side = normal(0, 2, 3, 16, 16), 16 // size
    blocks = x.double().reshape(2, 3, size, side, size, side).mean(dim=(3, 5))
    torch.testing.assert_close(area_downsample(x, size).double(), blocks, rtol=0, atol=1e-6)
    torch.testing.assert_close(area_downsample(x, size), F.interpolate(x, size, mode="area"), rtol=0, atol=1e-6)


def enlarged(image: Tensor, side: int) -> Tensor:
    """Bilinear, in float64, from the centres of pixels: (h, h) -> (side, side)."""
    h = len(image)
    at = (((torch.arange(side) + 0.5) * h / side) - 0.5).clamp(0, h - 1).double()
    below = at.floor().long()
    above, share = (below + 1).clamp(max=h - 1), at - at.floor()
    rows = torch.lerp(image[below], image[above], share[:, None])
    return torch.lerp(rows[:, below], rows[:, above], share[None, :])


def test_it_is_enlarged_bilinearly_and_stands_beside_x_t() -> None:
    network = unet(**GOLDEN, low_res_size=8)
    seen: list[Tensor] = []
    network.conv_in.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    x, low_res = normal(1, 2, 3, 32, 32), normal(2, 2, 3, 8, 8)
    with torch.no_grad():
        network(x, torch.tensor([3, 997]), low_res=low_res)
    assert torch.equal(seen[0][:, :3], x)
    expected = torch.stack([torch.stack([enlarged(c.double(), 32) for c in image]) for image in low_res])
    torch.testing.assert_close(seen[0][:, 3:].double(), expected, rtol=0, atol=1e-6)


def training_noise(position: Tensor, seed: int = SEED) -> KeyedNoise:
    return KeyedNoise.training(seed, position)


def test_level_and_noise_are_functions_of_seed_and_position() -> None:
    position = torch.arange(4000) + 2**33
    x = torch.zeros(4000, 1, 16, 16)
    given = low_res_conditioning(SECTION, x, {}, training_noise(position))
    level = given["low_res_level"]
    assert given["low_res"].shape == (4000, 1, 8, 8)
    assert level.dtype == torch.float32
    assert 0 <= level.min() < 0.001
    assert 0.399 < level.max() <= 0.4
    assert abs(level.mean().item() - 0.2) < 5 * 0.4 / math.sqrt(12 * 4000)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    for some in order.split(777):
        part = low_res_conditioning(SECTION, x[some], {}, training_noise(position[some]))
        assert all(torch.equal(part[name], given[name][some]) for name in given)
    other = low_res_conditioning(SECTION, x, {}, training_noise(position, seed=6))["low_res_level"]
    assert abs(torch.corrcoef(torch.stack((level, other)))[0, 1]) < 5 / math.sqrt(4000)
    deviation = given["low_res"].std(dim=(1, 2, 3))
    expected = (0.5 * math.pi * level).sin()
    assert ((deviation - expected).abs() < 0.5 * expected + 1e-6).all()  # of 64 numbers each
    assert (deviation / expected).mean().item() == pytest.approx(1, abs=0.02)


def test_noise_keeps_the_variance_and_none_changes_nothing() -> None:
    low_res = normal(0, 1000, 1, 8, 8)
    noise = training_noise(torch.arange(1000))
    for level in (0.0, 0.3, 1.0):
        found = with_noise(low_res, torch.full((1000,), level), noise)["low_res"]
        assert found.std().item() == pytest.approx(1, abs=0.02)
        kept = (found * low_res).mean().item() / low_res.square().mean().item()
        assert kept == pytest.approx(math.cos(0.5 * math.pi * level), abs=0.02)
    assert torch.equal(with_noise(low_res, torch.zeros(1000), noise)["low_res"], low_res)


def test_its_noise_is_that_of_nothing_else() -> None:
    """eps of training is the noise of x_t, and validation's and a sample's are others."""
    index, shape = torch.arange(50), (3, 4, 4)
    kinds = [KeyedNoise.training(SEED, index), KeyedNoise.validation(SEED, index), KeyedNoise.sampling(SEED, index)]
    drawn = [kind.normal("low_res", shape) for kind in kinds]
    drawn += [kind.normal("eps", shape) for kind in kinds[:2]] + [kinds[2].normal("initial", shape)]
    correlations = torch.corrcoef(torch.stack([each.flatten() for each in drawn]))
    assert (correlations - torch.eye(6)).abs().max() < 5 / math.sqrt(50 * 48)


def test_a_stage_has_noise_of_its_own() -> None:
    requests = [SamplingRequest(count=8, seed=SEED, batch=8, stage=stage) for stage in range(3)]
    drawn = [request.noise(range(8), torch.device("cpu")).normal("initial", (3, 8, 8)) for request in requests]
    assert torch.equal(drawn[0], KeyedNoise.sampling(SEED, torch.arange(8)).normal("initial", (3, 8, 8)))
    correlations = torch.corrcoef(torch.stack([each.flatten() for each in drawn]))
    assert (correlations - torch.eye(3)).abs().max() < 5 / math.sqrt(8 * 192)


def test_a_batch_is_given_means_of_the_mirrored_image(tmp_path: Path, dataset: Path) -> None:
    config = load_config(upsampler_config(tmp_path, dataset), *PLAIN[1::2])
    assert config.data.flip
    images = torch.from_numpy(np.stack([pixels(n) for n in range(20)])).permute(0, 3, 1, 2)
    found = device_batch({"image": images, "position": torch.arange(20)}, config, torch.device("cpu"))
    flips = keyed_flips(config.seed, torch.arange(20))
    x = torch.stack([image.flip(-1) if flip else image for image, flip in zip(from_uint8(images), flips)])
    assert torch.equal(found.x, x)
    assert found.cond.keys() == {"low_res"}
    torch.testing.assert_close(found.cond["low_res"], F.interpolate(x, 4, mode="area"), rtol=0, atol=1e-6)


def test_a_stored_image_is_taken_where_it_is_read(tmp_path: Path, dataset: Path) -> None:
    config = load_config(upsampler_config(tmp_path, dataset), *PLAIN[1::2], 'data.cond=["low_res"]', "data.flip=false")
    low = torch.from_numpy(np.stack([pixels(100 + n, 4, 4) for n in range(3)])).permute(0, 3, 1, 2)
    batch = {"image": torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "position": torch.arange(3), "low_res": low}
    assert torch.equal(device_batch(batch, config, torch.device("cpu")).cond["low_res"], from_uint8(low))
    assert conditioning(batch, config, torch.device("cpu")).keys() == {"low_res"}


# The network


def test_without_noise_the_network_is_what_it_was() -> None:
    torch.manual_seed(0)
    before = unet(**CONDITIONAL, low_res_size=8).state_dict()
    torch.manual_seed(0)
    told = unet(**CONDITIONAL, low_res_size=8, low_res_noise=0.4)
    added = {f"low_res_temb.dense_{end}.{kind}" for end in ("in", "out") for kind in ("weight", "bias")}
    assert told.state_dict().keys() - before.keys() == added
    assert not any("low_res" in name for name in before)
    for parameter in told.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = normal(1, 2, 3, 32, 32), torch.tensor([3, 997])
    cond = {"label": torch.tensor([1, 5]), "low_res": normal(2, 2, 3, 8, 8)}
    with torch.no_grad():
        found = [told(*inputs, **cond, low_res_level=torch.tensor([0.1, level])) for level in (0.1, 0.4)]
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])
    with pytest.raises(ValueError, match="low_res_level: this network needs it"):
        told(*inputs, **cond)
    with pytest.raises(ValueError, match="low_res_level: this network takes none"):
        unet(**GOLDEN, low_res_size=8)(*inputs, low_res=cond["low_res"], low_res_level=torch.zeros(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.low_res_size=3"], r"model.low_res_size = 3: must divide model.image_size = 8, since low_res is made"),
        (["model.low_res_size=8"], r"model: low_res_size = 8: must be less than image_size = 8"),
        (["model.low_res_noise=1.5"], r"model.low_res_noise = 1.5: should be less than or equal to 1"),
    ],
)
def test_sizes_and_levels_that_cannot_be_are_one_line(
    tmp_path: Path, dataset: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        upsampler_config(tmp_path, dataset, *changes)
    assert "\n" not in str(refused.value)
    upsampler_config(tmp_path, dataset, "model.low_res_size=3", 'data.cond=["low_res"]')  # a stored one has any side


def test_noise_without_an_image_to_put_it_in_is_one_line(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: low_res_noise = 0.5: goes with low_res_size; set it, or leave it"):
        load_config(write_config(tmp_path, dataset), "model.kind=adm-unet", "model.heads=2", "model.low_res_noise=0.5")


def test_what_upsamples_is_drawn_in_a_cascade_only(tmp_path: Path, dataset: Path) -> None:
    model = load_config(upsampler_config(tmp_path, dataset), *PLAIN[1::2]).model
    check_drawable(model, upsamples=True)
    with pytest.raises(ConfigError, match=r"it takes low_res, which samples cannot be given outside a cascade"):
        check_drawable(model)


def test_a_level_is_at_most_that_of_the_training() -> None:
    Conditions(low_res_noise=0.4).check(SECTION)
    with pytest.raises(RequestError, match=r"low_res_noise=0.5: should be from 0 to the model.low_res_noise .*, 0.4$"):
        Conditions(low_res_noise=0.5).check(SECTION)
    with pytest.raises(RequestError, match=r"low_res_noise=0.1: should be from 0 to the model.low_res_noise .*, 0$"):
        Conditions(low_res_noise=0.1).check(ADMUNetConfig.model_validate(GOLDEN))
    with pytest.raises(RequestError, match=r"low_res_noise=1.5: should be a level from 0, without noise, to 1"):
        Conditions(low_res_noise=1.5)


def test_a_network_that_is_told_a_level_is_not_exported(tmp_path: Path, dataset: Path) -> None:
    config = load_config(upsampler_config(tmp_path, dataset), *PLAIN[1::2], "model.low_res_noise=0.5")
    with pytest.raises(ConversionError, match=r"^model.low_res_noise = 0.5: guided-diffusion's upsamplers are told no"):
        adm_network(config, "run")


# Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes as shards of 4 x 4 and of 8 x 8; `base`, a run that draws the small ones; `up`, one that
    enlarges them, is told noise and classes; `plain`, one that is told neither.
    """
    folder = tmp_path_factory.mktemp("cascade")
    for number in range(12):
        place = folder / "images" / "abc"[number % CLASSES]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(place / f"{number:02d}.png")
    for side in (4, 8):
        assert data_prep(folder / "images", folder / f"shards{side}", "--size", side, "--workers", 1) == 0
    launch(1, "--config", str(write_config(folder, folder / "shards4", "base")), *BASE)
    train_upsampler(folder, "up")
    launch(1, "--config", str(write_config(folder, folder / "shards8", "plain")), *PLAIN)
    return folder


def train_upsampler(folder: Path, name: str, *legs: int) -> None:
    """Six steps, in legs of so many processes; the single one validates."""
    config = write_config(folder, folder / "shards8", name)
    validated = overrides(log__validate_every="6 steps") if not legs else []
    for leg, ranks in enumerate(legs or [1], start=1):
        until = overrides(train__duration=f"{6 * leg // len(legs or [0])} steps", data__holdout=0.3)
        launch(ranks, "--config", str(config), *NOISED, *until, *validated)


def test_an_upsampler_trains_on_any_dataset_and_resumes_to_the_bit(folder: Path) -> None:
    train_upsampler(folder, "resumed", 1, 1)
    assert_same_state(folder / "up", folder / "resumed", 6)
    train_upsampler(folder, "two", 2, 1)
    assert logged(folder / "two") == pytest.approx(logged(folder / "up"), abs=1e-5)
    tensors = tensors_of(folder / "up", 6)
    assert tensors["model/conv_in.weight"].shape == (8, 6, 3, 3)
    assert tensors["model/low_res_temb.dense_in.weight"].shape == (32, 8)
    config = str(folder / "up.toml")
    changed = overrides(model__low_res_noise=0.4, data__holdout=0.3, train__duration="8 steps")
    said = launch(1, "--config", config, *NOISED, *changed, expect=2)
    assert "model.low_res_noise: 0.5 in the checkpoint, 0.4 now" in said
    stored = overrides(data__cond='["label", "low_res"]', data__holdout=0.3)
    assert "no sample in" in launch(1, "--config", config, *NOISED, *stored, expect=2)


def test_held_out_images_are_noised_by_themselves(folder: Path) -> None:
    config = load_config(folder / "up" / "config.toml")
    data = open_training_data(config, index_folder=None)
    network = network_of(folder / "up", "ema")
    losses = []
    for sample in data.held_out.tolist():  # one by one
        image = torch.empty(8, 8, 3, dtype=torch.uint8)
        data.dataset.decode_into(image.numpy(), sample)
        x, position = from_uint8(image.permute(2, 0, 1)[None]), torch.tensor([sample])
        noise = KeyedNoise.validation(config.seed, position)
        level = 0.5 * noise.bits("low_res_level") / 2**32
        cond = with_noise(F.interpolate(x, 4, mode="area"), level.float(), noise)
        t = (noise.bits("t") * 20) >> 32
        objective = build_objective(config, torch.device("cpu"))
        eps = noise.normal("eps", (3, 8, 8))
        x_t = objective.denoiser(network).diffusion.q_sample(x, t, eps)
        with torch.no_grad():
            found = network(x_t, t, label=torch.tensor([data.dataset.further(sample)["label"]]), **cond)
        losses.append((found - eps).square().mean().item())
    assert np.mean(losses) == pytest.approx(logged(folder / "up", "validation/ema_loss")[6], rel=1e-4)


def network_of(run: Path, weights: str) -> torch.nn.Module:
    """Of the last checkpoint, without any of the program's own ways to it."""
    network = build_network(load_config(run / "config.toml")).eval()
    newest = max((run / "checkpoints").glob("step-*"))
    tensors, _ = read_verified(newest)
    prefix = f"{weights}/"
    network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return network


def arguments(folder: Path, out: Path, *then: str, n: int = 5) -> list[str]:
    stages = [argument for text in then for argument in ("--then", f"{folder}/{text}")]
    seeded = ["--seed", str(SEED), "--batch", "2", "--n", str(n)]
    return ["--run", str(folder / "base"), "--out", str(out), "--format", "npz", *seeded, *stages]


def drawn(out: Path) -> tuple[np.ndarray, list[int]]:
    with np.load(out / "samples.npz", allow_pickle=False) as stored:
        return stored["arr_0"], stored["arr_1"].tolist()


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """Five samples of the cascade, by one process."""
    launch(1, *arguments(folder, folder / "whole", f"up:{OPTIONS}"), script="sample")
    return folder / "whole"


def test_a_cascade_is_its_stages_one_after_another(folder: Path, whole: Path) -> None:
    launch(1, *arguments(folder, folder / "small"), script="sample")
    small, labels = drawn(folder / "small")
    images, told = drawn(whole)
    assert small.shape == (5, 4, 4, 3)
    assert images.shape == (5, 8, 8, 3)
    assert told == labels
    network, config = network_of(folder / "up", "ema"), load_config(folder / "up" / "config.toml")
    noise = KeyedNoise.sampling(keyed_int(SEED, Stream.STAGE, 1), torch.arange(5))
    cond = with_noise(from_uint8(torch.from_numpy(small).permute(0, 3, 1, 2)), torch.full((5,), 0.3), noise)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        of_class = network(x, t, label=torch.tensor(labels), **cond)
        of_none = network(x, t, label=torch.full((5,), CLASSES), **cond)
        return of_none + 2 * (of_class - of_none)

    reverse = build_objective(config, torch.device("cpu")).denoiser(guided, respacing="5")
    x0 = last_of(ddim(reverse, noise.normal("initial", (3, 8, 8)), noise=noise))
    expected = to_uint8(x0).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_two_processes_and_a_killed_one_draw_the_same(folder: Path, whole: Path, tmp_path: Path) -> None:
    expected, labels = drawn(whole)
    two = arguments(folder, tmp_path / "two", f"up:{OPTIONS}")
    launch(2, *two, script="sample")
    assert np.array_equal(drawn(tmp_path / "two")[0], expected)
    killed = arguments(folder, tmp_path / "killed", f"up:{OPTIONS}")
    kill = Fault(action="kill", point="denoise", call=22, rank=0)  # in the second stage of its first batch
    launch(2, *killed, script="sample", fault=kill, expect=None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "parts").glob("*.npz")}
    kill = Fault(action="kill", point="work_part", call=2, rank=0)
    launch(1, *killed, script="sample", fault=kill, expect=None)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "parts").glob("*.npz")}
    assert 1 <= len(after) < 3
    assert {path: after[path] for path in before} == before  # not drawn again
    launch(1, *killed, script="sample")
    images, told = drawn(tmp_path / "killed")
    assert np.array_equal(images, expected)
    assert told == labels
    said = launch(1, *arguments(folder, tmp_path / "two", "up:respacing=5"), script="sample", expect=2)
    assert "holds what another request made (then: [" in said


def test_a_sample_does_not_depend_on_the_others(folder: Path, whole: Path, tmp_path: Path) -> None:
    launch(1, *arguments(folder, tmp_path, f"up:{OPTIONS}", n=3), "--batch", "3", script="sample")
    images, _ = drawn(tmp_path)
    assert np.abs(images.astype(int) - drawn(whole)[0][:3]).max() <= 1  # rounding


def test_the_folder_says_the_cascade_and_the_cost_is_told(folder: Path) -> None:
    stages = ("--then", f"{folder}/up:{OPTIONS}")
    said = launch(1, "--run", str(folder / "base"), "--n", "1", "--classes", "2", *stages, script="sample")
    assert "guidance 2: 10 network calls a sample, 5 without" in said
    (made,) = (folder / "base" / "samples").iterdir()
    assert made.name == (
        "step-00000003-ema-classes-2-seed-0-then-up-step-00000006-ema-ddim-eta-0-5-guidance-2-low-res-noise-0.3"
    )
    with Image.open(made / "000000.png") as image:
        assert image.size == (8, 8)
    (stage,) = json.loads((made / "request.json").read_text())["then"]
    assert (stage["sampler"], stage["guidance"], stage["low_res_noise"]) == ("ddim-eta-0", 2.0, 0.3)
    assert f"; then {checkpoint(folder / 'up', 6)}: ddim-eta-0, 5 steps" in said


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("base", "its network does not upsample, for it has no model.low_res_size"),
        ("nowhere", "holds no config.toml, so it is no run's folder"),
        ("plain:guidance=2", "--guidance 2.0: needs a null class, that is a network trained with"),
        ("plain:low-res-noise=0.1", "--low-res-noise 0.1: should be from 0 to the model.low_res_noise"),
        ("up:classes=1", "--classes 1: goes with --run, whose classes its samples keep"),
        ("up:samplr=ddim", "unrecognized arguments: --samplr=ddim"),
        ("up:sampler=ddimm", "--sampler ddimm: unknown; did you mean ddim?"),
        ("up:respacing=ten", "--respacing: "),
        ("up:guidance=high", "argument --guidance: invalid float value: 'high'"),
    ],
)
def test_what_cannot_be_a_stage_is_one_line(folder: Path, tmp_path: Path, then: str, message: str) -> None:
    assert_refused(arguments(folder, tmp_path / "out", then), message)


def assert_refused(wanted: list[str], message: str) -> None:
    said = launch(1, *wanted, script="sample", expect=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert line.startswith("error: --then ")
    assert message in line
    assert "Traceback" not in said


def test_sizes_channels_and_classes_that_do_not_fit_are_one_line(folder: Path, tmp_path: Path) -> None:
    """The other way round, twice the same, and behind bases that draw other images."""
    out = tmp_path / "out"
    assert_refused(arguments(folder, out, "up", "up"), "low_res_size = 4: should be 8, as of the images that it is gi")
    grey = folder / "grey"
    grey.mkdir()
    text = (folder / "base" / "config.toml").read_text()
    (grey / "config.toml").write_text(text.replace("channels = 3", "channels = 1", 1))
    wanted = arguments(folder, out, "up")
    wanted[1] = str(grey)
    assert_refused(wanted, "model.channels = 3: should be 1, as of the images that it is given")
    unlabelled = folder / "unlabelled"
    unlabelled.mkdir()
    lines = [line for line in text.splitlines() if not line.startswith(("classes", "label_drop"))]
    (unlabelled / "config.toml").write_text("\n".join(lines))
    wanted[1] = str(unlabelled)
    assert_refused(wanted, "model.classes = 3: the base takes no labels")


def test_a_stage_is_guided_by_an_upsampler_of_the_same_images(folder: Path, tmp_path: Path) -> None:
    itself = arguments(folder, tmp_path / "itself", f"up:guidance=2,guide={folder}/up,respacing=3", n=2)
    launch(1, *itself, script="sample")
    launch(1, *arguments(folder, tmp_path / "alone", "up:respacing=3", n=2), script="sample")
    guided, alone = (drawn(tmp_path / name)[0].astype(int) for name in ("itself", "alone"))
    assert np.abs(guided - alone).max() <= 1
    other = f"up:guidance=2,guide={folder}/plain"
    assert_refused(arguments(folder, tmp_path / "other", other), "model.low_res_noise = 0.0; should be 0.5, as of the")


def test_an_upsampler_is_judged_on_what_its_base_draws(folder: Path, tmp_path: Path) -> None:
    small = ("--features", "efficientnet-lite0", "--samples", "4", "--batch", "2", "--respacing", "2")
    stage = ("--then", f"{folder}/plain:sampler=ddim,respacing=2")
    judged = ("fid", "--run", str(folder / "base"), *small, *stage, "--out", str(tmp_path))
    launch(2, *judged, script="evaluate")
    (path,) = tmp_path.glob("fid-*.json")
    report = json.loads(path.read_text())
    assert report["reference"]["name"] == str(folder / "shards8")
    assert report["samples"]["number"] == 4
    assert [stage["sampler"] for stage in report["samples"]["then"]] == ["ddim-eta-0"]
    assert "-then-plain-step-00000001-ema-ddim-eta-0-2-" in path.name
