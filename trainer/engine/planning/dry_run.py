"""The dry run: what a configuration results in, without training: batch layout, FLOPs, memory, disk, dataset check."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from trainer import world
from trainer.config import Config, TrainConfig
from trainer.data.stream.stream import BatchLayout
from trainer.data.training_data import TrainingData, open_training_data
from trainer.engine.network.activation_checkpointing import peak_bytes, stage_kinds
from trainer.engine.network.build import build_network
from trainer.engine.network.cost import cost_of
from trainer.engine.network.precision import cpu_lacks_bf16
from trainer.engine.planning.estimates import (
    Hardware,
    flops_of_run,
    on_devices,
    sent_bytes,
    shards_in_group,
    snapshots_on_disk,
)
from trainer.errors import TrainerError
from trainer.models.backbones import example_inputs
from trainer.units import as_size, in_words

_RECOMPUTED = {"none": "nothing", "selective": "all but what takes time", "full": "all"}


def describe_run(
    config: Config, *, world_size: int | None, hardware: Hardware | None = None
) -> tuple[dict[str, Any], TrainerError | None]:
    """The plan of a run, and the error of its dataset or None.

    `world_size` defaults to the launcher's; `hardware` is what durations are estimated for. Raises ConfigError where
    the configuration cannot be run at all.
    """
    hardware = hardware or Hardware()
    world_size = world_size or world.world_size()
    layout = BatchLayout.plan(config.train.global_batch, world_size, config.train.micro_batch)
    data, fault = _open_data(config)
    kinds = stage_kinds(config, layout.micro_batch)
    cost = cost_of(partial(build_network, config), partial(example_inputs, config.model))
    steps = config.train.duration.steps(layout.global_batch)
    images = steps * layout.global_batch
    averages = 1 + len(config.train.ema_sigma_rel)
    checkpoint_bytes = (3 + averages) * 4 * cost.parameters  # weights, Adam's two moments, averages; float32
    snapshots_bytes = snapshots_on_disk(config, cost.parameters)
    peak = peak_bytes(config, kinds, layout.micro_batch)
    memory = peak + _state_bytes(config.train, cost.parameters, world_size)
    flops = flops_of_run(config, cost, kinds)
    return {
        "parameters": cost.parameters,
        "forward_flops_per_image": cost.forward_flops,
        "training_flops_per_image": cost.training_flops,
        "training_flops": cost.training_flops * images,
        "flops": flops,
        "global_batch": layout.global_batch,
        "world_size": layout.world_size,
        "accumulation": layout.accumulation,
        "micro_batch": layout.micro_batch,
        "steps": steps,
        "images": images,
        "epochs": images / data.order.samples if data is not None else None,
        "remarks": _remarks(config),
        "blocks": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "memory_per_device_bytes": memory,
        "checkpoint_bytes": checkpoint_bytes,
        "checkpoints_on_disk": _checkpoints_on_disk(config),
        "snapshots_bytes": snapshots_bytes,
        "disk_bytes": checkpoint_bytes * _checkpoints_on_disk(config) + snapshots_bytes,
        "sent_bytes_per_step": sent_bytes(config.train, cost.parameters, layout),
        "utilisation": hardware.utilisation,
        "devices": on_devices(
            sum(flops.values()), memory, hardware, precision=config.train.precision, world_size=world_size
        ),
        "dataset": {
            "path": config.data.where,
            "samples": data.order.samples if data is not None else None,
            "shards": len(data.dataset.shards) if data is not None else None,
            "fault": str(fault) if fault is not None else None,
        },
    }, fault


def as_text(plan: dict[str, Any]) -> str:
    """The plan as text."""
    epochs = f" = {plan['epochs']:,.1f} epochs" if plan["epochs"] is not None else ""
    data = plan["dataset"]
    samples = f"{data['samples']:,} images in {data['shards']:,} shards" if data["fault"] is None else data["fault"]
    snapshots = f" and {as_size(plan['snapshots_bytes'])} of snapshots" if plan["snapshots_bytes"] else ""
    rows = {
        "network": f"{plan['parameters']:,} parameters",
        "FLOPs per image": f"{plan['forward_flops_per_image'] / 1e9:,.1f} G forward, "
        f"{plan['training_flops_per_image'] / 1e9:,.1f} G forward and backward",
        "FLOPs of the run": f"{plan['training_flops']:.3g}{_beside_training(plan['flops'])}",
        "global batch": f"{plan['global_batch']} = {plan['micro_batch']} images x {plan['accumulation']} accumulated "
        f"x {plan['world_size']} processes",
        "duration": f"{plan['steps']:,} steps = {plan['images']:,} images{epochs}",
        "memory per device": f"{as_size(plan['memory_per_device_bytes'])} (estimate: weights, gradients, Adam, EMA, "
        f"activations of {plan['micro_batch']} images)",
        "recomputed": ", ".join(f"{_RECOMPUTED[kind]} of {count} blocks" for kind, count in plan["blocks"].items()),
        "checkpoint": as_size(plan["checkpoint_bytes"]),
        "disk": f"{as_size(plan['disk_bytes'])} for {plan['checkpoints_on_disk']} checkpoints at most{snapshots}",
        "exchange": f"{as_size(plan['sent_bytes_per_step'])} sent by each process in a step",
        "data": f"{data['path']}: {samples}",
    }
    width = max(map(len, rows))
    lines = [*rows.items(), *_durations(plan), *(("remark", remark) for remark in plan["remarks"])]
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _beside_training(flops: dict[str, float]) -> str:
    others = [f"{value:.3g} {name}" for name, value in flops.items() if name != "training" and value]
    return f", and {', '.join(others)}" if others else ""


def _durations(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """One line for each device: the run's estimated duration on one of it per process."""
    for row in plan["devices"]:
        if row["seconds"] is None:
            text = f"its data sheet has no {row['precision']}"
        else:
            text = (
                f"{in_words(row['seconds'])} = {row['device_hours']:,.1f} GPU hours (estimate: {row['precision']} at "
            )
            text += f"{plan['utilisation']:.0%} of {row['peak_teraflops']:g} TFLOP/s)"
        if not row["fits"]:
            text += f"; does not fit into its {row['memory_bytes'] / 1e9:.0f} GB"
        yield f"{plan['world_size']} x {row['device']}", text


