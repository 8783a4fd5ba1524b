"""Which scalars belong on one chart, and how many of their points are worth drawing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Record = Mapping[str, float]
Point = tuple[float, float]

_MOST_POINTS = 400  # of a line; a chart is about as many pixels wide
_HALF_LIFE = 0.01  # of the logged lines: how far the smoothed loss looks back


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart that may be drawn: scalars by name with their legends, a unit, and whether its axis is logarithmic."""

    title: str
    scalars: Mapping[str, str]
    unit: str = ""
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A scalar over images seen, in their order, finite. `faint`: drawn behind the others, for it is noisy."""

    legend: str
    points: list[Point]
    faint: bool = False


def _quarters(prefix: str) -> dict[str, str]:
    names = ("first quarter of t (least noise)", "second", "third", "last (most noise)")
    return {f"{prefix}_q{number}": name for number, name in enumerate(names, start=1)}


SMOOTHED = "train/loss_smoothed"
PANELS = (
    Panel(title="Training loss", scalars={"train/loss": "logged", SMOOTHED: "smoothed"}, log=True),
    Panel(
        title="Validation loss",
        scalars={"validation/loss": "raw weights", "validation/ema_loss": "averaged weights"},
        log=True,
    ),
    Panel(
        title="Distance of samples to real images, by features",
        scalars={"validation/feature_distance": "averaged weights"},
    ),
    Panel(title="Training loss by timestep", scalars=_quarters("train/loss"), log=True),
    Panel(title="Validation loss by timestep, averaged weights", scalars=_quarters("validation/ema_loss"), log=True),
    Panel(title="Validation loss by timestep, raw weights", scalars=_quarters("validation/loss"), log=True),
    Panel(
        title="Validation accuracy",
        scalars={"validation/accuracy": "raw weights", "validation/ema_accuracy": "averaged weights"},
    ),
    Panel(title="Validation accuracy by timestep, averaged weights", scalars=_quarters("validation/ema_accuracy")),
    Panel(title="Validation accuracy by timestep, raw weights", scalars=_quarters("validation/accuracy")),
    Panel(title="Variational bound, estimated", scalars={"train/bound_bits_per_dim": "bound"}, unit="bits/dim"),
    Panel(title="Learning rate", scalars={"train/learning_rate": "learning rate"}),
    Panel(
        title="Gradient norm before clipping",
        scalars={"train/grad_norm": "last step", "train/grad_norm_max": "largest"},
        log=True,
    ),
    Panel(title="Gradient noise scale", scalars={"train/noise_scale": "noise scale"}, unit="images", log=True),
    Panel(title="Weights' distance from their average", scalars={"train/ema_distance": "relative distance"}),
    Panel(title="Speed", scalars={"train/images_per_second": "all ranks"}, unit="images/s"),
    Panel(title="Model FLOPs utilisation (MFU)", scalars={"device/mfu": "MFU"}, unit="of the device's peak"),
    Panel(title="Arithmetic", scalars={"device/flops_per_second": "each device"}, unit="FLOP/s"),
    Panel(
        title="Length of a step",
        scalars={
            "time/step_seconds_p50": "median",
            "time/step_seconds_p95": "95th percentile",
            "time/step_seconds_max": "longest",
        },
        unit="s",
        log=True,
    ),
    Panel(title="Waiting for data", scalars={"time/data_wait_fraction": "slowest rank"}, unit="of the time"),
    Panel(
        title="Memory",
        scalars={
            "device/memory_allocated_bytes": "allocated on the GPU",
            "device/memory_reserved_bytes": "reserved on the GPU",
            "device/host_memory_bytes": "resident on the host",
        },
        unit="bytes",
    ),
    Panel(title="Slowest rank over the median one", scalars={"ranks/slowest_over_median": "ratio"}),
    Panel(
        title="A rank's own part of a micro-step",
        scalars={"ranks/data_seconds": "waiting for data", "ranks/forward_seconds": "forward pass"},
        unit="s",
    ),
    Panel(title="Steps skipped for NaN or infinity", scalars={"train/nonfinite_steps": "steps"}),
)
_ELSEWHERE = ("step", "train/epoch", "validation/feature_distance_samples")  # no curves: the axis, a setting
_ELSEWHERE_PREFIX = "goodput/"  # the bar shows it


def lines_of(panel: Panel, records: Sequence[Record], global_batch: int) -> list[Line]:
    """The panel's lines over images seen; those of which nothing was logged are left out.

    A run that logs no smoothed loss gets one here.
    """
    found = {name: _points(name, records, global_batch) for name in panel.scalars}
    if SMOOTHED in found and not found[SMOOTHED]:
        found[SMOOTHED] = smoothed(found["train/loss"])
    return [
        Line(legend=legend, points=thinned(found[name]), faint=name == "train/loss")
        for name, legend in panel.scalars.items()
        if found[name]
    ]


def other_panels(records: Sequence[Record]) -> list[Panel]:
    """One for each scalar that no panel knows."""
    known = {name for panel in PANELS for name in panel.scalars}.union(_ELSEWHERE)
    names = sorted({name for record in records for name in record} - known)
    return [Panel(title=name, scalars={name: name}) for name in names if not name.startswith(_ELSEWHERE_PREFIX)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential average, corrected for its start as Adam's are."""
    decay = 0.5 ** (1 / max(1.0, _HALF_LIFE * len(points)))
    average, result = 0.0, []
    for number, (x, y) in enumerate(points, start=1):
        average = decay * average + (1 - decay) * y
        result.append((x, average / (1 - decay**number)))
    return result


def thinned(points: list[Point]) -> list[Point]:
    """Not many more than can be seen: of each stretch its lowest and its highest, so that no peak is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    stretches = _MOST_POINTS // 2
    edges = [len(points) * k // stretches for k in range(stretches + 1)]
    kept: list[Point] = []
    for begin, end in pairwise(edges):
        stretch = points[begin:end]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return sorted({points[0], *kept, points[-1]})


def _points(name: str, records: Sequence[Record], global_batch: int) -> list[Point]:
    return [
        (record["step"] * global_batch, float(record[name]))
        for record in records
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]
