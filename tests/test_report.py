"""The report: one page that loads nothing, of a run in whatever state, and nothing of the run gets out of its place."""

import base64
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.harness import launch, load_config, overrides, write_config
from trainer import report as program
from trainer.reporting.charts import draw
from trainer.reporting.series import Line, Panel, smoothed, thinned

HOSTILE = '"><script>alert(1)</script><img src=http://example.org/x>'
Make = Callable[..., "Page"]


class Page(HTMLParser):
    """What of a page matters here: its elements with their attributes, its scripts and its text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._within = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.scripts.append(data)
            self._within = ""
        else:
            self.text += data

    def charts(self) -> list[str]:
        labels = [attributes["aria-label"] or "" for tag, attributes in self.elements if tag == "svg"]
        return [label.removesuffix(" over images seen") for label in labels]

    def pictures(self) -> list[str]:
        return [attributes["alt"] or "" for tag, attributes in self.elements if tag == "img"]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Make:
    def call(run: Path, *, expect: int = 0) -> Page:
        monkeypatch.setattr(sys, "argv", ["report", str(run)])
        code = program.main()
        printed = capsys.readouterr()
        assert code == expect, printed
        if expect:
            return Page(printed.err)
        page = Page((run / "report.html").read_text())
        loads_nothing(page)
        return page

    return call


def loads_nothing(page: Page) -> None:
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "object", "embed", "base"})
    for tag, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on")}
        assert (attributes.get("src") or "data:").startswith("data:"), tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    (script,) = page.scripts  # ours alone, and the policy lets no other run
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] or "" for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with its configuration and nothing else."""
    config = load_config(write_config(tmp_path, Path("nowhere")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config.to_toml())
    return tmp_path / "run"


def test_a_run_that_never_trained(run: Path, make: Make) -> None:
    page = make(run)
    assert "not started yet" in page.text
    assert "Nothing has been logged yet." in page.text
    assert "It was never started." in page.text
    assert "channel_multipliers" in page.text
    assert page.charts() == []


def test_a_finished_run(tmp_path: Path, dataset: Path, make: Make) -> None:
    config = str(write_config(tmp_path, dataset))
    settings = overrides(data__holdout=0.5, log__validate_every="2 steps", log__samples_every="3 steps")
    launch(1, "--config", config, *settings)
    page = make(tmp_path / "run")
    assert "finished" in page.text
    assert {"Training loss", "Validation loss", "Learning rate", "Speed"} <= set(page.charts())
    assert page.pictures() == ["step 3 · 24 images", "step 6 · 48 images"]
    assert "Environment of the last start" in page.text
    assert "of 6 (100.0%)" in page.text
    assert "all files there" in page.text
    widths = [float((a["style"] or "")[6:-1]) for tag, a in page.elements if tag == "i"]
    assert sum(widths) == pytest.approx(100, abs=0.1)


def test_a_run_that_trains_and_has_had_faults(run: Path, make: Make) -> None:
    (run / "logs").mkdir()
    lines = [{"step": s, "train/loss": 1 / s, "device/mfu": 0.4, "new/scalar": 1.0} for s in (1, 2, 3)]
    lines.append({"step": 4, "train/loss": math.nan})
    (run / "logs" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "tr')
    started = {"time": time.time() - 60, "event": "started", "step": 0, "world_size": 2, "startup_seconds": 5.0}
    again = {**started, "time": time.time() - 20, "step": 2, "last_seen": time.time() - 30, "lost_steps": 1}
    events = [started, again, {"time": time.time(), "event": "nonfinite", "step": 3, "dump": "step-00000003.json"}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    other = {"time": time.time(), "event": "bad_sample", "sample": "000007.png"}
    (run / "events-rank-00001.jsonl").write_text(json.dumps(other) + "\n")
    beat = {"time": time.time(), "step": 4, "activity": "training", "host": "n1", "seconds": {"training": 20.0}}
    (run / "heartbeat.json").write_text(json.dumps(beat))
    page = make(run)
    assert "training on n1, seen" in page.text
    assert set(page.charts()) == {"Training loss", "Model FLOPs utilisation (MFU)", "new/scalar"}
    assert "1 other scalars" in page.text
    assert "000007.png" in page.text
    assert "step-00000003.json" in page.text
    assert "1 died" in page.text
    assert sum(a.get("class") == "mark" for _, a in page.elements) == 3  # the second start, on every chart


def test_what_comes_from_the_run_is_escaped(run: Path, make: Make) -> None:
    hostile = run.rename(run.parent / "<b onclick=x>&amp;")
    text = (hostile / "config.toml").read_text().replace('path = "nowhere"', f"path = '{HOSTILE}'")
    (hostile / "config.toml").write_text(text)
    event = {"time": 1.0, "event": HOSTILE, "step": 1, HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}
    (hostile / "events.jsonl").write_text(json.dumps(event) + "\n")
    (hostile / "logs").mkdir()
    (hostile / "logs" / "metrics.jsonl").write_text(json.dumps({"step": 1, f"train/{HOSTILE}": 1.0}) + "\n")
    result = hostile / "evaluation" / "<i>"
    result.mkdir(parents=True)
    (result / "fid.json").write_text(json.dumps({HOSTILE: HOSTILE, "images": [1, 2]}))
    Image.new("RGB", (4, 4)).save(result / "'onerror=alert(1) x='.png")
    (result / "broken.png").write_bytes(b"\x89PNG")
    page = make(hostile)  # which looks for what should not be there
    assert page.text.count(HOSTILE) >= 6
    assert page.charts() == [f"train/{HOSTILE}"]
    assert page.pictures() == ["'onerror=alert(1) x='"]


def test_results_of_one_folder_do_not_hide_each_other(run: Path, make: Make) -> None:
    folder = run / "evaluation" / "ema-50k"
    folder.mkdir(parents=True)
    (folder / "fid.json").write_text(json.dumps({"metric": "FID", "value": 3.17, "samples": {"number": 50_000}}))
    (folder / "kid.json").write_text(json.dumps({"metric": "KID", "value": 0.0004}))
    (folder / "half.json").write_text('{"metric": ')
    (run / "evaluation" / "figure6.json").write_text(json.dumps({"rows": 4}))
    text = make(run).text
    for expected in ("ema-50k", "FID", "3.17", "samples.number", "50000", "KID", "0.0004", "cannot be read", "figure6"):
        assert expected in text


def test_what_is_no_run_is_told_in_one_line(tmp_path: Path, make: Make) -> None:
    assert "holds no config.toml, so it is no run's folder" in make(tmp_path, expect=2).text


def test_thinning_loses_no_peak() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[1234] = (1234.0, -50.0)
    thin = thinned(points)
    assert len(thin) < 500
    assert {points[0], points[1234], points[4321], points[-1]} <= set(thin)
    assert thin == sorted(thin)


def test_smoothing_starts_without_bias() -> None:
    assert [y for _, y in smoothed([(float(x), 3.0) for x in range(500)])] == pytest.approx([3.0] * 500)


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_where_the_ticks_say(log: bool) -> None:
    panel = Panel(title="", scalars={}, log=log)
    chart = draw(panel, [Line(legend="", points=[(0.0, 0.01), (50.0, 0.1), (100.0, 1.0)])], last=100, marks=[0, 25])
    ((first, middle, last),) = json.loads(chart.points)
    tops = {tick.label: tick.percent for tick in chart.y_ticks}
    assert [first[2], middle[2], last[2]] == [0, 50, 100]
    assert last[3] == pytest.approx(tops["1"], abs=0.01)
    assert middle[3] == pytest.approx((first[3] + last[3]) / 2, abs=0.01) if log else middle[3] > first[3] - 10
    assert chart.marks == [25]
