"""What the engine asks of a strategy, and the simplest one: every rank holds everything (DistributedDataParallel)."""

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

from trainer.config import TrainConfig
from trainer.engine.optimizer import GuardedAdam
from trainer.engine.precision import run_in
from trainer.engine.processes import make_accelerator
from trainer.engine.slices import ParameterSlice


class Strategy(ABC):
    """One per run. After `prepare`, `network` is what computes and `slices` is what this rank steps of it."""

    accelerator: Accelerator
    network: nn.Module
    optimizer: GuardedAdam
    slices: list[ParameterSlice]
    shapes: dict[str, torch.Size]  # of all parameters, whole
    scaler: torch.amp.GradScaler | None = None
    keeps_own_gradients = False  # whether what a rank accumulates is its own until the last micro-batch of a step

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.accelerator.device

    def prepare(self, model: nn.Module, make_optimizer: Callable[[nn.Module], GuardedAdam]) -> None:
        """Spread the model, whose weights are the same on every rank, over the ranks."""
        model.to(self.device)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        run_in(self.config.precision, model, self.device)
        self._spread(model, make_optimizer(model))

    @abstractmethod
    def _spread(self, model: nn.Module, optimizer: GuardedAdam) -> None:
        """Set `network`, `optimizer` with moments of zero, and `slices`."""

    @abstractmethod
    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of a micro-batch; all but the last of a step may keep gradients local."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, which is already divided by the number of micro-batches."""

    @abstractmethod
    def step(self) -> None:
        """Apply the gradients by `optimizer.step` and forget them; `optimizer.prepare_step` was called before."""

    def weights_changed(self) -> None:  # noqa: B027  # for most, what computes is what is stepped
        """Bring what computes in line with the slices, which were written to from outside (a checkpoint was loaded)."""

    def warm_up(self, forward_and_backward: Callable[[], object]) -> None:  # noqa: B027  # most need not
        """Called before the state is loaded: whatever makes the first steps of a process unlike the later ones."""

    def before_exchange(self, see: Callable[[torch.Tensor], None]) -> bool:  # noqa: ARG002
        """Have `see` called, in every backward pass that ends in an exchange, with each part of the gradient that this
        rank has accumulated on its own; returns False where the strategy never has it whole.
        """
        return False

    @abstractmethod
    def replicas(self) -> tuple[list[tuple[str, torch.Tensor]], dist.ProcessGroup | None]:
        """Tensors that must be the same bit for bit on all ranks of the group, by parameter; none where all is sharded.

        The group is None where there is one rank.
        """


class DataParallel(Strategy):
    """Every rank holds weights, moments and gradients whole; gradients are averaged while they are computed."""

    keeps_own_gradients = True

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.accelerator = make_accelerator(patience=timedelta(seconds=config.timeout), bucket_size=config.bucket_size)
        if config.precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type)

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

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:
        """See `Strategy`."""
        if self.config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what graphs put out for the last micro-batch is done with
        return nullcontext() if is_last else self.accelerator.no_sync(self.network)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Strategy`."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> None:
        """See `Strategy`."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def warm_up(self, forward_and_backward: Callable[[], object]) -> None:
        """Throw one forward and backward away.

        DistributedDataParallel regroups its gradient buckets after the first backward pass, which changes the order
        of summation from then on. Done before the state is loaded, in new and resumed runs alike, all real steps sum
        in one order and a resumed run is exact.
        """
        if self.accelerator.num_processes > 1:
            forward_and_backward()
            self.optimizer.zero_grad()

    def before_exchange(self, see: Callable[[torch.Tensor], None]) -> bool:
        """See `Strategy`."""

        def see_and_average(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            see(bucket.buffer())
            return allreduce_hook(group, bucket)

        assert isinstance(self.network, DistributedDataParallel)
        self.network.register_comm_hook(dist.group.WORLD, see_and_average)
        return True

    def replicas(self) -> tuple[list[tuple[str, torch.Tensor]], dist.ProcessGroup | None]:
        """See `Strategy`."""
        group = dist.group.WORLD if self.accelerator.num_processes > 1 else None
        return [(piece.name, piece.weight) for piece in self.slices], group
