"""From a configuration to the objects that it describes."""

import torch
from accelerate import Accelerator
from torch import nn

from trainer.config import Config, ModelConfig
from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.reverse import ReverseProcess, ReverseVariance, output_channels
from trainer.diffusion.schedules import make_betas
from trainer.diffusion.timesteps import ImportanceSampling
from trainer.engine.state import TrainState, make_ema
from trainer.engine.timesteps import ImportanceTimesteps, Timesteps, UniformTimesteps
from trainer.errors import ConfigError
from trainer.models.unet import UNet, UNetConfig


def unet_config(model: ModelConfig, variance: ReverseVariance) -> UNetConfig:
    """The network's own description of its shape. Raises ConfigError where the sizes do not fit together."""
    fields = model.model_dump()
    fields["channel_multipliers"] = tuple(model.channel_multipliers)
    fields["attention_resolutions"] = tuple(model.attention_resolutions)
    out_channels = output_channels(model.channels, variance)
    try:
        return UNetConfig(**fields, out_channels=out_channels)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def build_network(config: Config) -> UNet:
    """The UNet that the configuration describes, initialised from torch's current seed; errors as `unet_config`."""
    return UNet(unet_config(config.model, config.diffusion.variance))


def build_diffusion(config: Config, device: torch.device) -> GaussianDiffusion:
    """The forward process that the configuration describes, its tables on the device."""
    process = config.diffusion
    betas = make_betas(process.schedule, process.timesteps, process.betas)
    return GaussianDiffusion(betas).to(device)


def build_reverse(network: nn.Module, diffusion: GaussianDiffusion, config: Config) -> ReverseProcess:
    """What the network's output means, on a process that may have been respaced."""
    return ReverseProcess(
        network, diffusion, prediction=config.diffusion.prediction, variance=config.diffusion.variance
    )


def build_timesteps(config: Config, device: torch.device) -> Timesteps:
    """How the timesteps to train on are drawn."""
    if config.diffusion.timestep_sampling == "importance":
        return ImportanceTimesteps(config.seed, ImportanceSampling(config.diffusion.timesteps, device))
    return UniformTimesteps(config.seed, config.diffusion.timesteps)


def build_state(config: Config, accelerator: Accelerator) -> TrainState:
    """The state of a run that has not begun; the same on every rank and for every number of ranks."""
    torch.manual_seed(config.seed)
    model = build_network(config).to(accelerator.device)
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
        timesteps=build_timesteps(config, accelerator.device),
    )
