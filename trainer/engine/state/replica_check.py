"""Checks before a save that ranks which replicate weights hold identical ones."""

import torch
import torch.distributed as dist

from trainer.engine.state.train_state import TrainState
from trainer.engine.strategies import DistributedNetwork
from trainer.errors import TrainerError


def check_replicas(state: TrainState, step: int) -> None:
    """Raise TrainerError on all ranks where replicas of a parameter differ in any bit: the ranks have diverged.

    Collective; synchronises with the device.
    """
    different = [each.qualified(name) for each in state.networks.values() for name in _different(each.network)]
    found = torch.tensor(float(len(different)), device=state.strategy.device)
    if dist.is_initialized():  # sharding groups: each group holds replicas of different shards
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if found.item():
        where = different[0] if different else "a parameter of another group of ranks"
        raise TrainerError(
            f"step {step}: {where} ({int(found.item())} parameters in all) is not the same on all ranks: a device or a "
            "connection is at fault; nothing is saved, go on from the last checkpoint",
            agreed=True,
        )


def _different(network: DistributedNetwork) -> list[str]:
    """Names of the parameters whose replicas differ within this rank's group."""
    named, group = network.replicas()
    if group is None or not named:
        return []
    sums = torch.stack([tensor.contiguous().view(torch.int32).sum(dtype=torch.int64) for _, tensor in named])
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return [name for (name, _), equal in zip(named, (least == most).tolist(), strict=True) if not equal]
