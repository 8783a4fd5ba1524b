"""What can be converted: networks and processes that other programs have too."""

import torch

from trainer.config import ADMClassifierConfig, ADMUNetConfig, Config, DDPMConfig, DDPMUNetConfig
from trainer.config.families import ReverseVariance
from trainer.diffusion.ddpm.reverse import output_channels
from trainer.engine.network.build import build_network
from trainer.errors import ConversionError
from trainer.models.adm_classifier import ADMClassifier
from trainer.models.adm_unet import ADMUNet
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


def adm_network(config: Config | None, source: str) -> ADMUNet | ADMClassifier:
    """The network that a configuration describes, on the device "meta", for OpenAI's weights.

    Raises ConversionError where there is none, or one that guided-diffusion does not have; errors as `build_network`.
    """
    if config is None or not isinstance(config.model, ADMUNetConfig | ADMClassifierConfig):
        given = "" if config is None else f', not "{config.model.kind}"'
        raise ConversionError(
            f"{source}: OpenAI's weights do not describe their network; give a configuration of it by --config, such "
            f'as imagenet256, with model.kind = "adm-unet" or "adm-classifier"{given}'
        )
    if isinstance(config.model, ADMUNetConfig) and config.model.low_res_noise:
        raise ConversionError(
            f"model.low_res_noise = {config.model.low_res_noise:g}: guided-diffusion's upsamplers are told no level"
        )
    with torch.device("meta"):
        network = build_network(config)
    assert isinstance(network, ADMUNet | ADMClassifier)
    return network
