"""Builds the objects that a configuration describes: network, objective, optimizer, state."""

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from trainer.config import AdamConfig, Config
from trainer.data.stream.stream import BatchLayout
from trainer.diffusion.contract import MODEL, Objective
from trainer.diffusion.families import FAMILIES
from trainer.engine.network.activation_checkpointing import recompute, stage_kinds
from trainer.engine.network.build import build_network
from trainer.engine.network.compilation import compile_stages
from trainer.engine.network.freezing import freeze
from trainer.engine.network.precision import run_in
from trainer.engine.state.ema import profiles
from trainer.engine.state.train_state import TrainState
from trainer.engine.strategies import Strategy
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.errors import CheckpointError, ConfigError
from trainer.models.stages import checkpoint_activations


def build_networks(config: Config) -> dict[str, nn.Module]:
    """All networks of the configured family by name, "model" first; as `build_network`."""
    main = build_network(config)  # first: its initial weights do not depend on which others there are
    others = FAMILIES[config.diffusion.kind].networks(config.diffusion, partial(build_network, config))
    for name in others:
        if name == MODEL or not re.fullmatch(r"\w+", name):  # checkpoints have it in names of tensors
            raise ValueError(f"{name!r}: should be the name of a new network, of letters, digits and underscores")
    return {MODEL: main, **others}


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


def build_optimizer(config: AdamConfig, network: nn.Module) -> GuardedAdam:
    """Adam, or AdamW, over the network's parameters that are not frozen."""
    return GuardedAdam(
        (parameter for parameter in network.parameters() if parameter.requires_grad),
        learning_rate=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


def build_state(config: Config, strategy: Strategy) -> TrainState:
    """The state of a run at step 0, sharded over the ranks; its values do not depend on their number. Collective."""
    torch.manual_seed(config.seed)
    networks = build_networks(config)
    if unknown := config.optimizer.networks.keys() - networks.keys():
        has = ", ".join(networks)
        raise ConfigError(f"optimizer.networks.{min(unknown)}: this run has no such network, but {has}", agreed=True)
    freeze(networks, config.train.freeze)
    layout = BatchLayout.plan(config.train.global_batch, strategy.accelerator.num_processes, config.train.micro_batch)
    kind = config.train.activation_checkpointing
    for network in networks.values():
        checkpoint_activations(network, "none" if kind == "budget" else kind)
    if kind == "budget":  # of the main network alone
        recompute(networks[MODEL], stage_kinds(config, layout.micro_batch))
    if config.train.compile == "regional":
        for network in networks.values():
            compile_stages(network, config.train.compile_cache, cuda_graphs=config.train.cuda_graphs)
    distributed = {
        name: strategy.prepare(network, partial(build_optimizer, config.optimizer.of(name)))
        for name, network in networks.items()
    }
    return TrainState(strategy, distributed, profiles(config.train), build_objective(config, strategy.device))
