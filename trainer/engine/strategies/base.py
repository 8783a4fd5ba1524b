"""The interface of strategies, and DistributedDataParallel: every rank holds a full replica."""

from abc import ABC, abstractmethod
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
from trainer.engine.network.precision import run_in
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.engine.strategies.parameter_slices import ParameterSlice


class Strategy(ABC):
    """One per run. After `prepare`, `network` computes the forward pass, and this rank's optimizer steps `slices`."""

    accelerator: Accelerator
    network: nn.Module
    optimizer: GuardedAdam
    slices: list[ParameterSlice]
    shapes: dict[str, torch.Size]  # of all parameters, unsharded
    scaler: torch.amp.GradScaler | None = None
    keeps_own_gradients = False  # whether accumulated gradients stay local until the last micro-batch of a step

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.accelerator.device

    def prepare(self, model: nn.Module, make_optimizer: Callable[[nn.Module], GuardedAdam]) -> None:
        """Distribute the model over the ranks; its weights are the same on every rank."""
        model.to(self.device)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        run_in(self.config.precision, model, self.device)
        self._spread(model, make_optimizer(model))

    @abstractmethod
    def _spread(self, model: nn.Module, optimizer: GuardedAdam) -> None:
        """Set `network`, `optimizer` with zero moments, and `slices`."""

    @abstractmethod
    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """A context for forward and backward pass of a micro-batch; before the last of a step gradients may stay
        local.
        """

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of `loss`, which is already divided by the number of micro-batches."""

    @abstractmethod
    def step(self) -> None:
        """Call `optimizer.step` and clear the gradients; `optimizer.prepare_step` must have been called."""

    def weights_changed(self) -> None:  # noqa: B027  # for most the slices are the weights that compute
        """Copy the slices to the tensors of the forward pass, after the slices were modified by loading a
        checkpoint.
        """

    def warm_up(self, forward_and_backward: Callable[[], object]) -> None:  # noqa: B027  # most strategies need none
        """Called before the state is loaded: runs what would otherwise make a process's first steps differ."""

    def before_exchange(self, see: Callable[[torch.Tensor], None]) -> bool:  # noqa: ARG002
        """Register `see`, called in every backward pass that ends in an all-reduce, with each part of the gradient that
        this rank has accumulated locally; returns False where the strategy never holds a complete local gradient.
        """
        return False

    @abstractmethod
    def replicas(self) -> tuple[list[tuple[str, torch.Tensor]], dist.ProcessGroup | None]:
        """Replicated tensors by parameter, equal bit for bit on all ranks of the group; none where everything is
        sharded.

        The group is None where there is one rank.
        """


class DataParallel(Strategy):
    """Every rank holds a full replica of weights, moments and gradients; all-reduce overlaps with the backward pass."""

    keeps_own_gradients = True

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.accelerator = make_accelerator(patience=timedelta(seconds=config.timeout), bucket_size=config.bucket_size)
        if config.precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type)

    @override
    def _spread(self, model: nn.Module, optimizer: GuardedAdam) -> None:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
        if self.config.cuda_graphs:
            optimizer.keep_gradients()
        self.network = self.accelerator.prepare(model)
        self.optimizer = optimizer
        self.optimizer.make_state(model.parameters())
        self.slices = [
            ParameterSlice(name=name, shape=p.shape, start=0, stop=p.numel(), storage=p)
            for name, p in model.named_parameters()
        ]

    @override
    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        if self.config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the graphs' last outputs are not needed
        return nullcontext() if is_last else self.accelerator.no_sync(self.network)

    @override
    def backward(self, loss: torch.Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    @override
    def step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
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
        if self.accelerator.num_processes > 1:
            forward_and_backward()
            self.optimizer.zero_grad()

    @override
    def before_exchange(self, see: Callable[[torch.Tensor], None]) -> bool:

        def see_and_average(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            see(bucket.buffer())
            return allreduce_hook(group, bucket)

        assert isinstance(self.network, DistributedDataParallel)
        self.network.register_comm_hook(dist.group.WORLD, see_and_average)
        return True

    @override
    def replicas(self) -> tuple[list[tuple[str, torch.Tensor]], dist.ProcessGroup | None]:
        group = dist.group.WORLD if self.accelerator.num_processes > 1 else None
        return [(piece.name, piece.weight) for piece in self.slices], group
