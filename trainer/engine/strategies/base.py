"""What a strategy does for a run and for each of its networks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from trainer.config import TrainConfig
from trainer.engine.network.precision import run_in
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.engine.strategies.parameter_slices import ParameterSlice, whole_slices

NamedTensors = list[tuple[str, torch.Tensor]]


class DistributedNetwork:
    """A network that is distributed over `ranks` ranks, and its optimizer. As it stands it is a full replica on each
    rank; a subclass overrides what its strategy does in another way.

    `module` computes the forward pass; `slices`: the parameters that this rank holds, of which the optimizer steps
    those that are trained; `shapes`: of all parameters, unsharded; `trained`: names of those that are not frozen.
    """

    slices: list[ParameterSlice]
    scaler: torch.amp.GradScaler | None = None
    keeps_own_gradients = False  # whether accumulated gradients stay local until the last micro-batch of a step

    def __init__(self, model: nn.Module, optimizer: GuardedAdam, ranks: int) -> None:
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.module = model
        self.optimizer = optimizer
        self.ranks = ranks

    @property
    def fixed_module(self) -> nn.Module:
        """Computes the forward pass within `fixed`."""
        return self.module

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """A context for the phase of another network: this one passes gradients on, and has none afterwards."""
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """A context for forward and backward pass of a micro-batch; before the last of a step gradients may stay
        local.
        """
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of `loss`, which is already divided by the number of micro-batches."""
        loss.backward()

    def step(self) -> None:
        """Call `optimizer.step` and clear the gradients; `optimizer.prepare_step` must have been called."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights_changed(self) -> None:  # for most the slices are the weights that compute
        """Copy the slices to the tensors of the forward pass, after the slices were modified by loading a
        checkpoint.
        """

    def warm_up(self, forward_and_backward: Callable[[], object]) -> None:  # most strategies need none
        """Called before the state is loaded: runs what would otherwise make a process's first steps differ."""

    def before_exchange(self, see: Callable[[torch.Tensor], None]) -> bool:  # noqa: ARG002
        """Register `see`, called in every backward pass that ends in an all-reduce, with each part of the gradient that
        this rank has accumulated locally; returns False where the strategy never holds a complete local gradient.
        """
        return False

    def replicas(self) -> tuple[NamedTensors, dist.ProcessGroup | None]:
        """Replicated tensors by parameter, equal bit for bit on all ranks of the group; none where everything is
        sharded.

        The group is None where there is one rank.
        """
        return [(piece.name, piece.weight) for piece in self.slices], dist.group.WORLD if self.ranks > 1 else None


class Strategy(ABC):
    """One per run: it has joined the process group, and distributes networks over the ranks."""

    accelerator: Accelerator

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.accelerator.device

    def prepare(self, model: nn.Module, make_optimizer: Callable[[nn.Module], GuardedAdam]) -> DistributedNetwork:
        """Distribute a model, whose weights are the same on every rank. One that is frozen as a whole is replicated."""
        model.to(self.device)
        run_in(self.config.precision, model, self.device)
        optimizer = make_optimizer(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
            network = DistributedNetwork(model, optimizer, self.accelerator.num_processes)
            network.slices = whole_slices(model)
            return network
        return self._distribute(model, optimizer)

    @abstractmethod
    def _distribute(self, model: nn.Module, optimizer: GuardedAdam) -> DistributedNetwork:
        """The network, its optimizer with zero moments."""
