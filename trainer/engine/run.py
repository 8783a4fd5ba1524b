"""A run's folder and identity.

RUN/config.toml      the configuration as resolved
RUN/checkpoints/     see trainer/engine/checkpoints.py
RUN/logs/            TensorBoard files and metrics.jsonl
RUN/samples/         grids drawn while training
RUN/nonfinite/       batches whose loss or gradient was not finite
RUN/events.jsonl     starts, resumes, checkpoints, faults, stops
RUN/DONE             written when the whole duration has been trained
"""

import json
import time
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.data.shards import ShardedDataset
from trainer.errors import CheckpointError, ConfigError, TrainerError


class RunFolder:
    """Paths of a run, and its journal. Only rank 0 writes."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.samples = path / "samples"
        self.nonfinite = path / "nonfinite"
        self.done = path / "DONE"
        self.config = path / "config.toml"
        self._writes = writes

    def create(self, config: Config) -> None:
        """Make the folder and save the resolved configuration."""
        if self._writes:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self.config.write_text(config.to_toml())
            except OSError as error:
                raise TrainerError(f"run_dir = {self.path}: cannot be written ({error.strerror})") from error

    def event(self, name: str, **details: Any) -> None:
        """Append a line to the journal."""
        if self._writes:
            with (self.path / "events.jsonl").open("a") as journal:
                journal.write(json.dumps({"time": round(time.time(), 3), "event": name, **details}) + "\n")


def identity(config: Config, dataset: ShardedDataset) -> dict[str, Any]:
    """What must not change within a run, or it would be another one: network, process, seed, batch and images."""
    fields = {f"model.{name}": value for name, value in config.model.model_dump().items()}
    fields |= {f"diffusion.{name}": getattr(config.diffusion, name) for name in ("timesteps", "schedule")}
    fields |= {"seed": config.seed, "data.flip": config.data.flip, "train.global_batch": config.train.global_batch}
    return {**fields, "data (manifest)": dataset.manifest.fingerprint}


def check_identity(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointError with the differences where a checkpoint belongs to another run."""
    differences = [
        f"{name}: {saved.get(name)} in the checkpoint, {current.get(name)} now"
        for name in current | saved
        if saved.get(name) != current.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint}: belongs to another run: {'; '.join(differences)}; restore these, or choose another run_dir"
        )


def check_dataset(config: Config, dataset: ShardedDataset) -> None:
    """Raise ConfigError where the network's images are not the dataset's."""
    manifest = dataset.manifest
    for field, wanted, found in (
        ("image_size", config.model.image_size, manifest.image_size),
        ("channels", config.model.channels, manifest.channels),
    ):
        if wanted != found:
            raise ConfigError(f"model.{field} = {wanted}: the images in {dataset.folder} have {found}")
