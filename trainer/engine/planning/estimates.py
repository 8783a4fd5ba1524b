"""Estimates for `--dry-run`: durations on given GPUs, bytes on disk, bytes over the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config import Config, TrainConfig
from trainer.data.stream.stream import BatchLayout
from trainer.engine.build import build_objective
from trainer.engine.monitoring.sample_grids import plan_grid
from trainer.engine.network.cost import Cost
from trainer.errors import ConfigError
from trainer.models.stages import ActivationCheckpointing
from trainer.telemetry.device import DataSheet, data_sheet_of, known_devices, peak_teraflops
from trainer.world import local_world_size

DEVICES = ("A100", "H100", "H200", "V100", "RTX 4090")  # default for the command line
UTILISATION = 0.3  # default model FLOPs utilisation (MFU): share of a device's peak
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """GPUs by name, and the assumed share of their peak FLOP/s, in (0, 1].

    Raises ConfigError for a name that is not in the table, or a share out of range.
    """

    devices: Sequence[str] = DEVICES
    utilisation: float = UTILISATION

    def __post_init__(self) -> None:
        for name in self.devices:
            if data_sheet_of(name) is None:
                raise ConfigError(f"--device {name}: is not known; known are {', '.join(known_devices())}")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"--utilisation {self.utilisation:g}: should be above 0 and at most 1")

    @property
    def sheets(self) -> list[DataSheet]:
        """Data sheets of the devices, in their order."""
        return [sheet for name in self.devices if (sheet := data_sheet_of(name)) is not None]


def flops_of_run(config: Config, cost: Cost, kinds: Sequence[ActivationCheckpointing]) -> dict[str, float]:
    """FLOPs of the whole run: training, recomputed activations, sample grids, validation and feature distance.

    Errors as `plan_grid`.
    """
    global_batch, log = config.train.global_batch, config.log
    images = config.train.duration.steps(global_batch) * global_batch
    forward = cost.forward_flops

    def times(span_images: int) -> int:
        return images // span_images if span_images else 0

    _, steps = plan_grid(config, build_objective(config, torch.device("cpu")), ranks=1)
    grids = times(log.samples_every.images(global_batch)) * log.samples * steps
    distances = times(log.distance_every.images(global_batch)) * log.distance_samples * log.distance_steps
    validations = times(log.validate_every.images(global_batch)) * log.validate_images * 2  # raw and averaged weights
    return {
        "training": float(cost.training_flops * images),
        "recomputing": float(forward * images) * kinds.count("full") / max(len(kinds), 1),
        "drawing": float(forward * grids),
        "measuring": float(forward * (distances + validations)),
    }


def on_devices(
    flops: float, memory: int, hardware: Hardware, *, precision: str, world_size: int
) -> list[dict[str, Any]]:
    """Duration of `flops` on `world_size` of each device; None where its data sheet has no peak for the run's
    precision.

    `memory`: bytes that a rank needs, compared with the device's.
    """
    rows = []
    for sheet in hardware.sheets:
        teraflops = peak_teraflops(sheet, precision)
        seconds = flops / (teraflops * 1e12 * hardware.utilisation * world_size) if teraflops is not None else None
        rows.append(
            {
                "device": sheet.name,
                "precision": precision,
                "peak_teraflops": teraflops,
                "seconds": seconds,
                "device_hours": seconds * world_size / 3600 if seconds is not None else None,
                "memory_bytes": sheet.memory * 10**9,
                "fits": memory <= sheet.memory * 10**9,
            }
        )
    return rows


def sent_bytes(train: TrainConfig, parameters: int, layout: BatchLayout) -> int:
    """Bytes of weights and gradients, float32, that each rank sends in an optimizer step, with ring algorithms.

    An all-reduce over N ranks sends 2 (N - 1) / N of the tensor's size; a reduce-scatter or an all-gather half of that.
    """
    ranks, micro_steps, size = layout.world_size, layout.accumulation, _FLOAT32 * parameters
    share = (ranks - 1) / ranks
    match train.strategy:
        case "zero2":
            return round(size * share * (micro_steps + 1))  # gradients every micro-batch, weights once
        case "zero3" | "fsdp2":
            return round(size * share * 3 * micro_steps)  # weights forward and backward, gradients
        case "hsdp":
            group = shards_in_group(train, ranks)
            replicas = ranks // group
            within = 3 * (group - 1) / group
            across = 2 * (replicas - 1) / replicas / group
            return round(size * micro_steps * (within + across))
        case _:
            return round(size * share * 2)


def shards_in_group(train: TrainConfig, world_size: int) -> int:
    """Ranks in a sharding group of "hsdp": as configured, otherwise the processes of a node as set by the launcher."""
    return train.hsdp_shard_size or local_world_size() or world_size


def snapshots_on_disk(config: Config, parameters: int) -> int:
    """Bytes of all snapshots of averages over the whole run; they are never deleted."""
    every = config.train.ema_snapshots.images(config.train.global_batch)
    count = config.train.duration.images(config.train.global_batch) // every if every else 0
    return count * len(config.train.ema_sigma_rel) * _FLOAT32 * parameters
