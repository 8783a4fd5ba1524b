"""Small networks of ADM, and weights for them that leave no layer without effect."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trainer.config import ADMClassifierConfig, ADMUNetConfig
from trainer.interop.openai import to_openai
from trainer.models.adm_classifier import ADMClassifier
from trainer.models.adm_unet import ADMUNet

# The network of the golden outputs: computed by guided-diffusion, for weights and inputs by NumPy's random numbers.
GOLDEN = {
    "image_size": 32,
    "base_channels": 32,
    "channel_multipliers": [1, 2],
    "blocks_per_level": 1,
    "attention_resolutions": [16],
    "head_channels": 16,
}
CONDITIONAL = GOLDEN | {"classes": 10}
OUT_CHANNELS = 6


def unet(**fields: object) -> ADMUNet:
    return ADMUNet(ADMUNetConfig.model_validate(fields), OUT_CHANNELS)


def classifier(pool: str, **fields: object) -> ADMClassifier:
    return ADMClassifier(ADMClassifierConfig.model_validate(CONDITIONAL | fields | {"pool": pool}))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def golden_weights(network: ADMUNet | ADMClassifier) -> dict[str, Tensor]:
    """In OpenAI's names and shapes: no layer is left at 0, outputs are of order one."""
    random = np.random.RandomState(0)
    weights = {}
    for name, tensor in sorted(to_openai(network.state_dict(), network).items()):
        value = random.standard_normal(tuple(tensor.shape))
        if tensor.ndim >= 2:
            value = value / np.sqrt(tensor.numel() / tensor.shape[0])
        else:
            value = 1 + 0.1 * value if name.endswith(".weight") else 0.1 * value
        weights[name] = torch.from_numpy(value).float()
    return weights


NETWORKS: dict[str, Callable[[], ADMUNet | ADMClassifier]] = {
    "unet": lambda: unet(**CONDITIONAL),
    "convolutions": lambda: unet(**GOLDEN, resblock_updown=False),
    "null class": lambda: unet(**CONDITIONAL, label_drop=0.1),
    "upsampler": lambda: unet(**CONDITIONAL, low_res_size=8),
    "attention": lambda: classifier("attention"),
    "adaptive": lambda: classifier("adaptive"),
    "spatial": lambda: classifier("spatial", resblock_updown=False),
}
