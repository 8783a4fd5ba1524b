"""Validation metrics of each step, kept beside the checkpoints: RUN/checkpoints/scores.json."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.telemetry.files import number, read_object, write_whole
from trainer.telemetry.metrics import read_metrics

SCORES_NAME = "scores.json"
Scores = dict[int, dict[str, float]]


def read_scores(checkpoints: Path) -> Scores:
    """Metrics by step. Where the file is missing or damaged they are taken from the run's logs; invalid ones are
    dropped.
    """
    content = read_object(checkpoints / SCORES_NAME)
    if content is None:
        logged = read_metrics(checkpoints.parent / "logs")
        return {int(record["step"]): found for record in logged if (found := _validation(record))}
    scores = {int(step): _scores_of(of) for step, of in content.items() if step.isascii() and step.isdigit()}
    return {step: of for step, of in scores.items() if of}


def _validation(record: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("validation/")}


def _scores_of(values: Any) -> dict[str, float]:
    found = {name: number(value) for name, value in values.items()} if isinstance(values, dict) else {}
    return {name: float(value) for name, value in found.items() if value is not None}


def write_scores(checkpoints: Path, scores: Scores) -> None:
    """Write the file atomically. Raises OSError."""
    write_whole(checkpoints / SCORES_NAME, json.dumps(scores, indent=1) + "\n")


def best(scores: Mapping[int, Mapping[str, float]], steps: Iterable[int], *, metric: str, count: int) -> list[int]:
    """The `count` of `steps` with the lowest metric, best first; of equal ones the newer first. Steps without a metric,
    or with one that is not finite, are excluded.
    """
    scored = [(scores[step][metric], -step) for step in steps if metric in scores.get(step, {})]
    return [-step for value, step in sorted(scored) if math.isfinite(value)][:count]
