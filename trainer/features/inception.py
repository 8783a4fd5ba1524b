"""The Inception network of FID (Heusel et al. 2017): torch-fidelity's, which is TensorFlow's to the last digits."""

import hashlib
import importlib
import importlib.util
import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from trainer.errors import ConfigError
from trainer.features.networks import Convention, freeze

# As published: the same file as pytorch-fid's pt_inception-2015-12-05-6726825d.pth; the names hold its beginning.
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_PACKAGE = "torch_fidelity"


class Inception:
    """InceptionV3 as of 2015-12-05: `2048` features after the last pooling; logits without the bias, as in
    Salimans et al.'s Inception score.
    """

    def __init__(self, weights: Path, device: torch.device, *, unchecked: bool = False) -> None:
        """`weights`: a file; another one than the published is refused, unless `unchecked`.

        Raises ConfigError where it is refused or no weights of this network, or torch-fidelity is missing.
        """
        content = _read(weights)
        digest = hashlib.sha256(content).hexdigest()
        if digest != WEIGHTS_SHA256 and not unchecked:
            raise ConfigError(
                f"{weights}: its sha256 is {digest}, the published Inception weights have {WEIGHTS_SHA256}; numbers by "
                "others compare with nothing: --feature-weights-unchecked takes them all the same"
            )
        self.network = _build(weights, content)
        freeze(self.network, device)
        self.convention = Convention(
            features="inception",
            network="Inception" if digest == WEIGHTS_SHA256 else "Inception with unchecked weights",
            dimensions=2048,
            resize="bilinear as in TensorFlow 1 (torch-fidelity) to 299 x 299",
            weights_sha256=digest,
            checked=digest == WEIGHTS_SHA256,
        )

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FeatureNetwork`."""
        features, logits = self.network(images)
        return features, logits


def weights_path() -> Path:
    """Where the published weights lie once they have been downloaded: PyTorch Hub's folder."""
    return Path(torch.hub.get_dir()) / "checkpoints" / _module().URL_INCEPTION_V3.rpartition("/")[2]


def download_weights() -> None:
    """Fetch the published weights from where torch-fidelity has them, if they are not there yet.

    Raises ConfigError that names another way where that fails.
    """
    path, url = weights_path(), _module().URL_INCEPTION_V3
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        progress = sys.stderr.isatty()
        torch.hub.download_url_to_file(url, str(path), hash_prefix=WEIGHTS_SHA256, progress=progress)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{url}: cannot be downloaded ({error}); bring it to this machine and name it with --feature-weights, or "
            "take --features efficientnet-lite0, which needs no download"
        ) from error


def _read(weights: Path) -> bytes:
    try:
        return weights.read_bytes()
    except OSError as error:
        raise ConfigError(f"--feature-weights {weights}: cannot be read ({error.strerror})") from error


def _build(weights: Path, content: bytes) -> Any:
    """The extractor unpickles whatever file it is given, so it is given one that was just written from tensors."""
    module = _module()
    try:
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        safe = io.BytesIO()
        torch.save(tensors, safe)
        safe.seek(0)
        return module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        )
    except (RuntimeError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--feature-weights {weights}: no weights of torch-fidelity's Inception ({reason})"
        ) from error


def _module() -> ModuleType:
    """torch_fidelity's one module of Inception. The package as a whole would import torchvision, which not every
    machine has, and every other network.
    """
    name = f"{_PACKAGE}.feature_extractor_inceptionv3"
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError(
            "features of inception: need torch-fidelity; pip install --no-deps torch-fidelity (its torchvision is not "
            "needed), or take --features efficientnet-lite0"
        )
    with _bare_package(list(spec.submodule_search_locations)):
        return importlib.import_module(name)


@contextmanager
def _bare_package(folders: list[str]) -> Iterator[None]:
    """The package's name stands for its folder alone; afterwards for what it did before."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == _PACKAGE}
    for name in before:
        del sys.modules[name]
    package = ModuleType(_PACKAGE)
    package.__path__ = folders
    sys.modules[_PACKAGE] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
            del sys.modules[name]
        sys.modules.update(before)
