"""The process group, checks that the processes are connected, and helpers for collectives of Python objects."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from safetensors import SafetensorError

from trainer.engine.processes import rendezvous
from trainer.engine.processes.cpu_share import set_threads
from trainer.errors import TrainerError
from trainer.launcher.accelerate_environment import forget
from trainer.world import local_rank, world_size

T = TypeVar("T")
_PATIENCE = timedelta(minutes=10)


def make_accelerator(*, patience: timedelta = _PATIENCE, bucket_size: int = 25 * 2**20) -> Accelerator:
    """Join the process group that the launcher set up: CUDA devices where there are any, otherwise CPUs with gloo.

    `patience`: timeout of collectives; `bucket_size`: bytes of gradients in one all-reduce.

    Raises TrainerError where the processes are not connected.
    """
    join_group(patience)
    accelerator = new_accelerator(
        cpu=not torch.cuda.is_available(),  # otherwise Accelerate does not connect processes on CPUs
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=bucket_size / 2**20)
        ],
    )
    check_connected(accelerator)
    return accelerator


def new_accelerator(**settings: Any) -> Accelerator:
    """An Accelerator without mixed precision, which engine/network/precision.py handles; sets torch's threads."""
    accelerator = Accelerator(mixed_precision="no", **settings)
    set_threads()  # last: Accelerate sets them too, from the number of cores of the machine
    return accelerator


def join_group(patience: timedelta, *, alone: bool = False) -> None:
    """Create torch's default process group, which Accelerate and DeepSpeed reuse.

    Launchers' settings for these libraries are removed from the environment: those that are supported are already part
    of the configuration. `alone`: create a group of one rank where there is no launcher, which sharding libraries need.
    Errors as `rendezvous.join`.
    """
    forget(os.environ)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    rendezvous.join(backend, patience)
    if alone and not dist.is_initialized():
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def check_connected(accelerator: Accelerator) -> None:
    """Raise TrainerError where several processes were launched but each has a group of its own."""
    launched = world_size()
    if accelerator.num_processes != launched:
        raise TrainerError(f"{launched} processes were launched but {accelerator.num_processes} are connected")
    if launched > 1 and accelerator.distributed_type == DistributedType.NO:
        raise TrainerError(f"{launched} processes were launched but none shares its gradients with another")


def gather(value: Any) -> list[Any]:
    """All ranks' values, in rank order, on every rank."""
    return gather_object([value])


def gather_numbers(own: torch.Tensor) -> list[list[float]]:
    """A row of numbers, (n,) on the device, from each rank, in rank order, on every rank. Waits for the device."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own.tolist()]
    everyone = own.new_empty(dist.get_world_size(), len(own))
    dist.all_gather(list(everyone), own)
    return everyone.tolist()


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce by sum, in place; the tensor is on the rank's device. Returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def together(
    what: str, action: Callable[[], T], *, kind: type[TrainerError] = TrainerError, only_rank: int | None = None
) -> list[T]:
    """Run file operations on every rank (or on one only); where they fail on any, all ranks raise, so that none waits
    forever.

    Returns the results in rank order (they are pickled and sent, so keep them small). The error is of `kind`; its
    message has `what` could not be done, why, and on which rank. A TrainerError keeps its own message.
    """
    outcome: tuple[list[T], str | None] = ([], None)
    failure: Exception | None = None
    if only_rank is None or only_rank == PartialState().process_index:
        try:
            outcome = ([action()], None)
        except Exception as fault:
            failure = fault
            outcome = ([], str(fault) if isinstance(fault, TrainerError) else f"{what}: {fault}")
    outcomes = gather(outcome)
    for rank, (_, reason) in enumerate(outcomes):
        if reason is not None:
            if failure is not None and not isinstance(failure, OSError | SafetensorError | TrainerError):
                raise failure  # a bug, not a user's error: raised unchanged for its traceback
            where = f" (rank {rank})" if len(outcomes) > 1 else ""
            raise kind(reason + where, agreed=True) from failure
    return [result for results, _ in outcomes for result in results]


def each_its_own(what: str, action: Callable[[], T], *, kind: type[TrainerError] = TrainerError) -> T:
    """Like `together`, for results that stay on their rank."""
    kept: list[T] = []
    together(what, lambda: kept.append(action()), kind=kind)
    return kept[0]


def check_alike(values: Mapping[str, Any], *, kind: type[TrainerError]) -> None:
    """Raise `kind` on all ranks where a rank's values differ from rank 0's: the ranks would train different runs."""
    first, *others = gather(dict(values))
    for rank, other in enumerate(others, start=1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise kind(
                    f"{name}: {first.get(name)} on rank 0, {other.get(name)} on rank {rank}; "
                    "every node must have the same configuration and data",
                    agreed=True,
                )
