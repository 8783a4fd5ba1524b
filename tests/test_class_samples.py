"""Classes of samples: chosen by number, guided, written beside samples; whole runs that take them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from tests.harness import (
    assert_same_state,
    checkpoint,
    launch,
    load_config,
    logged,
    overrides,
    write_config,
)
from tests.labelled import CLASSES, CONDITIONAL, KINDS, LABELLED, prepare
from trainer.data.training_data import open_training_data
from trainer.engine.monitoring.sample_grids import picture_of
from trainer.errors import ConfigError
from trainer.sampling.conditioned import check_drawable
from trainer.sampling.conditions import Conditions
from trainer.sampling.request import RequestError, SamplingRequest
from trainer.telemetry.pictures import grid, tile


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("classes"), ["ape", "bee", "cat"])


# Classes of samples


def test_a_samples_class_is_a_function_of_its_number_and_the_seed() -> None:
    numbers = torch.arange(30_000)
    for text in ("uniform", "balanced", "3,5,7"):
        choice = Conditions(classes=text)
        labels = choice.labels(numbers, seed=4, classes=10)
        parts = [choice.labels(some, seed=4, classes=10) for some in numbers.split(77)]
        assert torch.equal(torch.cat(parts), labels)
    assert Conditions(classes="3,5,7").labels(numbers[:5], seed=4, classes=10).tolist() == [3, 5, 7, 3, 5]
    assert Conditions(classes="balanced").labels(numbers, seed=4, classes=10).bincount().tolist() == [3000] * 10
    uniform = Conditions().labels(numbers, seed=4, classes=10)
    assert (uniform.bincount(minlength=10) - 3000).abs().max() < 5 * 2700**0.5
    assert not torch.equal(uniform, Conditions().labels(numbers, seed=5, classes=10))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": "3,"}, "classes='3,': should be uniform, balanced, or classes such as 3,5,7"),
        ({"classes": "some"}, "classes='some': should be uniform, balanced, or"),
        ({"guidance": -1.0}, "guidance=-1.0: should be a number from 0; 1 is without guidance"),
        ({"guidance": float("nan")}, "guidance=nan: should be a number from 0"),
        ({"guidance_interval": (0.2, 3.0)}, "guidance_interval='0.2,3': goes with a guidance other than 1"),
        ({"guide": Path("runs/x")}, "guide='runs/x': goes with a guidance other than 1"),
        ({"guidance": 2.0, "guidance_interval": (3.0, 0.2)}, "guidance_interval='3,0.2': should be two noise levels"),
        ({"dynamic_threshold": 1.0}, "dynamic_threshold=1.0: should be a quantile, above 0 and below 1"),
    ],
)
def test_conditions_that_cannot_be_say_why(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        Conditions(**fields)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)


def test_requests_without_conditions_are_named_as_before() -> None:
    request = SamplingRequest(count=4, seed=3, batch=2)
    assert request.name_parts == ["ddpm", "seed-3"]
    conditions = Conditions(
        classes="3,5", guidance=2.0, guidance_interval=(0.28, 2.9), dynamic_threshold=0.995, guide=Path("runs/small")
    )
    named = SamplingRequest(count=4, seed=3, batch=2, conditions=conditions).name_parts
    assert "-".join(named) == (
        "ddpm-classes-3-5-guidance-2-guidance-interval-0.28-2.9-dynamic-threshold-0.995-by-small-seed-3"
    )


def test_a_grid_has_a_row_for_each_class() -> None:
    images = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1).repeat(4, axis=2).repeat(4, axis=3)
    in_rows = images[[0, 4, 1, 5, 2, 6, 3, 7]]
    assert np.array_equal(picture_of(images, rows=4), tile(in_rows, columns=2))
    assert np.array_equal(picture_of(images, rows=None), grid(images))


# Whole runs


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one process, with a validation, and a grid of two images a class."""
    folder = tmp_path_factory.mktemp("run")
    more = overrides(
        log__samples_every="6 steps", log__samples=7, log__samples_guidance=2.0, data__holdout=0.4, train__ema_decay=0.5
    )
    validated = overrides(log__validate_every="6 steps")
    launch(1, "--config", str(write_config(folder, shards)), *LABELLED, *more, *validated)
    return folder / "run"


