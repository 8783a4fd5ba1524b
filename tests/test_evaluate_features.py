"""FID and its relatives of a run: the same on any number of processes, killed, stopped or not; refusals are a line."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.faults import Fault
from tests.harness import launch, load_config, overrides, write_config
from tests.inception import write_random_inception
from tests.labelled import LABELLED, prepare
from tests.test_evaluate import evaluate
from trainer.errors import DataError
from trainer.evaluation.references import ReferenceImages, ReferenceRequest, ReferenceStatistics, open_reference

MOMENTS = ("mu", "sigma")
SMALL = ("--features", "efficientnet-lite0", "--samples", "12", "--batch", "2", "--respacing", "2", "--images", "12")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    launch(1, "--config", str(write_config(folder, dataset)), *overrides(train__duration="2 steps"))
    return folder / "run"


def judge(
    run: Path, metric: str, out: Path, *arguments: str, processes: int = 1, **options: object
) -> dict[str, float]:
    evaluate(run, metric, *SMALL, "--out", str(out), *arguments, processes=processes, **options)
    return report(out, metric)


def report(out: Path, metric: str) -> dict[str, float]:
    (path,) = out.glob(f"{metric}-*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Fréchet distance in one go on one process."""
    out = tmp_path_factory.mktemp("compared") / "whole"
    judge(run, "fid", out)
    return out


def files_of(out: Path) -> dict[Path, int]:
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.glob("*/parts/*.npz")}


def test_a_number_says_what_it_depends_on_and_is_called_fid_on_inception_alone(whole: Path) -> None:
    found = report(whole, "fid")
    assert found["metric"] == "Fréchet distance on EfficientNet-Lite0 features"
    assert found["frechet_distance"] > 1
    samples, reference, features = (found[name] for name in ("samples", "reference", "features"))
    assert (samples["number"], samples["weights"], samples["sampler"], samples["steps"]) == (12, "ema", "ddpm", 2)
    assert (samples["precision"], samples["pixels"], reference["number"]) == ("fp32", "uint8", 12)
    assert features["weights_sha256"].startswith("57934424")  # as in the name of its file
    assert "224 x 224" in features["resize"]


