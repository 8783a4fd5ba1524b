"""Builds the objects that a configuration describes: network, diffusion process, objective, optimizer, state."""

from collections.abc import Mapping

import torch
from torch import nn

from trainer.config import Config, ModelConfig
from trainer.data.stream.stream import BatchLayout
from trainer.diffusion.ddpm.objective import GaussianObjective
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.reverse import ReverseProcess, ReverseVariance, output_channels
from trainer.diffusion.ddpm.schedules import make_betas
from trainer.diffusion.ddpm.timesteps import ImportanceSampling
from trainer.engine.network.activation_checkpointing import recompute, stage_kinds
from trainer.engine.network.compilation import compile_stages
from trainer.engine.network.precision import run_in
from trainer.engine.state.ema import profiles
from trainer.engine.state.train_state import TrainState
from trainer.engine.strategies import Strategy
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.errors import CheckpointError, ConfigError
from trainer.models.ddpm_unet import UNet, UNetConfig


def unet_config(model: ModelConfig, variance: ReverseVariance) -> UNetConfig:
    """The UNet's own configuration. Raises ConfigError where its sizes are inconsistent."""
    fields = model.model_dump()
    fields["channel_multipliers"] = tuple(model.channel_multipliers)
    fields["attention_resolutions"] = tuple(model.attention_resolutions)
    out_channels = output_channels(model.channels, variance)
    try:
        return UNetConfig(**fields, out_channels=out_channels)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def build_network(config: Config) -> UNet:
    """The UNet that the configuration describes, initialised from torch's current seed; errors as `unet_config`, and
    ConfigError where it does not take what `data.cond` names.
    """
    if unknown := [name for name in config.data.cond if name not in UNet.conditioning]:
        raise ConfigError(f"data.cond = {unknown}: the network takes no {unknown[0]}; leave it out")
    return UNet(unet_config(config.model, config.diffusion.variance))


def build_diffusion(config: Config, device: torch.device) -> GaussianDiffusion:
    """The forward process that the configuration describes, its tables on the device."""
    process = config.diffusion
    betas = make_betas(process.schedule, process.timesteps, process.betas)
    return GaussianDiffusion(betas).to(device)


def build_reverse(network: nn.Module, diffusion: GaussianDiffusion, config: Config) -> ReverseProcess:
    """The reverse process: interprets the network's output, on a forward process that may have been respaced."""
    return ReverseProcess(
        network, diffusion, prediction=config.diffusion.prediction, variance=config.diffusion.variance
    )


def build_trained(config: Config, weights: Mapping[str, torch.Tensor], device: torch.device) -> UNet:
    """A network for sampling or evaluation: `weights` loaded, in eval mode, on the device, in the run's precision.

    Raises CheckpointError where the weights are of another network.
    """
    network = build_network(config)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError("the weights do not fit the network in the run's config.toml") from error
    network.eval().requires_grad_(False).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    run_in(config.train.precision, network, device)
    return network


def build_objective(config: Config, device: torch.device) -> GaussianObjective:
    """The training objective, its tables and its recorded state (importance sampling of t) on the device."""
    process = config.diffusion
    importance = process.timestep_sampling == "importance"
    return GaussianObjective(
        build_diffusion(config, device),
        prediction=process.prediction,
        variance=process.variance,
        loss=process.loss,
        times=ImportanceSampling(process.timesteps, device) if importance else None,
    )


def build_optimizer(config: Config, network: nn.Module) -> GuardedAdam:
    """Adam over the network's parameters."""
    return GuardedAdam(
        network.parameters(),
        learning_rate=config.optimizer.learning_rate,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        clip_norm=config.optimizer.clip_norm,
    )


def build_state(config: Config, strategy: Strategy) -> TrainState:
    """The state of a run at step 0, sharded over the ranks; its values do not depend on their number. Collective."""
    torch.manual_seed(config.seed)
    network = build_network(config)
    layout = BatchLayout.plan(config.train.global_batch, strategy.accelerator.num_processes, config.train.micro_batch)
    recompute(network, stage_kinds(lambda: build_network(config), config, layout.micro_batch))
    if config.train.compile == "regional":
        compile_stages(network, config.train.compile_cache, cuda_graphs=config.train.cuda_graphs)
    strategy.prepare(network, lambda model: build_optimizer(config, model))
    return TrainState(strategy, profiles(config.train), build_objective(config, strategy.device))
