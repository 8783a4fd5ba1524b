"""Upsamplers in whole runs, and cascades: drawn alike by any processes, guided, judged."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

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
from trainer.data.images import from_uint8, to_uint8
from trainer.data.training_data import open_training_data
from trainer.diffusion.keyed_noise import KeyedNoise, Stream, keyed_int
from trainer.diffusion.low_res import with_noise
from trainer.engine.build import build_objective
from trainer.engine.network.build import build_network
from trainer.sampling.ddim import ddim
from trainer.sampling.guidance import ClassifierGuided
from trainer.sampling.request import SamplingRequest
from trainer.sampling.steps import last_of

CLASSES, SEED = 3, 5
LABELLED = {"model__classes": CLASSES, "model__label_drop": 0.3, "data__cond": '["label"]', "model__dropout": 0.0}
BASE = overrides(**LABELLED, model__image_size=4, train__ema_decay=0.5, train__duration="3 steps")
ADM = {"model__kind": "adm-unet", "model__heads": 2, "model__low_res_size": 4, "train__ema_decay": 0.5}
NOISED = overrides(**LABELLED, **ADM, model__low_res_noise=0.5)
PLAIN = overrides(**ADM, model__dropout=0.0, train__duration="1 steps")
OPTIONS = "sampler=ddim,respacing=5,guidance=2,low-res-noise=0.3"


def test_a_stage_has_noise_of_its_own() -> None:
    requests = [SamplingRequest(count=8, seed=SEED, batch=8, stage=stage) for stage in range(3)]
    drawn = [request.noise(range(8), torch.device("cpu")).normal("initial", (3, 8, 8)) for request in requests]
    assert torch.equal(drawn[0], KeyedNoise.sampling(SEED, torch.arange(8)).normal("initial", (3, 8, 8)))
    correlations = torch.corrcoef(torch.stack([each.flatten() for each in drawn]))
    assert (correlations - torch.eye(3)).abs().max() < 5 / math.sqrt(8 * 192)


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


def train_classifier(folder: Path, side: int) -> str:
    """A classifier of the images of this side, in one step."""
    config = write_config(folder, folder / f"shards{side}", f"classifier{side}")
    text = config.read_text().replace('variance = "small"\n', 'kind = "classifier"\n')
    config.write_text(text.replace("[model]\n", '[model]\nkind = "adm-classifier"\n'))
    sized = {"model__image_size": side, "model__classes": CLASSES, "model__heads": 2, "data__cond": '["label"]'}
    launch(1, "--config", str(config), *overrides(**sized, train__duration="1 steps"))
    return str(folder / f"classifier{side}")


def test_a_classifier_leads_a_stage_to_the_classes_of_the_base(folder: Path, tmp_path: Path) -> None:
    by = train_classifier(folder, 8)
    guided = f"plain:sampler=ddim,respacing=5,classifier={by},classifier-scale=200"
    launch(1, *arguments(folder, tmp_path / "out", guided), script="sample")
    launch(1, *arguments(folder, tmp_path / "small"), script="sample")
    images, told = drawn(tmp_path / "out")
    small, labels = drawn(tmp_path / "small")
    assert told == labels
    network, config = network_of(folder / "plain", "ema"), load_config(folder / "plain" / "config.toml")
    noise = KeyedNoise.sampling(keyed_int(SEED, Stream.STAGE, 1), torch.arange(5))
    cond = {"low_res": from_uint8(torch.from_numpy(small).permute(0, 3, 1, 2))}
    plain = build_objective(config, torch.device("cpu")).denoiser(network, cond, respacing="5")
    found = []
    for denoiser in (plain, ClassifierGuided(plain, network_of(Path(by), "ema"), torch.tensor(labels), scale=200)):
        with torch.no_grad():
            x0 = last_of(ddim(denoiser, noise.normal("initial", (3, 8, 8)), noise=noise))
        found.append(to_uint8(x0).permute(0, 2, 3, 1).numpy().astype(int))
    assert np.abs(images.astype(int) - found[1]).max() <= 1
    assert np.abs(found[1] - found[0]).max() > 1
    other = tmp_path / "other"
    other.mkdir()
    text = (Path(by) / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace(f"classes = {CLASSES}", "classes = 2", 1))
    wanted = arguments(folder, tmp_path / "refused", f"plain:classifier={other}")
    assert_refused(wanted, "model.classes = 2: should be 3, as of the base")
    wanted = arguments(folder, tmp_path / "refused", f"plain:classifier={folder}/base")
    assert_refused(wanted, 'diffusion.kind = "ddpm"; should be the run of a classifier')


def test_a_base_without_classes_has_those_of_its_classifier_in_all_stages(folder: Path, tmp_path: Path) -> None:
    """By the distance of each class of the cascade's samples."""
    by = train_classifier(folder, 4)
    bare = overrides(model__image_size=4, train__duration="1 steps")
    launch(1, "--config", str(write_config(folder, folder / "shards4", "bare")), *bare)
    guided = ("--run", str(folder / "bare"), "--classifier", by, "--classes", "0,2", "--respacing", "2")
    small = ("--features", "efficientnet-lite0", "--samples", "8", "--batch", "4", "--subset-size", "4")
    stage = ("--then", f"{folder}/up:sampler=ddim,respacing=2")
    said = launch(1, "kid", *guided, *small, *stage, "--per-class", "--out", str(tmp_path), script="evaluate")
    (path,) = tmp_path.glob("kid-*.json")
    report = json.loads(path.read_text())
    assert report["kernel_distance_by_class"].keys() == {"0", "2"}
    assert report["samples"]["classes"] == report["samples"]["then"][0]["classes"] == "0,2"
    assert "kernel distance of 2 classes by themselves" in said


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
