"""Distribution strategies: each configures Accelerate, and describes what this rank holds by slices."""

from trainer.config import TrainConfig
from trainer.engine.strategies.base import DistributedNetwork, Strategy
from trainer.engine.strategies.data_parallel import DataParallel

__all__ = ["DataParallel", "DistributedNetwork", "Strategy", "make_strategy"]


def make_strategy(config: TrainConfig, *, micro_batch: int, accumulation: int) -> Strategy:
    """Join the process group and make the strategy named by `train.strategy`.

    Raises ConfigError where the strategy cannot run here, TrainerError where the processes are not connected.
    """
    if config.strategy == "ddp":
        return DataParallel(config)
    if config.strategy in ("fsdp2", "hsdp"):
        from trainer.engine.strategies.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(config)
    from trainer.engine.strategies.zero import ZeroRedundancy  # import is slow: it imports DeepSpeed

    return ZeroRedundancy(config, micro_batch=micro_batch, accumulation=accumulation)
