"""Builds the network that a configuration describes."""

from torch import nn

from trainer.config import Config
from trainer.config.backbones import upsampler
from trainer.diffusion.families import FAMILIES
from trainer.diffusion.low_res import MADE
from trainer.errors import ConfigError
from trainer.models.backbones import BACKBONES, example_cond


def build_network(config: Config) -> nn.Module:
    """The network that the configuration describes, initialised from torch's current seed.

    Raises ConfigError where its sizes are inconsistent, or where it is not trained with exactly what `data.cond` names
    and, where it upsamples, what is made for it.
    """
    backbone = BACKBONES[config.model.kind]
    needed = example_cond(config.model, 1)
    if unknown := [name for name in config.data.cond if name not in needed]:
        raise ConfigError(f"data.cond = {unknown}: the network takes no {unknown[0]}; leave it out")
    given = {*config.data.cond, *(MADE if upsampler(config.model) is not None else ())}
    if missing := [name for name in needed if name not in given]:
        raise ConfigError(f"data.cond = {list(config.data.cond)}: the network takes {missing[0]}; add it")
    out_channels = FAMILIES[config.diffusion.kind].output_channels(config.diffusion, config.model.channels)
    return backbone.build(config.model, out_channels)
