"""The Inception network of FID (Heusel et al. 2017): torch-fidelity's, which is TensorFlow's to the last digits."""

import io
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from trainer.features.fidelity import fidelity_module
from trainer.features.networks import Convention, FeatureKind, freeze
from trainer.features.published import PublishedWeights, read_tensors, weights_of

_MODULE = "feature_extractor_inceptionv3"
_SPATIAL_MAPS = 7  # of mixed_6/conv's 192, so that 17 x 17 x 7 = 2023 are about as many as the 2048 of FID


class Inception:
    """InceptionV3 as of 2015-12-05: features after the last pooling, (B, 2048); logits without the bias, (B, 1008), as
    in Salimans et al.'s Inception score; the spatial features of sFID (Nash et al. 2021) as ADM takes them, the first
    seven maps of TensorFlow's mixed_6/conv, in its order of height, width and map: (B, 2023).
    """

    kinds: tuple[FeatureKind, ...] = ("features", "logits", "spatial")

    def __init__(self, weights: Path, device: torch.device, *, unchecked: bool = False) -> None:
        """`weights`: a file; another one than the published is refused, unless `unchecked`.

        Raises ConfigError where it is refused or no weights of this network, or torch-fidelity is missing.
        """
        published = self.published()
        digest = published.check(weights, unchecked=unchecked)
        with weights_of("torch-fidelity's Inception", weights):
            self.network = _build(weights)
        freeze(self.network, device)
        self.convention = Convention(
            features="inception",
            network=published.name(digest),
            dimensions=2048,
            resize="bilinear as in TensorFlow 1 (torch-fidelity) to 299 x 299",
            weights_sha256=digest,
            checked=digest == published.sha256,
        )

    def __call__(self, images: torch.Tensor) -> dict[FeatureKind, torch.Tensor]:
        """See `FeatureNetwork`."""
        maps: list[torch.Tensor] = []
        with self.network.Mixed_6d.branch1x1.register_forward_hook(lambda _network, _x, y: maps.append(y)):
            features, logits = self.network(images)
        spatial = rearrange(maps[0][:, :_SPATIAL_MAPS], "n c h w -> n (h w c)")
        return {"features": features, "logits": logits, "spatial": spatial}

    @staticmethod
    def published() -> PublishedWeights:
        """The file that pytorch-fid has as pt_inception-2015-12-05-6726825d.pth."""
        url = fidelity_module(_MODULE).URL_INCEPTION_V3
        return PublishedWeights(
            network="Inception",
            url=url,
            file=url.rpartition("/")[2],
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        )


def _build(weights: Path) -> Any:
    """The extractor unpickles whatever file it is given, so it is given one that was just written from tensors."""
    safe = io.BytesIO()
    torch.save(read_tensors(weights), safe)
    safe.seek(0)
    return fidelity_module(_MODULE).FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
    )
