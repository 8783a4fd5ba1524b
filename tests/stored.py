"""Checkpoints made by hand, for tests that need no training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trainer.engine.checkpointing import sealed
from trainer.engine.state.tensor_files import SavedSlice


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    step: int,
    ranks: int = 1,
    strategy: str = "ddp",
    identity: Mapping[str, Any] | None = None,
) -> Path:
    """As `ranks` ranks would have written it, each a slice of every tensor."""
    staging = folder / f".staging-step-{step:08d}"
    staging.mkdir(parents=True)
    records = []
    for rank in range(ranks):
        part = {}
        for name, tensor in tensors.items():
            flat = tensor.reshape(-1)
            start, stop = (len(flat) * r // ranks for r in (rank, rank + 1))
            piece = SavedSlice(name, tensor.shape, start, flat[start:stop])
            part[piece.key] = piece.values.clone().view(tensor.shape if ranks == 1 else -1)
        path = staging / f"part-{rank:05d}-of-{ranks:05d}.safetensors"
        save_file(part, path)
        records.append(sealed.record_file(path))
    content = {
        "format_version": 2,
        "trainer_version": "0",
        "step": step,
        "world_size": ranks,
        "strategy": strategy,
        "state": {"position": 8 * step, "updates": step},
        "identity": dict(identity or {"seed": 3}),
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    sealed.seal(staging, folder / f"step-{step:08d}", records, content)
    return folder / f"step-{step:08d}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
