"""From a configuration to the objects that it describes."""

import torch
from accelerate import Accelerator

from trainer.config import Config, ModelConfig
from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.schedules import make_betas
from trainer.engine.state import TrainState, make_ema
from trainer.errors import ConfigError
from trainer.models.unet import UNet, UNetConfig


def unet_config(model: ModelConfig) -> UNetConfig:
    """The network's own description of its shape. Raises ConfigError where the sizes do not fit together."""
    fields = model.model_dump()
    fields["channel_multipliers"] = tuple(model.channel_multipliers)
    fields["attention_resolutions"] = tuple(model.attention_resolutions)
    try:
        return UNetConfig(**fields)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def build_network(model: ModelConfig) -> UNet:
    """The UNet that the configuration describes, initialised from torch's current seed; errors as `unet_config`."""
    return UNet(unet_config(model))


def build_diffusion(config: Config, device: torch.device) -> GaussianDiffusion:
    """The forward process that the configuration describes, its tables on the device."""
    return GaussianDiffusion(make_betas(config.diffusion.schedule, config.diffusion.timesteps)).to(device)


def build_state(config: Config, accelerator: Accelerator) -> TrainState:
    """The state of a run that has not begun; the same on every rank and for every number of ranks."""
    torch.manual_seed(config.seed)
    model = build_network(config.model).to(accelerator.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    model.activation_checkpointing = config.train.activation_checkpointing
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        fused=True,
    )
    return TrainState(
        model=model,
        ema=make_ema(model, config.train.ema_decay),
        optimizer=optimizer,
        scaler=accelerator.scaler,
    )
