"""Features and references as papers have them: sFID's, DINOv2's and CLIP's, and ADM's file; each by its definition."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn import functional as F

from tests.harness import load_config, write_config
from tests.inception import write_random_inception
from trainer.drawing.work import Work
from trainer.errors import ConfigError, DataError
from trainer.evaluation.feature_metrics import FrechetMetric, GaussianKernelMetric, ManifoldMetric, SpatialFrechetMetric
from trainer.evaluation.feature_sets import FeatureSet
from trainer.evaluation.per_class import distances_by_class
from trainer.evaluation.references import ReferenceImages, ReferenceRequest, ReferenceStatistics, open_reference
from trainer.features.clip import Clip
from trainer.features.dinov2 import DinoV2, VisionTransformer
from trainer.features.fidelity import fidelity_module
from trainer.features.inception import Inception
from trainer.features.networks import extract, standardized
from trainer.sampling.request import batches_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_spatial_features_are_the_first_maps_of_mixed_6(tmp_path: Path, images: torch.Tensor) -> None:
    """TensorFlow's mixed_6 is the third block of 17 x 17; its order is height, width, map."""
    network = Inception(write_random_inception(tmp_path / "weights.pth"), CPU, unchecked=True)
    found = extract(network, images)["spatial"]
    inner = network.network
    x = fidelity_module("feature_extractor_inceptionv3").interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    x = (x - 128) / 128
    blocks = (
        "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 "
        "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c"
    )
    for name in blocks.split():
        x = getattr(inner, name)(x)
    maps = F.relu(inner.Mixed_6d.branch1x1.bn(inner.Mixed_6d.branch1x1.conv(x)))
    assert (found.shape, maps.shape) == ((3, 2023), (3, 192, 17, 17))
    assert found.max() > 0
    for h, w, c in ((0, 0, 0), (3, 11, 6), (16, 2, 4)):
        assert torch.allclose(found[:, (h * 17 + w) * 7 + c], maps[:, c, h, w], atol=1e-5)


def random_dinov2(path: Path, *, width: int = 128, depth: int = 2, grid: int = 37) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    network = VisionTransformer(width=width, depth=depth, grid=grid)
    tensors = {name: torch.randn(t.shape, generator=generator) / 8 for name, t in network.state_dict().items()}
    torch.save(tensors, path)
    return tensors