def test_a_conditional_run_resumes_and_moves_between_ranks_as_any_other(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    config = str(write_config(tmp_path, shards))
    same = [*LABELLED, *overrides(data__holdout=0.4, train__ema_decay=0.5)]
    launch(1, "--config", config, *same, *overrides(train__duration="3 steps"))
    launch(1, "--config", config, *same)
    assert_same_state(run, tmp_path / "run", 6)
    two = str(write_config(tmp_path, shards, "two"))
    launch(2, "--config", two, *same, *overrides(train__micro_batch=2))
    assert logged(tmp_path / "two") == pytest.approx(logged(run), abs=1e-5)
    said = launch(1, "--config", config, *same, *overrides(model__label_drop=0.2, train__duration="8 steps"), expect=2)
    assert "model.label_drop: 0.3 in the checkpoint, 0.2 now" in said


def test_the_validation_loss_is_logged_by_class(run: Path) -> None:
    config = load_config(run / "config.toml")
    data = open_training_data(config, index_folder=None)
    labels = [data.dataset.further(int(sample))["label"] for sample in data.held_out]
    assert len(set(labels)) > 1
    for name in ("loss", "ema_loss"):
        by_class = [logged(run, f"validation/{name}_class_{label}")[6] for label in labels]
        assert np.mean(by_class) == pytest.approx(logged(run, f"validation/{name}")[6])


def drawn(run: Path, out: Path, processes: int, *arguments: str, n: int = 6) -> np.ndarray:
    launch(
        processes, "--run", str(run), "--out", str(out), "--n", str(n), "--format", "npz", *arguments, script="sample"
    )
    with np.load(out / "samples.npz", allow_pickle=False) as stored:
        assert stored.files == ["arr_0", "arr_1"]
        return stored["arr_0"]


def labels_of(out: Path) -> list[int]:
    with np.load(out / "samples.npz", allow_pickle=False) as stored:
        assert stored["arr_1"].dtype == np.int64
        return stored["arr_1"].tolist()


def test_a_sample_does_not_depend_on_its_batch_or_rank(run: Path, tmp_path: Path) -> None:
    guided = ("--guidance", "3", "--classes", "2,0,1,1", "--seed", "5")
    one = drawn(run, tmp_path / "one", 1, *guided, "--batch", "2")
    two = drawn(run, tmp_path / "two", 2, *guided, "--batch", "2")
    other = drawn(run, tmp_path / "other", 1, *guided, "--batch", "5")
    assert np.array_equal(one, two)
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1  # rounding
    assert labels_of(tmp_path / "two") == [2, 0, 1, 1, 2, 0]
    plain = drawn(run, tmp_path / "plain", 1, "--classes", "2,0,1,1", "--seed", "5", "--batch", "2")
    assert not np.array_equal(one, plain)
    class_1 = drawn(run, tmp_path / "class", 1, "--classes", "1", "--seed", "5", "--batch", "2")
    assert np.array_equal(plain[2:4], class_1[2:4])
    assert not np.array_equal(plain[:2], class_1[:2])


def test_labels_stand_beside_samples_in_every_format(run: Path, tmp_path: Path) -> None:
    drawn(run, tmp_path / "npz", 1)
    labels = labels_of(tmp_path / "npz")
    assert labels == Conditions().labels(torch.arange(6), seed=0, classes=CLASSES).tolist()
    for output in ("folder", "tar"):
        out = tmp_path / output
        launch(1, "--run", str(run), "--out", str(out), "--n", "6", "--format", output, script="sample")
    assert json.loads((tmp_path / "folder" / "labels.json").read_text()) == labels
    samples = wds.WebDataset(str(tmp_path / "tar" / "samples-000000.tar"), shardshuffle=False).decode()
    assert [sample["cls"] for sample in samples] == labels


def test_the_grid_is_what_sample_draws_with_a_row_for_each_class(run: Path, tmp_path: Path) -> None:
    """Seven images were asked for: two of each of three classes."""
    again = ("--classes", "balanced", "--guidance", "2", "--seed", "3", "--batch", "6")
    images = drawn(run, tmp_path, 2, *again, "--checkpoint", str(checkpoint(run, 6)))
    expected = picture_of(images.transpose(0, 3, 1, 2), rows=CLASSES)
    assert np.array_equal(np.asarray(Image.open(run / "samples" / "step-00000006.png")), expected)


def test_the_cost_of_guidance_is_told_and_a_request_of_another_guidance_is_another(run: Path, tmp_path: Path) -> None:
    arguments = ("--run", str(run), "--n", "2", "--out", str(tmp_path / "drawn"))
    said = launch(1, *arguments, "--guidance", "2", script="sample")
    assert "guidance 2: 40 network calls a sample, 20 without" in said
    assert "seed 0, classes uniform, guidance 2) in" in said
    said = launch(1, *arguments, "--guidance", "3", script="sample", expect=2)
    assert "holds what another request made (guidance: 2.0 there, 3.0 now)" in said
    interval = ("--guidance", "2", "--guidance-interval", "0.05,1", "--dynamic-threshold", "0.9")
    said = launch(1, *arguments[:4], *interval, "--out", str(tmp_path / "interval"), script="sample")
    assert "guidance 2: 25 network calls a sample, 20 without" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "3"], "--classes 3: should be from 0 to 2"),
        (["--guidance-interval", "0.1,2"], "--guidance-interval 0.1,2: goes with a guidance other than 1"),
        (["--guide", "."], "--guide .: goes with a guidance other than 1"),
        (["--guide", ".", "--guidance", "2"], "--guide .: is neither a run nor a checkpoint of one"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(run: Path, arguments: list[str], message: str) -> None:
    said = launch(1, "--run", str(run), "--n", "1", *arguments, script="sample", expect=2)
    assert [line for line in said.splitlines() if line.startswith("error:")] == [f"error: {message}"]


def test_another_run_guides_and_one_that_cannot_is_refused(run: Path, dataset: Path, tmp_path: Path) -> None:
    """An earlier checkpoint of the same run; a run without classes has no null class and takes no labels."""
    earlier = ("--guide", str(checkpoint(run, 2)), "--guidance", "2", "--seed", "5")
    guided = drawn(run, tmp_path / "guided", 1, *earlier)
    plain = drawn(run, tmp_path / "plain", 1, "--seed", "5")
    assert labels_of(tmp_path / "guided") == labels_of(tmp_path / "plain")
    assert not np.array_equal(guided, plain)
    itself = ("--guide", str(checkpoint(run, 6)), "--guidance", "2", "--seed", "5")
    same = drawn(run, tmp_path / "itself", 2, *itself)
    assert np.abs(same.astype(int) - plain.astype(int)).max() <= 1
    launch(1, "--config", str(write_config(tmp_path, dataset)), *overrides(train__duration="1 steps"))
    other = tmp_path / "run"
    for arguments, message in (
        (
            ("--run", str(other), "--guidance", "2"),
            "--guidance 2.0: needs a null class, that is a network trained with",
        ),
        (("--run", str(other), "--classes", "1"), "--classes 1: goes with a network that takes labels"),
        (
            ("--run", str(other), "--guide", str(run), "--guidance", "2"),
            "model.classes = 3; takes labels, unlike the run that it guides",
        ),
    ):
        assert message in launch(1, *arguments, "--n", "1", script="sample", expect=2)
    drawn(run, tmp_path / "unlabelled", 1, "--guide", str(other), "--guidance", "2")


def test_a_conditional_run_is_judged_and_shown(run: Path) -> None:
    launch(1, "bpd", "--run", str(run), "--images", "2", script="evaluate")
    launch(1, "progressive", "--run", str(run), "--rows", "1", "--classes", "2", "--guidance", "2", script="evaluate")
    launch(1, "shared-latents", "--run", str(run), "--rows", "1", "--variants", "2", script="evaluate")
    launch(1, "interpolate", "--run", str(run), "--images", "2", "--mixtures", "2", script="evaluate")
    launch(1, "reconstruct", "--run", str(run), "--images", "1", script="evaluate")
    (made,) = (run / "evaluation").glob("progressive-*.json")
    about = json.loads(made.read_text())
    assert (about["classes"], about["guidance"]) == ("2", 2.0)


def test_a_network_of_adm_drops_labels_and_is_drawn_from_by_classes(shards: Path, tmp_path: Path) -> None:
    adm = overrides(**KINDS["adm-unet"], log__samples_every="2 steps", log__samples=3)
    short = overrides(train__duration="2 steps")
    launch(1, "--config", str(write_config(tmp_path, shards)), *LABELLED, *adm, *short)
    guided = drawn(tmp_path / "run", tmp_path / "guided", 1, "--classes", "2,0", "--guidance", "2", n=2)
    assert labels_of(tmp_path / "guided") == [2, 0]
    assert not np.array_equal(guided[0], guided[1])


def test_what_more_than_classes_is_needed_for_is_not_drawn(shards: Path, tmp_path: Path) -> None:
    upsampler = overrides(**KINDS["adm-unet"], model__low_res_size=4)
    config = load_config(write_config(tmp_path, shards), *upsampler[1::2], *CONDITIONAL)
    with pytest.raises(ConfigError, match=r"^model.kind = adm-unet: it takes low_res, which samples cannot"):
        check_drawable(config.model)
    check_drawable(load_config(tmp_path / "run.toml", *CONDITIONAL).model)