def _open_data(config: Config) -> tuple[TrainingData | None, TrainerError | None]:
    try:
        return open_training_data(config, index_folder=None), None
    except TrainerError as fault:
        return None, fault


def _remarks(config: Config) -> list[str]:
    """Warnings: settings that are emulated or slow on this machine."""
    if config.train.precision == "bf16" and not torch.cuda.is_available() and cpu_lacks_bf16():
        return ["train.precision = 'bf16': this CPU has neither AVX512-BF16 nor AMX; 'fp32' is faster here"]
    return []


def _state_bytes(train: TrainConfig, parameters: int, world_size: int) -> int:
    """Bytes of a rank's training state, beyond the unsharded weights and gradients that `peak_bytes` includes.

    What a strategy shards is subtracted, so the result may be negative. `docs/strategies.md` has the table.
    """
    sharers = {"ddp": 1, "hsdp": shards_in_group(train, world_size)}
    share = 1 / sharers.get(train.strategy, world_size)
    copies = 2 * share + (1 + len(train.ema_sigma_rel)) / world_size  # moments, averages
    if train.strategy in ("zero1", "zero2"):
        copies += share  # separate master weights for the optimizer
    if train.offload_optimizer:
        copies = 0  # moments, master weights and averages are in the host's memory
    if train.strategy not in ("ddp", "zero1"):
        copies -= 1 - share  # gradients
    if train.strategy in ("zero3", "fsdp2", "hsdp"):
        copies -= 1 - share  # weights
    return round(4 * parameters * copies)


def _checkpoints_on_disk(config: Config) -> int:
    """Number of checkpoints: retained ones, those kept forever, and the one being written."""
    global_batch, keep_every = config.train.global_batch, config.checkpoint.keep_every.images(config.train.global_batch)
    forever = config.train.duration.images(global_batch) // keep_every if keep_every else 0
    return config.checkpoint.keep + config.checkpoint.keep_best + forever + 1