@pytest.mark.slow
def test_two_processes_and_a_killed_one_find_the_same(run: Path, whole: Path, tmp_path: Path) -> None:
    expected = report(whole, "fid")["frechet_distance"]
    out = tmp_path / "killed"
    killed = Fault(action="kill", point="work_part", call=3, rank=1)
    evaluate(run, "fid", *SMALL, "--out", str(out), processes=2, fault=killed, expect=None)
    before = files_of(out)
    assert 2 <= len(before) < 7
    assert not list(out.glob("*.json"))
    assert judge(run, "fid", out, processes=2)["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    after = files_of(out)
    assert {path: after[path] for path in before} == before  # not drawn again
    assert len(after) == 7  # six of samples and one of real images

    moments = [np.load(next(folder.glob("reference-*/moments-n-12.npz"))) for folder in (whole, out)]
    assert np.allclose(moments[0]["sigma"], moments[1]["sigma"], atol=1e-5)


@pytest.mark.slow
def test_a_signal_stops_all_and_the_same_command_goes_on(run: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    stop = Fault(action="stop", point="work_part", call=2, rank=0)
    said = evaluate(run, "fid", *SMALL, "--out", str(out), processes=2, fault=stop)
    assert "stopped by SIGTERM: " in said
    assert "of 12 samples are done, in " in said
    assert not list(out.glob("*.json"))
    expected = report(whole, "fid")["frechet_distance"]
    assert judge(run, "fid", out)["frechet_distance"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "metric", [("kid", "--subset-size", "8", "--subsets", "5"), ("is", "--splits", "3"), ("prdc",), ("cmmd",)]
)
def test_other_metrics_use_the_same_samples_on_any_number_of_processes(
    run: Path, whole: Path, metric: tuple[str, ...]
) -> None:
    name, *options = metric
    arguments = [*(SMALL[:-2] if name == "is" else SMALL), *options, "--out", str(whole)]
    before = files_of(whole)
    evaluate(run, name, *arguments)
    one = report(whole, name)
    evaluate(run, name, *arguments, processes=2)
    assert report(whole, name) == one
    assert files_of(whole) == before


@pytest.mark.slow
def test_sfid_draws_again_only_samples_that_were_kept_without_its_features(run: Path, tmp_path: Path) -> None:
    """Such as an earlier version kept: with pooled features and logits."""
    weights, out = write_random_inception(tmp_path / "weights.pth"), tmp_path / "out"
    asked = (
        *("--features", "inception", "--feature-weights", str(weights), "--feature-weights-unchecked"),
        *("--samples", "4", "--batch", "2", "--respacing", "2", "--images", "4", "--out", str(out)),
    )
    evaluate(run, "sfid", *asked)
    one = report(out, "sfid")
    assert one["metric"] == "spatial Fréchet distance on Inception with unchecked weights features"
    assert one["layer"] == "mixed_6/conv, its first 7 maps, 2023 values"
    assert one["frechet_distance"] > 0
    (samples,) = out.glob("samples-*")
    first, second = sorted(samples.glob("parts/*.npz"))
    with np.load(first) as stored:
        assert set(stored.files) == {"features", "logits", "spatial"}
        earlier = {name: stored[name] for name in ("features", "logits")}
    np.savez(first, **earlier)
    (samples / "moments-spatial-n-4.npz").unlink()
    before = second.stat().st_mtime_ns
    evaluate(run, "sfid", *asked, processes=2)
    assert report(out, "sfid")["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-4)
    assert second.stat().st_mtime_ns == before
    with np.load(first) as stored:
        assert "spatial" in stored.files
        assert np.allclose(stored["features"], earlier["features"], atol=1e-5)


def test_each_class_of_a_conditional_run_is_judged_by_itself_on_any_number_of_processes(tmp_path: Path) -> None:
    shards = prepare(tmp_path / "data", ["ape", "bee", "cat"])
    steps = overrides(train__duration="2 steps")
    launch(1, "--config", str(write_config(tmp_path, shards)), *LABELLED, *steps)
    asked = (*SMALL[:-2], "--classes", "balanced", "--subset-size", "4", "--subsets", "2", "--per-class")
    found = []
    for processes in (1, 2):
        out = tmp_path / f"out-{processes}"
        said = evaluate(tmp_path / "run", "kid", *asked, "--out", str(out), processes=processes)
        assert "classes balanced" in said
        assert "kernel distance of 3 classes by themselves from " in said
        assert "(subsets 2, subset size 4)" in said
        found.append(report(out, "kid"))
    one, two = (found["kernel_distance_by_class"] for found in found)
    assert list(one) == ["0", "1", "2"]
    assert len(set(one.values())) == 3
    assert two == pytest.approx(one, rel=1e-6)


def test_a_reference_may_be_statistics_images_or_other_shards(run: Path, whole: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", arr_0=rng.integers(0, 256, (14, 8, 8, 3), dtype=np.uint8), mu=0, sigma=0)
    found = judge(run, "fid", whole.parent / "images", "--reference", str(tmp_path / "images.npz"))
    assert found["reference"]["number"] == 12
    assert found["frechet_distance"] != report(whole, "fid")["frechet_distance"]


def test_unchecked_weights_are_taken_when_told_and_have_no_known_name(run: Path, tmp_path: Path) -> None:
    weights, out = write_random_inception(tmp_path / "weights.pth"), tmp_path / "out"
    taken = ("--features", "inception", "--feature-weights", str(weights), "--feature-weights-unchecked")
    evaluate(run, "is", *SMALL[2:-2], *taken, "--samples", "4", "--splits", "2", "--out", str(out))
    found = report(out, "is")
    assert found["metric"] == "the Inception score's formula on Inception with unchecked weights classes"
    assert 1 <= found["score"] < 2
    assert not found["features"]["checked"]


def test_statistics_of_others_are_taken_for_inception_alone(run: Path, tmp_path: Path) -> None:
    """Such as pytorch-fid and ADM have them; ADM's file holds images, too."""
    path, config = tmp_path / "reference.npz", load_config(run / "config.toml")
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(path, mu=np.arange(6.0), sigma=np.diag(np.arange(6.0)), mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=images)
    asked = ReferenceRequest(path=path, held_out=False, images=None)
    statistics = open_reference(asked, config, most=None, statistics=MOMENTS)
    assert isinstance(statistics, ReferenceStatistics)
    assert statistics.distribution.mean.tolist() == [0, 1, 2, 3, 4, 5]
    assert statistics.distribution.covariance.diagonal().tolist() == [0, 1, 2, 3, 4, 5]
    others = open_reference(asked, config, most=3, statistics=None)
    assert isinstance(others, ReferenceImages)
    assert others.count == 3
    assert others.pixels(range(2)).shape == (2, 3, 8, 8)
    np.savez(path, mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
    with pytest.raises(DataError, match="mu or sigma holds a value that is not finite"):
        open_reference(asked, config, most=None, statistics=MOMENTS)
    np.savez(path, mu=np.zeros(6), sigma=np.eye(5))
    with pytest.raises(DataError, match=r"mu should be \(D,\) and sigma \(D, D\); they are \(6,\) and \(5, 5\)"):
        open_reference(asked, config, most=None, statistics=MOMENTS)


def test_bad_requests_are_one_line(run: Path, tmp_path: Path, dataset: Path) -> None:
    np.savez(tmp_path / "mu.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "side.npz", arr_0=np.zeros((4, 9, 9, 3), np.uint8))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "weights.pth").write_bytes(b"other weights")
    for metric, arguments, message in (
        ("fid", ["--reference", str(tmp_path / "mu.npz")], "mu.npz: should hold images as arr_0"),
        ("kid", ["--reference", str(tmp_path / "side.npz")], "arr_0 should be (N, 8, 8, 3) uint8, as the run's images"),
        ("fid", ["--reference", str(tmp_path / "text.npz")], "text.npz: no .npz that can be read"),
        ("fid", ["--reference", str(dataset), "--held-out"], "--held-out: goes with the run's own images"),
        ("fid", ["--images", "22"], "--images 22: there are 21 in"),
        ("kid", ["--subset-size", "13"], "--subset-size 13: should be from 2 to 12"),
        ("kid", ["--per-class"], "--per-class: goes with a network that takes labels; this one takes none"),
        ("sfid", [], "efficientnet-lite0: gives features, logits, sfid needs spatial; take inception"),
        ("fid", ["--feature-weights", "f.pth"], "--feature-weights: goes with --features inception"),
        ("fid", ["--features", "inception", "--feature-weights", str(tmp_path / "weights.pth")], "its sha256 is"),
    ):
        output = evaluate(run, metric, *SMALL, "--out", str(tmp_path / "out"), *arguments, expect=2)
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert message in line
        assert "Traceback" not in output
