"""Finds the fastest micro-batch that fits into memory, by measuring (`trainer/train.py --find-batch`)."""

import itertools
import math
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch
from accelerate import PartialState

from trainer.config import Config, ModelConfig
from trainer.data.stream.stream import BatchLayout, divisors
from trainer.engine.build import build_state
from trainer.engine.network.activation_checkpointing import peak_bytes, recompute, stage_kinds
from trainer.engine.processes.collectives import gather
from trainer.engine.step.train_step import TrainStep
from trainer.engine.strategies import DataParallel
from trainer.errors import ConfigError
from trainer.models.backbones import example_cond
from trainer.signals import StopRequest
from trainer.units import as_size

_PASSES = 5  # timed passes; the same number on all ranks, since each pass is collective
_NEAR = 0.97  # of the highest speed: among micro-batches that reach it the smallest is chosen


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A micro-batch that fits: images/s over all ranks, and the peak memory in bytes, the maximum over the ranks."""

    micro_batch: int
    images_per_second: float
    memory: int


def find_batch(config: Config) -> Iterator[Trial]:
    """Try every micro-batch that divides a rank's share of the global batch, smallest first, until one does not fit.

    A trial runs forward and backward passes over random images, with weights, moments and averages allocated as in
    training. Sizes that exceed `train.memory_budget` are skipped; so are, on CPUs, sizes whose estimated memory exceeds
    the free memory, since the kernel would kill the process. Collective; all ranks try the same sizes. Raises
    ConfigError for other strategies than ddp.
    """
    if config.train.strategy != "ddp":
        raise ConfigError(
            f'--find-batch: tries train.strategy = "ddp", not "{config.train.strategy}"; what fits with ddp also fits '
            "where less is held"
        )
    strategy = DataParallel(config.train)
    # With a budget, activation checkpointing depends on the size: set for each size below, and here for the smallest.
    smallest = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 1})})
    state = build_state(smallest, strategy)
    world_size = strategy.accelerator.num_processes
    share = BatchLayout.plan(config.train.global_batch, world_size, None).micro_batch
    # One step for all sizes, each of one micro-batch: its communication hook can be registered only once.
    layout = BatchLayout(global_batch=world_size, world_size=world_size, micro_batch=1)
    train_step = TrainStep(config=config, layout=layout, state=state, stop=StopRequest())
    for size in divisors(share):
        if config.train.memory_budget is not None:
            try:
                recompute(state.main.network.module, stage_kinds(config, size))
            except ConfigError:
                return
        seconds = _seconds_a_pass(train_step, size) if _is_likely_to_fit(config, strategy.device, size) else math.inf
        slowest = max(gather(seconds))
        if math.isinf(slowest):
            return
        memory = max(gather(_most_memory(strategy.device)))
        yield Trial(micro_batch=size, images_per_second=size * world_size / slowest, memory=memory)


def choose(trials: list[Trial]) -> Trial:
    """The smallest micro-batch within a few per cent of the highest speed. Raises ConfigError where none fits."""
    if not trials:
        raise ConfigError(
            "train.micro_batch: not even 1 fits this device; take train.activation_checkpointing = "
            '"full", a smaller model, or a strategy that shards it'
        )
    fastest = max(trial.images_per_second for trial in trials)
    return next(trial for trial in trials if trial.images_per_second >= _NEAR * fastest)


def print_trials(trials: Iterable[Trial]) -> None:
    """Print each trial as it ends, then the line for the configuration file; on rank 0. Errors as `choose`."""
    done = []
    for trial in trials:
        done.append(trial)
        _say(f"micro_batch {trial.micro_batch:>5}: {trial.images_per_second:10.2f} images/s, {as_size(trial.memory)}")
    _say(f"[train]\nmicro_batch = {choose(done).micro_batch}")


def _say(line: str) -> None:
    if PartialState().is_main_process:
        print(line, flush=True)


def _seconds_a_pass(train_step: TrainStep, size: int) -> float:
    """Seconds for a forward and backward pass over so many images; infinity where the device runs out of memory."""
    device, batches = train_step.state.strategy.device, _random_batches(train_step.config.model, size)
    torch.compiler.reset()  # drop the compiled code of other sizes
    try:
        train_step.backward(batches)  # warm-up: compilation, choice of kernels, allocation
        _wait(device)
        started = time.perf_counter()
        for _ in range(_PASSES):
            train_step.backward(batches)
        _wait(device)
        return (time.perf_counter() - started) / _PASSES
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        train_step.state.main.network.optimizer.zero_grad()


def _random_batches(model: ModelConfig, size: int) -> Iterator[dict[str, torch.Tensor]]:
    image = torch.randint(0, 256, (size, *model.image_shape), dtype=torch.uint8)
    return itertools.repeat({"image": image, "position": torch.arange(size), **example_cond(model, size)})


def _is_likely_to_fit(config: Config, device: torch.device, micro_batch: int) -> bool:
    if device.type == "cuda":
        return True  # no estimate: only a trial shows it
    return peak_bytes(config, stage_kinds(config, micro_batch), micro_batch) < psutil.virtual_memory().available


def _most_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
