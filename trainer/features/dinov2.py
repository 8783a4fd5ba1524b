"""DINOv2's ViT-L/14 (Oquab et al. 2023), as EDM2 measures the Fréchet distance by (Karras et al. 2024).

torch-fidelity has this network, but fetches and runs the newest code of its authors each time and takes no file of
weights; so it is written here, with the names of their parameters.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.features.networks import Convention, FeatureKind, freeze, standardized
from trainer.features.published import PublishedWeights, read_tensors, weights_of

PUBLISHED = PublishedWeights(
    network="DINOv2 ViT-L/14",
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    file="dinov2_vitl14_pretrain.pth",
    sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)
_SIDE = 224
_PATCH = 14
_HEAD = 64  # channels of an attention head
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)


class DinoV2:
    """The class token of the last layer, normalised: (B, 1024)."""

    kinds: tuple[FeatureKind, ...] = ("features",)

    def __init__(self, weights: Path, device: torch.device, *, unchecked: bool = False) -> None:
        """`weights`: a file; another one than the published is refused, unless `unchecked`.

        Raises ConfigError where it is refused or no weights of this network.
        """
        digest = PUBLISHED.check(weights, unchecked=unchecked)
        with weights_of("DINOv2", weights):
            tensors = {name: tensor.float() for name, tensor in read_tensors(weights).items()}
            self.network = VisionTransformer.like(tensors)
            self.network.load_state_dict(tensors, assign=True)
        freeze(self.network, device)
        self.convention = Convention(
            features="dinov2",
            network=PUBLISHED.name(digest),
            dimensions=self.network.cls_token.shape[-1],
            resize=f"bicubic with antialiasing to {_SIDE} x {_SIDE}",
            weights_sha256=digest,
            checked=digest == PUBLISHED.sha256,
        )

    def __call__(self, images: Tensor) -> dict[FeatureKind, Tensor]:
        """See `FeatureNetwork`."""
        return {"features": self.network(standardized(images, _SIDE, mean=_MEAN, deviation=_DEVIATION))}

    @staticmethod
    def published() -> PublishedWeights:
        """The authors' file."""
        return PUBLISHED


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) of `depth` blocks with LayerScale; images are `grid` patches wide
    where its positions need no interpolation.
    """

    def __init__(self, *, width: int, depth: int, grid: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2 + 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of training; the published file has it
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, _PATCH, stride=_PATCH)})
        self.blocks = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @classmethod
    def like(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Of the size of these tensors, without memory for its own: they are to be assigned. LookupError where they are
        none of such a network.
        """
        positions, width = tensors["pos_embed"].shape[-2:]
        depth = sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in tensors)
        with torch.device("meta"):
            return cls(width=width, depth=depth, grid=math.isqrt(positions - 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, S, S), S a multiple of 14. Returns the class token, (B, width)."""
        patches = rearrange(self.patch_embed["proj"](x), "b c h w -> b (h w) c")
        h = torch.cat((self.cls_token.expand(len(x), -1, -1), patches), dim=1)
        h = h + self._positions(x.shape[-1] // _PATCH)
        for block in self.blocks:
            h = block(h)
        token: Tensor = self.norm(h)[:, 0]
        return token

    def _positions(self, side: int) -> Tensor:
        """The embedding of the positions of side x side patches, (1, 1 + side^2, width). The 0.1 of their interpolation
        is the authors', and without it the features are others.
        """
        grid = math.isqrt(self.pos_embed.shape[1] - 1)
        if side == grid:
            return self.pos_embed
        of_class, of_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = rearrange(of_patches, "1 (h w) c -> 1 c h w", h=grid)
        resized = F.interpolate(square, scale_factor=(side + 0.1) / grid, mode="bicubic")
        return torch.cat((of_class, rearrange(resized, "1 c h w -> 1 (h w) c")), dim=1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, h: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        qkv = self.attn["qkv"](self.norm1(h))
        q, k, v = rearrange(qkv, "b n (three heads c) -> three b heads n c", three=3, c=_HEAD)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)")
        h = h + self.ls1["gamma"] * self.attn["proj"](mixed)
        return h + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(h))))
