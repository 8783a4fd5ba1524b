"""What can be converted: networks and processes that other programs have too."""

from trainer.config import Config, DDPMConfig, DDPMUNetConfig
from trainer.diffusion.ddpm.reverse import ReverseVariance, output_channels
from trainer.errors import ConversionError
from trainer.models.ddpm_unet import UNetConfig, unet_config


def ddpm_sections(config: Config) -> tuple[DDPMUNetConfig, DDPMConfig]:
    """The sections [model] and [diffusion] of a DDPM. Raises ConversionError for other kinds."""
    model, diffusion = config.model, config.diffusion
    if not isinstance(model, DDPMUNetConfig):
        raise ConversionError(f'model.kind = "{model.kind}": cannot be converted; "ddpm-unet" can')
    if not isinstance(diffusion, DDPMConfig):
        raise ConversionError(f'diffusion.kind = "{diffusion.kind}": cannot be converted; "ddpm" can')
    return model, diffusion


def network_of(model: DDPMUNetConfig, variance: ReverseVariance) -> UNetConfig:
    """The shape of the network. Raises ConfigError where no such network exists."""
    return unet_config(model, output_channels(model.channels, variance))
