"""Fully sharded data parallel (FSDP2): each rank holds a shard of every weight; a stage is gathered for its
computation.

"hsdp" shards within groups of ranks, for example those of a node, and replicates over the groups.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from trainer.config import TrainConfig
from trainer.engine.processes.collectives import check_connected, join_group, new_accelerator
from trainer.engine.strategies.base import DistributedNetwork, NamedTensors, Strategy
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.engine.strategies.parameter_slices import ParameterSlice
from trainer.errors import ConfigError
from trainer.models.stages import stages


class FullyShardedDataParallel(Strategy):
    """Accelerate applies `fully_shard` to every stage of the network; the optimizer steps the local shards directly."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        join_group(timedelta(seconds=config.timeout), alone=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        with _fsdp_on_cpus() if not torch.cuda.is_available() else nullcontext():
            self.accelerator = new_accelerator(fsdp_plugin=plugin, **self._mesh())
        check_connected(self.accelerator)

    def _mesh(self) -> dict[str, Any]:
        if self.config.strategy == "fsdp2":
            return {}
        ranks = dist.get_world_size()
        size = self.config.hsdp_shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
        if ranks % size:
            raise ConfigError(
                f"train.hsdp_shard_size = {size}: does not divide {ranks} processes into groups", agreed=True
            )
        if size == 1 < ranks:
            raise ConfigError(
                'train.strategy = "hsdp": groups of 1 process share nothing; set train.hsdp_shard_size to at least 2, '
                'or take "ddp" or "fsdp2"',
                agreed=True,
            )
        return {"parallelism_config": ParallelismConfig(dp_replicate_size=ranks // size, dp_shard_size=size)}

    @override
    def _distribute(self, model: nn.Module, optimizer: GuardedAdam) -> DistributedNetwork:
        names = sorted({type(stage).__name__ for stage in stages(model)})
        self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names
        return FullyShardedNetwork(model, optimizer, self.accelerator)


class FullyShardedNetwork(DistributedNetwork):
    """A network of `FullyShardedDataParallel`.

    Gradients are reduced and scattered after every micro-batch: no rank keeps those of other shards.
    """

    def __init__(self, model: nn.Module, optimizer: GuardedAdam, accelerator: Accelerator) -> None:
        super().__init__(model, optimizer, accelerator.num_processes)
        self.module, _ = accelerator.prepare(model, optimizer)
        parameters = {name: p for name, p in self.module.named_parameters() if isinstance(p, DTensor)}
        self.mesh = next(iter(parameters.values())).device_mesh
        slices = [self._slice(name, parameter) for name, parameter in parameters.items()]
        # Each shard as a plain tensor: as fast as DTensor, and handled by the code of all other strategies.
        trained = [piece for piece in slices if piece.name in self.trained]
        self._shards = [(piece.storage, parameters[piece.name]) for piece in trained]
        optimizer.param_groups[0]["params"] = [piece.storage for piece in trained]
        optimizer.make_state(piece.storage for piece in trained)
        if self.mesh.size() > 1:
            optimizer.sharded = self.mesh.get_group(self.mesh.ndim - 1)  # gradients are equal on replicas
        self.slices = [piece for piece in slices if piece.numel]

    def _slice(self, name: str, parameter: DTensor) -> ParameterSlice:
        """The local slice: `fully_shard` cuts dimension 0 into equal chunks; the last may be short or empty."""
        local = parameter.to_local().detach()
        row = parameter.shape[1:].numel()
        ranks, rank = self.mesh.size(self.mesh.ndim - 1), self.mesh.get_local_rank(self.mesh.ndim - 1)
        start = min(-(-parameter.shape[0] // ranks) * rank, parameter.shape[0]) * row
        return ParameterSlice(name=name, shape=parameter.shape, start=start, stop=start + local.numel(), storage=local)

    @override
    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Its gradients are computed and dropped: FSDP2 does not let `requires_grad` change after the first forward."""
        try:
            yield
        finally:
            for _, parameter in self._shards:
                parameter.grad = None

    @override
    def step(self) -> None:
        for shard, parameter in self._shards:
            assert isinstance(parameter.grad, DTensor)
            shard.grad = parameter.grad.to_local()
            parameter.grad = None
        super().step()

    @override
    def replicas(self) -> tuple[NamedTensors, dist.ProcessGroup | None]:
        if self.mesh.ndim == 1 or self.mesh.size(0) == 1:
            return [], None
        return [(piece.name, piece.weight) for piece in self.slices], self.mesh.get_group(0)


@contextmanager
def _fsdp_on_cpus() -> Iterator[None]:
    """Make Accelerate apply FSDP on CPUs, where it would otherwise silently train without sharding."""

    def gloo(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    prepare = PartialState._prepare_backend
    PartialState._prepare_backend = gloo
    try:
        yield
    finally:
        PartialState._prepare_backend = prepare
