"""The micro-batch that computes fastest of those that fit, found by trying them (`trainer/train.py --find-batch`)."""

import itertools
import math
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch
from accelerate import PartialState

from trainer.config import Config
from trainer.data.stream import BatchLayout
from trainer.engine.build import build_network, build_state
from trainer.engine.dry_run import measure_cost
from trainer.engine.processes import gather
from trainer.engine.recomputation import recompute, stage_kinds
from trainer.engine.step import TrainStep
from trainer.engine.strategies import DataParallel
from trainer.errors import ConfigError
from trainer.signals import StopRequest
from trainer.units import as_size

_PASSES = 5  # that are timed; the same on all ranks, which meet in each
_NEAR = 0.97  # of the best speed: a smaller batch that is as fast leaves memory for other things


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A micro-batch that fits: images/s of all ranks together, and the most memory that a rank has held, in bytes."""

    micro_batch: int
    images_per_second: float
    memory: int


def find_batch(config: Config) -> Iterator[Trial]:
    """Try every micro-batch that divides a rank's share of the global batch, smallest first, until one does not fit.

    A trial is forward and backward passes over random images, with weights, moments and averages in memory as in
    training. A size that `train.memory_budget` cannot hold is not tried; nor on CPUs, where the process would be
    killed, one for which more memory is foretold than is free. Collective; all ranks try the same sizes. Raises
    ConfigError for other strategies than ddp.
    """
    if config.train.strategy != "ddp":
        raise ConfigError(
            f'--find-batch: tries train.strategy = "ddp", not "{config.train.strategy}"; what fits with ddp also fits '
            "where less is held"
        )
    strategy = DataParallel(config.train)
    # What is recomputed within a budget depends on the size, so it is set for each below, and now for the smallest.
    smallest = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 1})})
    state = build_state(smallest, strategy)
    world_size = strategy.accelerator.num_processes
    share = BatchLayout.plan(config.train.global_batch, world_size, None).micro_batch
    # One for all sizes: what it hooks to the exchange between ranks can be hooked once.
    layout = BatchLayout(global_batch=world_size, world_size=world_size, micro_batch=1)
    train_step = TrainStep(config=config, layout=layout, strategy=strategy, state=state, stop=StopRequest())
    for size in (n for n in range(1, share + 1) if share % n == 0):
        train_step.layout = BatchLayout(global_batch=size * world_size, world_size=world_size, micro_batch=size)
        if config.train.memory_budget is not None:
            try:
                recompute(strategy.network, stage_kinds(lambda: build_network(config), config, size))
            except ConfigError:
                return
        seconds = _seconds_a_pass(train_step) if _is_likely_to_fit(config, strategy.device, size) else math.inf
        slowest = max(gather(seconds))
        if math.isinf(slowest):
            return
        memory = max(gather(_most_memory(strategy.device)))
        yield Trial(micro_batch=size, images_per_second=size * world_size / slowest, memory=memory)


def choose(trials: list[Trial]) -> Trial:
    """The smallest micro-batch that is about as fast as the fastest. Raises ConfigError where none fits."""
    if not trials:
        raise ConfigError(
            "train.micro_batch: not even 1 fits this device; take train.activation_checkpointing = "
            '"full", a smaller model, or a strategy that shards it'
        )
    fastest = max(trial.images_per_second for trial in trials)
    return next(trial for trial in trials if trial.images_per_second >= _NEAR * fastest)


def print_trials(trials: Iterable[Trial]) -> None:
    """Print each trial when it is done, and at last the line for the configuration, on rank 0. Errors as `choose`."""
    done = []
    for trial in trials:
        done.append(trial)
        _say(f"micro_batch {trial.micro_batch:>5}: {trial.images_per_second:10.2f} images/s, {as_size(trial.memory)}")
    _say(f"[train]\nmicro_batch = {choose(done).micro_batch}")


def _say(line: str) -> None:
    if PartialState().is_main_process:
        print(line, flush=True)


def _seconds_a_pass(train_step: TrainStep) -> float:
    """Of forward and backward; infinity where the device has too little memory."""
    device, batches = train_step.strategy.device, _random_batches(train_step)
    torch.compiler.reset()  # compiled code of other sizes
    try:
        train_step.backward(batches)  # what is done once: compiling, choosing kernels, allocating
        _wait(device)
        started = time.perf_counter()
        for _ in range(_PASSES):
            train_step.backward(batches)
        _wait(device)
        return (time.perf_counter() - started) / _PASSES
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        train_step.strategy.optimizer.zero_grad()


def _random_batches(train_step: TrainStep) -> Iterator[dict[str, torch.Tensor]]:
    model, size = train_step.config.model, train_step.layout.micro_batch
    shape = (size, model.channels, model.image_size, model.image_size)
    batch = {"image": torch.randint(0, 256, shape, dtype=torch.uint8), "position": torch.arange(size)}
    return itertools.repeat(batch)


def _is_likely_to_fit(config: Config, device: torch.device, micro_batch: int) -> bool:
    if device.type == "cuda":
        return True  # whether it does is found by trying
    return measure_cost(config, micro_batch).peak_bytes < psutil.virtual_memory().available


def _most_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