def dinov2_by_definition(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> np.ndarray:
    """Dosovitskiy et al. 2021 with LayerScale (Touvron et al. 2021), in float64."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def norm(h: np.ndarray, name: str) -> np.ndarray:
        centred = h - h.mean(-1, keepdims=True)
        return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(h: np.ndarray, name: str) -> np.ndarray:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attention(h: np.ndarray, block: str) -> np.ndarray:
        width = h.shape[-1]
        query, key, value = np.split(linear(h, f"{block}.attn.qkv"), 3, axis=-1)
        heads = []
        for first in range(0, width, 64):
            q, k, v = (part[..., first : first + 64] for part in (query, key, value))
            weights = np.exp(q @ k.swapaxes(-1, -2) / 8)
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        return linear(np.concatenate(heads, axis=-1), f"{block}.attn.proj")

    def gelu(h: np.ndarray) -> np.ndarray:
        return h * (1 + torch.erf(torch.from_numpy(h) / 2**0.5).numpy()) / 2

    kernel = w["patch_embed.proj.weight"]
    patches = x.double().numpy().reshape(len(x), 3, 16, 14, 16, 14).transpose(0, 2, 4, 1, 3, 5).reshape(len(x), 256, -1)
    embedded = patches @ kernel.reshape(len(kernel), -1).T + w["patch_embed.proj.bias"]
    h = np.concatenate([np.broadcast_to(w["cls_token"], (len(x), 1, len(kernel))), embedded], axis=1) + w["pos_embed"]
    for number in range(2):
        block = f"blocks.{number}"
        h = h + w[f"{block}.ls1.gamma"] * attention(norm(h, f"{block}.norm1"), block)
        inner = gelu(linear(norm(h, f"{block}.norm2"), f"{block}.mlp.fc1"))
        h = h + w[f"{block}.ls2.gamma"] * linear(inner, f"{block}.mlp.fc2")
    return norm(h, "norm")[:, 0]


def test_dinov2_is_its_definition(tmp_path: Path, images: torch.Tensor) -> None:
    """Positions of 16 x 16 patches need no interpolation; its class token is what is compared."""
    tensors = random_dinov2(tmp_path / "weights.pth", grid=16)
    network = DinoV2(tmp_path / "weights.pth", CPU, unchecked=True)
    found = extract(network, images)["features"]
    x = standardized(images, 224, mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225))
    assert np.abs(found.double().numpy() - dinov2_by_definition(tensors, x)).max() < 1e-4
    assert found.std() > 0.1
    assert network.convention.network == "DINOv2 ViT-L/14 with unchecked weights"
    assert network.convention.dimensions == found.shape[1] == 128


def test_dinov2_is_of_the_published_size_and_interpolates_positions_as_its_authors() -> None:
    with torch.device("meta"):
        published = VisionTransformer(width=1024, depth=24, grid=37)
    tensors = published.state_dict()
    assert (len(tensors), sum(tensor.numel() for tensor in tensors.values())) == (343, 304_368_640)
    small = VisionTransformer(width=64, depth=1, grid=37)
    torch.nn.init.normal_(small.pos_embed)
    found = small._positions(16)
    square = small.pos_embed[:, 1:].reshape(1, 37, 37, 64).permute(0, 3, 1, 2)
    theirs = F.interpolate(square, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    assert found.shape == (1, 257, 64)
    assert torch.equal(found[0, 1 + 16 * 3 + 5], theirs[0, :, 3, 5])
    assert torch.equal(found[0, 0], small.pos_embed[0, 0])


def test_images_are_resized_as_pillow_does_and_standardised(images: torch.Tensor) -> None:
    """By cubics with antialiasing, as EDM2 and CMMD's authors; Pillow rounds to whole values, and clips them, twice."""
    images = images // 2 + 64
    for side in (56, 14):
        found = standardized(images, side, mean=(0.5, 0.4, 0.3), deviation=(0.2, 0.25, 0.5))
        theirs = [
            np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC))
            for image in images
        ]
        expected = torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2).float()
        mean, deviation = (torch.tensor(values)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))
        unscaled = ((found * deviation + mean) * 255).clamp(0, 255)
        assert (unscaled - expected).abs().max() < 2


def random_clip(width: int = 64, side: int = 28, dimensions: int = 24) -> torch.nn.Module:
    """An image network of CLIP, with what its file has beside it."""
    module = fidelity_module("feature_extractor_clip")
    torch.manual_seed(0)
    network = module.CLIPVisual(dimensions, side, 2, width, 14)
    network.text_projection = torch.nn.Parameter(torch.zeros(8, dimensions))
    return network


def test_clip_is_torch_fidelitys_network_on_images_as_cmmd_resizes_them(tmp_path: Path, images: torch.Tensor) -> None:
    made = random_clip()
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    network = Clip(tmp_path / "weights.pt", CPU, unchecked=True)
    found = extract(network, images)["features"]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    x = standardized(images, 28, mean=mean, deviation=deviation)
    with torch.no_grad():
        assert torch.allclose(found, made.visual(x), atol=0.01)  # its weights are kept in half precision
    assert found.std() > 0.1
    convention = network.convention
    assert (convention.dimensions, convention.resize) == (24, "bicubic with antialiasing to 28 x 28")
    assert not convention.is_clip
    assert GaussianKernelMetric().title(convention).startswith("Gaussian kernel distance on CLIP ViT-L/14 336px with")
    assert GaussianKernelMetric().title(replace(convention, checked=True)) == "CMMD"


