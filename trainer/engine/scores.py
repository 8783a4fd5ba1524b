"""What validation said of each step, kept beside the checkpoints: RUN/checkpoints/scores.json."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

SCORES_NAME = "scores.json"
Scores = dict[int, dict[str, float]]


def read_scores(checkpoints: Path) -> Scores:
    """Metrics by step; nothing where there is no such file or it is damaged: it only says what is worth keeping."""
    try:
        content = json.loads((checkpoints / SCORES_NAME).read_text())
        return {int(step): {str(name): float(value) for name, value in of.items()} for step, of in content.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def write_scores(checkpoints: Path, scores: Scores) -> None:
    """The file appears whole or not at all. Raises OSError."""
    path = checkpoints / SCORES_NAME
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(scores, indent=1) + "\n")
    fresh.replace(path)


def best(scores: Mapping[int, Mapping[str, float]], steps: Iterable[int], *, metric: str, count: int) -> list[int]:
    """Of `steps` the `count` with the lowest metric, the best first; of equals the newer. Those that have none, or one
    that is not finite, are not among them.
    """
    scored = [(scores[step][metric], -step) for step in steps if metric in scores.get(step, {})]
    return [-step for value, step in sorted(scored) if math.isfinite(value)][:count]
