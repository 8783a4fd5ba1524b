"""Post-hoc EMA: makes a run's folder from an average of any width, combined from snapshots of a run's averages."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from trainer.config import Config
from trainer.engine.checkpointing.checkpoints import Checkpoints, open_verified
from trainer.engine.network.build import build_network
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.run_folder import RunFolder
from trainer.engine.state.post_hoc_ema import combination
from trainer.engine.state.tensor_files import TensorReader
from trainer.errors import ConversionError
from trainer.interop.import_weights import make_run
from trainer.interop.layouts import fit
from trainer.interop.staging import new_folder
from trainer.units import Span

_POWER_NAME = re.compile(r"ema-(\d*\.?\d+(?:e-\d+)?)")  # as written by power_name


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """One average in one snapshot: its name in the reader, its width, and its number of updates."""

    reader: TensorReader
    name: str
    sigma_rel: float
    updates: int


def average(source: Path, *, sigma_rel: float, step: int | None, out: Path) -> None:
    """Write a run's folder for sampling: its only checkpoint, of step 0, holds the average as raw and averaged weights.

    source: the run with snapshots; sigma_rel: the width, above 0 and below 0.28; step: None for the newest snapshot's.
    Raises TrainerError where the run has no undamaged snapshots, none of `step`, or `out` exists.
    """
    run, accelerator = RunFolder(source, writes=False), make_accelerator()
    config = run.load_config()
    found, step, updates = _open(run, step, accelerator)
    weights, remainder = combination(
        [(one.updates, one.sigma_rel) for one in found], updates=updates, sigma_rel=sigma_rel
    )
    with torch.device("meta"):
        network = build_network(config)
    with new_folder(out) as staging:
        make_run(
            staging,
            _to_draw_from(config, out),
            fit(dict(_sums(found, weights)), network, source=str(run.averages)),
            accelerator,
            event="averaged",
            source=str(source),
            sigma_rel=sigma_rel,
            step_of_source=step,
            snapshots=len(found),
            profile_error=remainder,
        )
    print(
        f"average of {source} at step {step}, sigma_rel {sigma_rel:g}, made of {len(found)} stored ones "
        f"(relative error of the profile {remainder:.2g}), in {out}: draw with "
        f"`python trainer/sample.py --run {out}`"
    )


def _open(run: RunFolder, step: int | None, accelerator: Accelerator) -> tuple[list[_Snapshot], int, int]:
    """All averages in snapshots up to `step`; that step, and the number of updates up to it."""
    snapshots = Checkpoints(run.averages, accelerator)
    whole = []
    for candidate in snapshots.steps():
        reason = snapshots.verify(snapshots.path(candidate))
        if reason is None:
            whole.append(candidate)
        else:
            print(f"{snapshots.path(candidate)}: damaged: {reason}; left out")
    if not whole:
        raise ConversionError(f"{run.averages}: holds no snapshot that is whole; train.ema_snapshots makes them")
    step = whole[-1] if step is None else step
    if step not in whole:
        raise ConversionError(f"--step {step}: {run.averages} has no such snapshot, but {', '.join(map(str, whole))}")
    found, updates = list[_Snapshot](), 0
    for each in (each for each in whole if each <= step):
        reader, manifest = open_verified(snapshots.path(each))
        updates = int(manifest["state"]["updates"])
        if updates == 0:  # all steps were skipped
            continue
        for name in sorted({name.partition("/")[0] for name in reader.shapes}):
            if match := _POWER_NAME.fullmatch(name):
                found.append(_Snapshot(reader=reader, name=name, sigma_rel=float(match[1]), updates=updates))
    if not found or updates == 0:
        raise ConversionError(f"--step {step}: {run.averages} holds no average of an update until then")
    return found, step, updates


def _sums(found: list[_Snapshot], weights: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the network one at a time: read, summed in float64 and rounded."""
    first = f"{found[0].name}/"
    for name in [name.removeprefix(first) for name in found[0].reader.shapes if name.startswith(first)]:
        total = torch.zeros(found[0].reader.shapes[first + name], dtype=torch.float64)
        for one, weight in zip(found, weights.tolist(), strict=True):
            if one.reader.shapes.get(f"{one.name}/{name}") != total.shape:
                raise ConversionError(f"{one.name}/{name}: not in every snapshot, or of another shape")
            total.add_(one.reader.whole(f"{one.name}/{name}").double(), alpha=weight)
        yield name, total.float()


def _to_draw_from(config: Config, out: Path) -> Config:
    """The run's configuration without its own averages, which the new folder does not have."""
    train = config.train.model_copy(update={"ema_sigma_rel": [], "ema_snapshots": Span(0, "steps")})
    checkpoint = config.checkpoint.model_copy(update={"copy_to": None})
    return config.model_copy(update={"run_dir": str(out), "train": train, "checkpoint": checkpoint})