def test_clips_script_is_read_of_the_published_file_alone(
    tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's file is TorchScript, a program; another one is refused."""

    class Script(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made = random_clip()
            self.visual, self.text_projection = made.visual, made.text_projection

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.visual(x)

    path = tmp_path / "weights.pt"
    torch.jit.save(torch.jit.trace(Script(), torch.zeros(1, 3, 28, 28)), path)
    with pytest.raises(ConfigError, match=r"its sha256 is .*, the published CLIP ViT-L/14 336px weights have 3035c92b"):
        Clip(path, CPU)
    with pytest.raises(ConfigError, match=r"weights.pt: no weights of CLIP"):
        Clip(path, CPU, unchecked=True)
    digest = Clip.published().check(path, unchecked=True)
    as_published = replace(Clip.published(), sha256=digest)
    monkeypatch.setattr(Clip, "published", staticmethod(lambda: as_published))
    network = Clip(path, CPU)
    assert network.convention.is_clip
    assert extract(network, images)["features"].shape == (3, 24)


@pytest.mark.parametrize(("network", "name"), [(DinoV2, "DINOv2"), (Clip, "CLIP")])
def test_files_that_are_no_weights_are_one_line(tmp_path: Path, network: type[DinoV2 | Clip], name: str) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for file in ("other.pth", "text.pth"):
        with pytest.raises(ConfigError, match=f"{file}: no weights of {name} "):
            network(tmp_path / file, CPU, unchecked=True)
        with pytest.raises(ConfigError, match=f"{file}: its sha256 is "):
            network(tmp_path / file, CPU)
    with pytest.raises(ConfigError, match=r"none.pth: cannot be read \(No such file"):
        network(tmp_path / "none.pth", CPU)


def feature_set(folder: Path, values: torch.Tensor, kind: str = "features") -> FeatureSet:
    work = Work(folder, {"name": folder.name}, Accelerator(cpu=True))
    made = FeatureSet(name=folder.name, work=work, batches=batches_of(len(values), 16))
    for numbers in made.batches:
        work.save(numbers, {kind: values[numbers.start : numbers.stop].numpy()})
    return made


def test_cmmd_is_its_definition_and_0_for_equal_sets(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 12, generator=generator), torch.randn(50, 12, generator=generator) + 0.4
    one, other = feature_set(tmp_path / "x", x), feature_set(tmp_path / "y", y)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a[:, None] - b) ** 2).sum(-1) / (2 * 10**2)).mean())

    p, q = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (x, y))
    expected = 1000 * (kernel(p, p) + kernel(q, q) - 2 * kernel(p, q))
    (found,) = GaussianKernelMetric().measure(one, other).values()
    assert found == pytest.approx(expected, rel=1e-9)
    assert found > 0.1
    assert GaussianKernelMetric().measure(one, one)["gaussian_kernel_distance"] == pytest.approx(0, abs=1e-9)


def test_each_class_is_compared_by_itself(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 6, generator=generator), torch.randn(30, 6, generator=generator)
    drawn, real = np.arange(20) % 4, np.arange(30) % 3
    drawn[drawn == 3] = 9  # a class that no image has
    drawn[drawn == 2] = [2, 9, 9, 9, 9]  # one sample of class 2
    y[real == 1] += 3
    found = distances_by_class(feature_set(tmp_path / "x", x), feature_set(tmp_path / "y", y), drawn=drawn, real=real)
    assert list(found) == [0, 1]
    for label, value in found.items():
        a, b = x[drawn == label].double().numpy(), y[real == label].double().numpy()
        within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in ((v @ v.T / 6 + 1) ** 3 for v in (a, b))]
        assert value == pytest.approx(sum(within) - 2 * ((a @ b.T / 6 + 1) ** 3).mean(), rel=1e-9)
    assert found[1] > 10 * abs(found[0])
    with pytest.raises(DataError, match="--per-class: no class has two samples and two images"):
        distances_by_class(feature_set(tmp_path / "u", x), feature_set(tmp_path / "v", y), drawn=drawn + 100, real=real)


@pytest.fixture
def adm(tmp_path: Path) -> SimpleNamespace:
    """A file with the arrays of ADM's, in small: 12 images of which the moments are not."""
    rng = np.random.default_rng(0)
    pooled, spatial = rng.normal(size=(60, 6)), rng.normal(size=(60, 5)) + 1
    arrays = {
        "arr_0": rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8),
        "mu": pooled.mean(0),
        "sigma": np.cov(pooled, rowvar=False),
        "mu_s": spatial.mean(0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }
    path = tmp_path / "VIRTUAL_small.npz"
    np.savez(path, **arrays)
    return SimpleNamespace(path=path, arrays=arrays, config=load_config(write_config(tmp_path, tmp_path)))


def open_adm(adm: SimpleNamespace, needs: object, **further: bool) -> ReferenceImages | ReferenceStatistics:
    request = ReferenceRequest(path=adm.path, held_out=False, images=None)
    return open_reference(request, adm.config, most=needs.most, statistics=needs.statistics, **further)


