"""Runs, checkpoints and copies of them elsewhere, for the tests of copying and of bringing back."""

from pathlib import Path
from typing import Any

import torch

from tests.harness import checkpoint
from tests.stored import write_checkpoint
from trainer.config import CheckpointConfig
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.checkpointing.remote.mirror import Copies
from trainer.engine.checkpointing.remote.mirror_folder import CopyFolder
from trainer.engine.checkpointing.remote.restore import restore
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.run_folder import RunFolder

IDENTITY = {"seed": 3}


def store(run: Path, step: int, **settings: Any) -> Path:
    return write_checkpoint(
        run / "checkpoints", {"model/w": torch.full((300,), float(step))}, step=step, ranks=2, **settings
    )


def copies_of(run: Path, url: object, *, keep: int = 3, forever: tuple[int, ...] = ()) -> tuple[Copies, list[str]]:
    lines: list[str] = []
    run.mkdir(exist_ok=True)
    copies = Copies(
        CheckpointConfig(every="1 steps", copy_to=str(url), copy_keep=keep),  # type: ignore[arg-type]
        CopyFolder(str(url)),
        folder=RunFolder(run, writes=True),
        accelerator=make_accelerator(),
        identity=IDENTITY,
        keep_forever=forever.__contains__,
        say=lines.append,
    )
    return copies, lines


def copy_all(copies: Copies, run: Path, *steps: int) -> None:
    for step in steps:
        copies.want(store(run, step) if not checkpoint(run, step).exists() else checkpoint(run, step))
        copies.end()


def bring_back(run: Path, url: object) -> Path | None:
    checkpoints = Checkpoints(run / "checkpoints", make_accelerator())
    return restore(CopyFolder(str(url)), checkpoints, RunFolder(run, writes=True), IDENTITY, say=print)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
