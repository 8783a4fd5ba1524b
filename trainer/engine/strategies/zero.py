"""ZeRO by DeepSpeed: stage 1 shards the optimizer's state, stage 2 also the gradients, stage 3 also the weights."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import override

from trainer.config import TrainConfig
from trainer.engine.processes.collectives import check_connected, join_group, new_accelerator
from trainer.engine.strategies.base import DistributedNetwork, NamedTensors, Strategy
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.engine.strategies.parameter_slices import ParameterSlice
from trainer.errors import ConfigError
from trainer.models.stages import stages

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

try:
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs
except ImportError as error:
    raise ConfigError(
        f"train.strategy: the ZeRO strategies need DeepSpeed, which cannot be imported ({error}); "
        "pip install deepspeed, or take ddp, fsdp2 or hsdp"
    ) from error


logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings concern settings that are deliberate here


class _Plugin(DeepSpeedPlugin):
    def set_deepspeed_weakref(self) -> None:
        """Do nothing: Accelerate's method imports transformers, which would have to be installed."""
        self.dschf = None


class ZeroRedundancy(Strategy):
    """DeepSpeed computes, communicates and shards; its clipping, averaging and saving are disabled."""

    def __init__(self, config: TrainConfig, *, micro_batch: int, accumulation: int) -> None:
        super().__init__(config)
        self.stage = int(config.strategy.removeprefix("zero"))
        if not torch.cuda.is_available():
            # DeepSpeed would first compile shared-memory collectives for CPUs; gloo is sufficient.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        join_group(timedelta(seconds=config.timeout), alone=True)
        on_cpu = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
        self.accelerator = new_accelerator(
            deepspeed_plugin=_Plugin(hf_ds_config=self._settings(micro_batch, accumulation)),
            gradient_accumulation_steps=accumulation,
            kwargs_handlers=on_cpu,
        )
        check_connected(self.accelerator)

    def _settings(self, micro_batch: int, accumulation: int) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:
            zero["memory_efficient_linear"] = False  # its own backward pass rounds gradients of biases less accurately
            zero["sub_group_size"] = 10**15  # one optimizer call a step, which clips by the global norm
        if self.config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        elif self.stage < 3:
            zero["compute_grad_norm"] = False  # GuardedAdam computes the norm, without synchronising
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,  # DeepSpeed's default of 1.0 would clip in addition to GuardedAdam
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    @override
    def _distribute(self, model: nn.Module, optimizer: GuardedAdam) -> DistributedNetwork:
        if self.stage == 3 and self.config.compile != "none":
            # Weights of a stage are gathered around its forward: hooks inside would break the compiled graph.
            deepspeed.utils.set_z3_leaf_modules(model, list({type(stage) for stage in stages(model)}))
        return ZeroNetwork(model, optimizer, self.accelerator, self.stage)


class ZeroNetwork(DistributedNetwork):
    """A network of `ZeroRedundancy`."""

    def __init__(self, model: nn.Module, optimizer: GuardedAdam, accelerator: Accelerator, stage: int) -> None:
        super().__init__(model, optimizer, accelerator.num_processes)
        self.stage = stage
        self._rank = accelerator.process_index
        self.module, _ = accelerator.prepare(model, optimizer)
        self.engine: Any = self.module
        self.zero: Any = self.engine.optimizer
        if self.ranks > 1:
            optimizer.sharded = dist.group.WORLD
        optimizer.make_state(self._flat_partitions())
        names = {parameter: name for name, parameter in model.named_parameters()}
        trained = self._slices_of_weights(names) if stage == 3 else self._slices_of_optimizer(names)
        self.slices = sorted([*trained, *self._frozen_slices(names)], key=lambda piece: (piece.name, piece.start))

    @property
    @override
    def fixed_module(self) -> nn.Module:
        """The network without DeepSpeed's engine, whose own backward pass it would announce."""
        module: nn.Module = self.engine.module
        return module

    def _flat_partitions(self) -> list[torch.Tensor]:
        """This rank's float32 master weights, as flat tensors."""
        zero = self.zero
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _slices_of_optimizer(self, names: dict[nn.Parameter, str]) -> Iterator[ParameterSlice]:
        """Slices for stages 1 and 2, which concatenate all parameters and cut the result into equal partitions."""
        for group, flat in zip(self.zero.bit16_groups, self._flat_partitions(), strict=True):
            for parameter in group:
                fragment = parameter._hp_mapping
                if fragment is None:  # lies in another rank's partition
                    continue
                start, count = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
                yield ParameterSlice(
                    name=names[parameter],
                    shape=parameter.shape,
                    start=start,
                    stop=start + count,
                    storage=flat,
                    offset=fragment.hp_fragment_address.start,
                )

    def _slices_of_weights(self, names: dict[nn.Parameter, str]) -> Iterator[ParameterSlice]:
        """Slices for stage 3, which cuts each parameter into equal parts, padded at the end."""
        for group, flat in zip(self.zero.fp16_groups, self._flat_partitions(), strict=True):
            offset = 0
            for parameter in group:
                yield from self._slice_of_weight(names[parameter], parameter, flat, offset)
                offset += parameter.partition_numel()

    def _slice_of_weight(self, name: str, parameter: Any, storage: torch.Tensor, offset: int) -> list[ParameterSlice]:
        """This rank's part of a parameter under stage 3; none where it is only padding."""
        size = parameter.partition_numel()
        start, stop = (min(rank * size, parameter.ds_numel) for rank in (self._rank, self._rank + 1))
        shape = torch.Size(parameter.ds_shape)
        piece = ParameterSlice(name=name, shape=shape, start=start, stop=stop, storage=storage, offset=offset)
        return [piece] if piece.numel else []

    def _frozen_slices(self, names: dict[nn.Parameter, str]) -> Iterator[ParameterSlice]:
        """Slices of the parameters that the optimizer does not have: sharded under stage 3, otherwise whole."""
        for parameter, name in names.items():
            if name in self.trained:
                continue
            if self.stage == 3:
                yield from self._slice_of_weight(name, parameter, parameter.ds_tensor, 0)  # type: ignore[attr-defined]
            else:
                yield ParameterSlice(
                    name=name, shape=parameter.shape, start=0, stop=parameter.numel(), storage=parameter
                )

    @override
    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Stages 2 and 3 reduce after every micro-batch: no rank keeps gradients of other partitions."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    @override
    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    @override
    def step(self) -> None:
        """DeepSpeed calls `optimizer.step` between reducing the gradients and all-gathering the weights."""
        self.engine.step()

    @override
    @torch.no_grad()
    def weights_changed(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:  # small parameters that stay unsharded on every rank
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    @override
    def replicas(self) -> tuple[NamedTensors, dist.ProcessGroup | None]:
        """Below stage 3 every rank computes with a full replica of the weights."""
        if self.stage == 3 or self.ranks == 1:
            return [], None
        named = [(name, parameter.detach()) for name, parameter in self.engine.module.named_parameters()]
        return named, dist.group.WORLD