def test_adms_file_gives_each_metric_what_it_is_made_for(adm: SimpleNamespace, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for metric, mean, covariance, kind in (
        (FrechetMetric(), "mu", "sigma", "features"),
        (SpatialFrechetMetric(), "mu_s", "sigma_s", "spatial"),
    ):
        opened = open_adm(adm, metric.needs)
        assert isinstance(opened, ReferenceStatistics)
        assert opened.distribution.mean.tolist() == adm.arrays[mean].tolist()
        assert opened.distribution.covariance.tolist() == adm.arrays[covariance].tolist()
        values = torch.from_numpy(rng.normal(size=(40, len(adm.arrays[mean]))))
        found = metric.measure(feature_set(tmp_path / kind, values, kind), opened)["frechet_distance"]
        s, t = np.cov(values.numpy(), rowvar=False), adm.arrays[covariance]
        root = np.sqrt(np.linalg.eigvals(s @ t).real.clip(0)).sum()
        gap = values.numpy().mean(0) - adm.arrays[mean]
        assert found == pytest.approx(gap @ gap + np.trace(s) + np.trace(t) - 2 * root, abs=1e-9)
        assert (tmp_path / kind / ("moments-n-40.npz" if kind == "features" else "moments-spatial-n-40.npz")).exists()
    images = open_adm(adm, ManifoldMetric().needs)
    assert isinstance(images, ReferenceImages)
    assert (images.count, images.labels) == (12, None)
    seen = images.pixels(range(12)).permute(0, 2, 3, 1).numpy()
    assert sorted(map(bytes, seen)) == sorted(map(bytes, adm.arrays["arr_0"]))


def test_classes_of_a_file_of_samples_go_with_its_images(adm: SimpleNamespace) -> None:
    classes = adm.arrays["arr_0"][:, 0, 0, 0].astype(np.int64)  # the first pixel of each image is its class
    np.savez(adm.path, arr_0=adm.arrays["arr_0"], arr_1=classes)
    opened = open_adm(adm, ManifoldMetric().needs, labelled=True)
    assert isinstance(opened, ReferenceImages)
    assert opened.labels is not None
    assert opened.labels(range(3, 9)) == opened.pixels(range(3, 9))[:, 0, 0, 0].tolist()


def damaged(content: bytes) -> bytes:
    """With the bytes of its arrays changed, so that they cannot be inflated."""
    return content[:60] + bytes(60) + content[120:]


def test_files_that_are_not_adms_are_one_line(adm: SimpleNamespace) -> None:
    arrays, spatial = adm.arrays, SpatialFrechetMetric().needs
    for changed, needs, message in (
        ({"mu_s": np.zeros((1, 5))}, spatial, r"mu_s should be \(D,\) and sigma_s \(D, D\); they are \(1, 5\) and"),
        ({"sigma_s": np.full((5, 5), np.inf)}, spatial, "mu_s or sigma_s holds a value that is not finite"),
        ({"mu_s": np.array(list("abcde"))}, spatial, "mu_s and sigma_s should be floats; they are <U1"),
        ({"mu_s": np.array([None] * 5)}, spatial, "no .npz that can be read"),  # a pickle
        ({"arr_0": np.zeros((4, 9, 9, 3), np.uint8)}, ManifoldMetric().needs, r"arr_0 should be \(N, 8, 8, 3\) uint8"),
    ):
        np.savez(adm.path, **(arrays | changed))
        with pytest.raises(DataError, match=message):
            open_adm(adm, needs)
    np.savez(adm.path, mu=arrays["mu"], sigma=arrays["sigma"])
    with pytest.raises(DataError, match="should hold mu_s and sigma_s, or images as arr_0; holds mu, sigma"):
        open_adm(adm, spatial)
    np.savez(adm.path, arr_0=arrays["arr_0"])
    with pytest.raises(DataError, match="should hold images as arr_0 and their classes as arr_1; holds arr_0"):
        open_adm(adm, ManifoldMetric().needs, labelled=True)
    np.savez(adm.path, arr_0=arrays["arr_0"], arr_1=np.zeros(3))
    with pytest.raises(DataError, match=r"arr_1 should be \(12,\) integers; it is \(3,\) float64"):
        open_adm(adm, ManifoldMetric().needs, labelled=True)
    packed = io.BytesIO()
    np.savez_compressed(packed, arr_0=arrays["arr_0"])
    adm.path.write_bytes(damaged(packed.getvalue()))
    with pytest.raises(DataError, match=r"no \.npz that can be read"):
        open_adm(adm, ManifoldMetric().needs)
