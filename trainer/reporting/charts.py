"""Lines as inline SVG that stretches with the page; axes are HTML, so that their letters do not.

The plot is 1000 x 1000 of its own units, whatever its size on the screen; positions are percent of it.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.ticker import MaxNLocator

from trainer.reporting.series import Line, Panel, Point

_SIDE = 1000.0
_RESTLESS = 1000.0  # percent of the plot's height that a line goes up and down in all
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A label of an axis, and where it stands: percent from the left or from the top."""

    label: str
    percent: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line's legend, its SVG path, and how it is drawn: "faint", "fine" where it is restless, or ""."""

    legend: str
    path: str
    style: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """All that the page's template needs to draw a panel.

    `marks`: percent from the left, where the run was started again; `latest`: last value of each curve; `points`: JSON
    for whoever points at the chart, of each curve [[images, value, left in percent, top in percent], ...].
    """

    title: str
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]
    marks: list[float]
    latest: list[str]
    points: str


def draw(panel: Panel, lines: Sequence[Line], *, last: float, marks: Sequence[float]) -> Chart:
    """Draw lines, at least one, of at least one point each, over 0 to `last` images; `marks`: images."""
    values = [y for line in lines for _, y in line.points]
    to_top, ticks = _vertical(values, log=panel.log and min(values) > 0)
    last = max(last, 1.0)

    def place(point: Point) -> tuple[float, float]:
        return round(point[0] / last * 100, 2), round(to_top(point[1]), 2)

    placed = [[(x, y, *place((x, y))) for x, y in line.points] for line in lines]
    return Chart(
        title=panel.title,
        unit=panel.unit,
        x_ticks=[Tick(label=short(x), percent=x / last * 100) for x in _linear(0, last, 4)],
        y_ticks=[Tick(label=short(y), percent=to_top(y)) for y in ticks],
        curves=[
            Curve(
                legend=line.legend,
                path=_path([(left, top) for _, _, left, top in points]),
                style=_style(line, [top for _, _, _, top in points]),
            )
            for line, points in zip(lines, placed, strict=True)
        ],
        marks=[mark / last * 100 for mark in marks if 0 < mark <= last],
        latest=[short(line.points[-1][1]) for line in lines],
        points=json.dumps([[[int(x), short(y), left, top] for x, y, left, top in points] for points in placed]),
    )


def short(value: float) -> str:
    """Three or four digits, with k, M, G, T: 51.2M, 0.0312, 2e-05."""
    for size, suffix in _SUFFIXES:
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _vertical(values: Sequence[float], *, log: bool) -> tuple[Callable[[float], float], list[float]]:
    """How a value becomes percent from the top, and the ticks."""
    low, high = min(values), max(values)
    if log and high > low:
        margin = (high / low) ** 0.05
        low, high = low / margin, high * margin
        ticks = _logarithmic(low, high)
        span = math.log(high / low)
        return lambda y: 100 - math.log(y / low) / span * 100, ticks
    if 0 <= low < 0.4 * high:
        low = 0.0
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low if low == 0 < high else low - margin), high + margin
    return lambda y: 100 - (y - low) / (high - low) * 100, _linear(low, high, 4)


def _linear(low: float, high: float, count: int) -> list[float]:
    ticks = MaxNLocator(nbins=count, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]


def _logarithmic(low: float, high: float) -> list[float]:
    """Decades where there are several, else their parts, else as on a linear axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = 1 + (last - first) // 6
    for parts in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        ticks = [part * 10.0**decade for decade in range(first, last + 1, every) for part in parts]
        if len(ticks := [tick for tick in ticks if low <= tick <= high]) >= 3:
            return ticks
    return _linear(low, high, 4)


def _style(line: Line, tops: Sequence[float]) -> str:
    if line.faint:
        return "faint"
    return "fine" if sum(abs(b - a) for a, b in pairwise(tops)) > _RESTLESS else ""


def _path(places: Sequence[tuple[float, float]]) -> str:
    """A single point becomes a line without length, which round ends make a dot."""
    if len(places) == 1:
        places = [*places, *places]
    return "M" + "L".join(f"{left * _SIDE / 100:.1f} {top * _SIDE / 100:.1f}" for left, top in places)
