"""DistributedDataParallel: every rank holds a full replica of weights, moments and gradients."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from trainer.config import TrainConfig
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.strategies.base import DistributedNetwork, Strategy
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.engine.strategies.parameter_slices import whole_slices


class DataParallel(Strategy):
    """All-reduce of the gradients overlaps with the backward pass."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.accelerator = make_accelerator(patience=timedelta(seconds=config.timeout), bucket_size=config.bucket_size)

    @override
    def _distribute(self, model: nn.Module, optimizer: GuardedAdam) -> DistributedNetwork:
        return DataParallelNetwork(model, optimizer, self.accelerator, self.config)


class DataParallelNetwork(DistributedNetwork):
    """A network of `DataParallel`."""

    keeps_own_gradients = True

    def __init__(self, model: nn.Module, optimizer: GuardedAdam, accelerator: Accelerator, config: TrainConfig) -> None:
        super().__init__(model, optimizer, accelerator.num_processes)
        self._model = model
        self._accelerator = accelerator
        self._cuda_graphs = config.cuda_graphs
        if config.precision == "fp16":
            self.scaler = torch.amp.GradScaler(accelerator.device.type)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
        if self._cuda_graphs:
            optimizer.keep_gradients()
        self.module = accelerator.prepare(model)
        optimizer.make_state(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.slices = whole_slices(model)

    @property
    @override
    def fixed_module(self) -> nn.Module:
        """The network without DistributedDataParallel, which would wait for its gradients."""
        return self._model

    @override
    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the graphs' last outputs are not needed
        return nullcontext() if is_last else self._accelerator.no_sync(self.module)

    @override
    def backward(self, loss: torch.Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    @override
    def step(self) -> None:
        if self.scaler is None:
            super().step()
        else:
            self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()

    @override
    def warm_up(self, forward_and_backward: Callable[[], object]) -> None:
        """Run one forward and backward pass and discard its gradients.

        DistributedDataParallel regroups its gradient buckets after the first backward pass, which changes the order of
        summation from then on. Because this runs before the state is loaded, in new and in resumed runs, all training
        steps sum in the same order and a resumed run is exact.
        """
        if self.ranks > 1:
            forward_and_backward()
            self.optimizer.zero_grad()

    @override
    def before_exchange(self, see: Callable[[torch.Tensor], None]) -> bool:

        def see_and_average(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            see(bucket.buffer())
            return allreduce_hook(group, bucket)

        assert isinstance(self.module, DistributedDataParallel)
        self.module.register_comm_hook(dist.group.WORLD, see_and_average)
        return True
