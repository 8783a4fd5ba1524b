"""What can be converted: networks and processes that other programs have too."""

import torch

from trainer.config import Config, DDPMConfig, DDPMUNetConfig
from trainer.config.families import ReverseVariance
from trainer.diffusion.ddpm.reverse import output_channels
from trainer.errors import ConversionError
from trainer.models.ddpm_unet import UNet


def ddpm_sections(config: Config) -> tuple[DDPMUNetConfig, DDPMConfig]:
    """The sections [model] and [diffusion] of a DDPM. Raises ConversionError for other kinds."""
    model, diffusion = config.model, config.diffusion
    if not isinstance(model, DDPMUNetConfig):
        raise ConversionError(f'model.kind = "{model.kind}": cannot be converted; "ddpm-unet" can')
    if not isinstance(diffusion, DDPMConfig):
        raise ConversionError(f'diffusion.kind = "{diffusion.kind}": cannot be converted; "ddpm" can')
    return model, diffusion


def network_of(model: DDPMUNetConfig, variance: ReverseVariance) -> UNet:
    """The network on the device "meta": names and shapes without data."""
    with torch.device("meta"):
        return UNet(model, output_channels(model.channels, variance))
