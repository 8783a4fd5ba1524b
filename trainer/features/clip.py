"""CLIP's network of images (Radford et al. 2021), torch-fidelity's, as CMMD takes it (Jayasumana et al. 2024)."""

import warnings
from pathlib import Path
from typing import Any

import torch

from trainer.features.fidelity import fidelity_module
from trainer.features.networks import Convention, FeatureKind, freeze, standardized
from trainer.features.published import PublishedWeights, read_tensors, weights_of

_MODULE = "feature_extractor_clip"
_NAME = "clip-vit-l-14-336px"
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """ViT-L/14 at 336 x 336: embeddings of images as they are compared with those of texts, before they are scaled to
    unit length: (B, 768).

    Of torch-fidelity it takes the network alone: its extractor resizes as TensorFlow's Inception does, and CMMD by
    cubics with antialiasing.
    """

    kinds: tuple[FeatureKind, ...] = ("features",)

    def __init__(self, weights: Path, device: torch.device, *, unchecked: bool = False) -> None:
        """`weights`: the published file, which is TorchScript, or, `unchecked`, one of tensors with the same names.

        Raises ConfigError where it is refused or no weights of this network, or torch-fidelity is missing.
        """
        published = self.published()
        digest = published.check(weights, unchecked=unchecked)
        checked = digest == published.sha256
        with weights_of("CLIP", weights):
            tensors = _read_script(weights) if checked else read_tensors(weights)
            self.network = fidelity_module(_MODULE).build_model(tensors, torch.float32).visual
        freeze(self.network, device)
        self._side: int = self.network.input_resolution
        self.convention = Convention(
            features="clip",
            network=published.name(digest),
            dimensions=self.network.output_dim,
            resize=f"bicubic with antialiasing to {self._side} x {self._side}",
            weights_sha256=digest,
            checked=checked,
        )

    def __call__(self, images: torch.Tensor) -> dict[FeatureKind, torch.Tensor]:
        """See `FeatureNetwork`."""
        return {"features": self.network(standardized(images, self._side, mean=_MEAN, deviation=_DEVIATION))}

    @staticmethod
    def published() -> PublishedWeights:
        """OpenAI's file, under the name that torch-fidelity gives it."""
        module = fidelity_module(_MODULE)
        sha256 = module.MODEL_METADATA[_NAME]["hash"]
        return PublishedWeights(
            network="CLIP ViT-L/14 336px", url=module.MODEL_URLS[_NAME], file=f"{_NAME}-{sha256}.pt", sha256=sha256
        )


def _read_script(weights: Path) -> dict[str, Any]:
    """The tensors of a TorchScript archive, which is a program: of the published file alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch's, of TorchScript
        tensors: dict[str, Any] = torch.jit.load(weights, map_location="cpu").state_dict()
    return tensors
