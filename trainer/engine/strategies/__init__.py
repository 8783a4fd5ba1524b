"""How a run is spread over processes: each strategy makes Accelerate do it and describes the result by slices."""

from trainer.config import TrainConfig
from trainer.engine.strategies.base import DataParallel, Strategy

__all__ = ["DataParallel", "Strategy", "make_strategy"]


def make_strategy(config: TrainConfig, *, micro_batch: int, accumulation: int) -> Strategy:
    """Join the processes that the launcher started, in the way that `train.strategy` names.

    Raises ConfigError where the strategy cannot run here, TrainerError where the processes would not train together.
    """
    if config.strategy == "ddp":
        return DataParallel(config)
    if config.strategy in ("fsdp2", "hsdp"):
        from trainer.engine.strategies.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(config)
    from trainer.engine.strategies.zero import ZeroRedundancy  # imports DeepSpeed, which takes seconds

    return ZeroRedundancy(config, micro_batch=micro_batch, accumulation=accumulation)
