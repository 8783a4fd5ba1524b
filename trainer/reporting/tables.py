"""The page's figures in words: key facts, time, events, checkpoints, evaluations. Plain values for the template."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trainer.engine.network.build import build_network
from trainer.inspection.text import size
from trainer.reporting.charts import short
from trainer.reporting.pictures import Picture, embed
from trainer.reporting.run_files import RunFiles
from trainer.units import in_words

_LATEST = 20  # log lines that the speed is the median of
_MOST_EVENTS = 300
_MOST_EVALUATIONS = 40
_BAD = {
    *("nonfinite", "quarantined", "damaged", "bad_sample", "rank_failed", "hang"),
    *("slow_rank", "checkpoint_failed", "copy_failed", "copy_refused"),
}
_GOOD = {"finished"}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A name, a value, and what is to be known besides."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An event: when, at which step, what, and its details; `kind`: "bad", "good" or ""."""

    time: str
    step: str
    event: str
    details: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A folder of RUN/evaluation: of each of its JSON files the results by name, and its pictures."""

    name: str
    results: dict[str, dict[str, str]]
    pictures: list[Picture]


def key_facts(run: RunFiles) -> list[Fact]:
    """What one wants to know first."""
    train, images = run.config.train, run.step * run.config.train.global_batch
    epoch = run.latest("train/epoch")
    facts = [
        Fact(name="Step", value=f"{run.step:,}", note=f"of {run.last_step:,} ({run.step / run.last_step:.1%})"),
        Fact(name="Images seen", value=short(images), note=f"{epoch:.4g} epochs" if epoch is not None else ""),
    ]
    if (loss := run.latest("train/loss_smoothed", "train/loss")) is not None:
        facts.append(Fact(name="Training loss", value=short(loss), note="latest"))
    if best := _best(run, "validation/ema_loss"):
        facts.append(
            Fact(name="Best validation loss", value=short(best[0]), note=f"averaged weights, step {best[1]:,}")
        )
    speeds = [one.get("train/images_per_second", 0.0) for one in run.records]
    if speed := [one for one in speeds if math.isfinite(one) and one > 0]:
        latest = median(speed[-_LATEST:])
        left = (run.last_step * train.global_batch - images) / latest
        facts.append(
            Fact(name="Images/s", value=short(latest), note=f"{in_words(left)} to train" if left > 0 else "latest")
        )
    if (mfu := run.latest("device/mfu")) is not None:
        facts.append(Fact(name="MFU", value=f"{mfu:.1%}", note="latest"))
    if run.goodput.total:
        training = run.goodput.share("training")
        facts.append(Fact(name="Goodput", value=f"{training:.1%}", note=f"of {in_words(run.goodput.total)}"))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_network(run.config).parameters())
    side = run.config.model.image_size
    facts.append(Fact(name="Parameters", value=short(parameters), note=f"{side} x {side} images"))
    ranks = run.starts[-1].get("world_size", "?") if run.starts else None
    spread = f"{ranks} process{'' if ranks == 1 else 'es'}" if ranks is not None else "not started yet"
    facts.append(Fact(name="Batch", value=f"{train.global_batch:,}", note=f"{train.strategy}, {spread}"))
    return facts


def goodput_shares(run: RunFiles) -> list[Fact]:
    """Name, share of the time ("12.3%") and duration, the largest first."""
    parts = sorted(run.goodput.seconds.items(), key=lambda part: -part[1])
    return [
        Fact(name=name, value=f"{run.goodput.share(name):.2%}", note=in_words(seconds))
        for name, seconds in parts
        if seconds > 0
    ]


def event_rows(run: RunFiles) -> list[Row]:
    """The newest first, at most a few hundred."""
    return [_row(event) for event in reversed(run.events[-_MOST_EVENTS:])]


def checkpoint_rows(run: RunFiles) -> list[list[str]]:
    """Step, when, size, state and why it is kept, the newest first."""
    listed = reversed(run.checkpoints.checkpoints) if run.checkpoints is not None else ()
    return [
        [
            f"{one.step:,}",
            (one.saved or "?").replace("T", " ")[:19],
            size(one.bytes),
            "DAMAGED: " + "; ".join(one.faults) if one.faults else "all files there",
            ", ".join(one.marks),
        ]
        for one in listed
    ]


def evaluations(run: RunFiles) -> list[Evaluation]:
    """What lies in RUN/evaluation, the newest first: JSON results and pictures, by folder."""
    root = run.path / "evaluation"
    files = [path for suffix in ("json", "png") for path in root.rglob(f"*.{suffix}") if path.name != "request.json"]
    names = {path.relative_to(root).parent if path.parent != root else Path(path.stem) for path in files}
    newest = sorted(names, key=lambda name: -max(path.stat().st_mtime for path in _of(name, root, files)))
    return [_evaluation(name, _of(name, root, files)) for name in newest[:_MOST_EVALUATIONS]]


def _of(name: Path, root: Path, files: Sequence[Path]) -> list[Path]:
    return [path for path in files if path.parent == root / name or path.with_suffix("") == root / name]


def _evaluation(name: Path, files: list[Path]) -> Evaluation:
    results: dict[str, dict[str, str]] = {}
    for path in sorted(path for path in files if path.suffix == ".json"):
        try:
            results[path.stem] = _flat(json.loads(path.read_text()))
        except (OSError, ValueError):
            results[path.stem] = {path.name: "cannot be read"}
    pictures = embed({path: path.stem for path in files if path.suffix == ".png"})
    return Evaluation(name=str(name), results=results, pictures=pictures)


def _flat(content: Any, prefix: str = "") -> dict[str, str]:
    """Scalars by dotted name; lists are too long for a table."""
    if isinstance(content, dict):
        return {k: v for name, value in content.items() for k, v in _flat(value, f"{prefix}.{name}".strip(".")).items()}
    if isinstance(content, float):
        return {prefix: f"{content:.6g}"}
    return {prefix: str(content)} if isinstance(content, str | int) else {}


def _best(run: RunFiles, name: str) -> tuple[float, int] | None:
    found = [(one[name], int(one["step"])) for one in run.records if math.isfinite(one.get(name, math.nan))]
    return min(found, default=None)


def _row(event: dict[str, Any]) -> Row:
    told = {name: value for name, value in event.items() if name not in ("event", "time", "step", "environment")}
    if "last_seen" in told:
        told["last_seen"] = _utc(told["last_seen"]) if told["last_seen"] else "never"
    return Row(
        time=_utc(event["time"]),
        step=f"{event['step']:,}" if isinstance(event.get("step"), int) else "",
        event=event["event"].replace("_", " "),
        details="; ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in told.items() if value),
        kind="bad" if event["event"] in _BAD or event.get("last_seen") else "good" if event["event"] in _GOOD else "",
    )


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
