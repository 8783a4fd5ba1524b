"""The page put together: everything that comes from the run goes through Jinja's escaping."""

import base64
import hashlib
import time
import tomllib
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from trainer import __version__
from trainer.reporting import tables
from trainer.reporting.charts import Chart, draw
from trainer.reporting.pictures import Picture, embed, spread
from trainer.reporting.run_files import RunFiles
from trainer.reporting.series import PANELS, Panel, lines_of, other_panels

_MOST_GRIDS = 12
_MOST_DRAWN = 6  # folders of sample.py


def render(run: RunFiles) -> str:
    """The whole page as HTML, which loads nothing from anywhere: its own policy forbids it."""
    templates = Environment(
        loader=DictLoader({"page": _file("page.html")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _file("hover.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template("page").render(
        style=Markup(_file("page.css")),
        script=Markup(script),
        script_digest=digest,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=__version__,
        run=run,
        facts=tables.key_facts(run),
        charts=_charts(run, PANELS),
        other_charts=_charts(run, other_panels(run.records)),
        grids=_grids(run),
        drawn=_drawn(run),
        evaluations=tables.evaluations(run),
        goodput=tables.goodput_shares(run),
        checkpoints=tables.checkpoint_rows(run),
        events=tables.event_rows(run),
        environment=run.starts[-1].get("environment", {}) if run.starts else {},
        config=_config(run),
    )


def _charts(run: RunFiles, panels: tuple[Panel, ...] | list[Panel]) -> list[Chart]:
    batch = run.config.train.global_batch
    last = max([record["step"] for record in run.records], default=0) * batch
    again = [start["step"] * batch for start in run.starts[1:]]
    found = [(panel, lines_of(panel, run.records, batch)) for panel in panels]
    return [draw(panel, lines, last=last, marks=again) for panel, lines in found if lines]


def _grids(run: RunFiles) -> list[Picture]:
    """Drawn while training, spread evenly over it."""
    batch = run.config.train.global_batch
    named = [(path.stem.removeprefix("step-"), path) for path in (run.path / "samples").glob("step-*.png")]
    drawn = sorted((int(step), path) for step, path in named if step.isdigit())
    chosen = spread(drawn, _MOST_GRIDS)
    return embed({path: f"step {step:,} · {step * batch:,} images" for step, path in chosen})


def _drawn(run: RunFiles) -> list[Picture]:
    """What sample.py drew, the newest first."""
    paths = sorted((run.path / "samples").glob("*/grid.png"), key=lambda path: -path.stat().st_mtime)
    return embed({path: path.parent.name for path in paths[:_MOST_DRAWN]})


def _config(run: RunFiles) -> dict[str, dict[str, str]]:
    """Fields by section, as resolved; those that belong to none first."""
    raw: dict[str, Any] = tomllib.loads(run.config.to_toml())
    sections = {name: fields for name, fields in raw.items() if isinstance(fields, dict)}
    sections = {"run": {name: value for name, value in raw.items() if name not in sections}, **sections}
    return {name: {field: str(value) for field, value in fields.items()} for name, fields in sections.items()}


def _file(name: str) -> str:
    return resources.files("trainer.reporting").joinpath(name).read_text()
