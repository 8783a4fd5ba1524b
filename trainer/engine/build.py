"""Builds the objects that a configuration describes: network, objective, optimizer, state."""

from collections.abc import Mapping

import torch
from torch import nn

from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.diffusion.contract import Objective
from trainer.diffusion.families import FAMILIES
from trainer.engine.network.activation_checkpointing import recompute, stage_kinds
from trainer.engine.network.compilation import compile_stages
from trainer.engine.network.precision import run_in
from trainer.engine.state.ema import profiles
from trainer.engine.state.train_state import TrainState
from trainer.engine.strategies import Strategy
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.errors import CheckpointError, ConfigError
from trainer.models.backbones import BACKBONES


def build_network(config: Config) -> nn.Module:
    """The network that the configuration describes, initialised from torch's current seed.

    Raises ConfigError where its sizes are inconsistent, or where it does not take what `data.cond` names.
    """
    backbone = BACKBONES[config.model.kind]
    taken = backbone.conditioning(config.model, 1)
    if unknown := [name for name in config.data.cond if name not in taken]:
        raise ConfigError(f"data.cond = {unknown}: the network takes no {unknown[0]}; leave it out")
    out_channels = FAMILIES[config.diffusion.kind].output_channels(config.diffusion, config.model.channels)
    return backbone.build(config.model, out_channels)


def build_trained(config: Config, weights: Mapping[str, torch.Tensor], device: torch.device) -> nn.Module:
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


def build_objective(config: Config, device: torch.device) -> Objective:
    """The training objective, its tables and its recorded state on the device."""
    return FAMILIES[config.diffusion.kind].objective(config.diffusion, device)


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
