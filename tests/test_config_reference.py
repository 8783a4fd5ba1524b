"""docs/configuration.md is what the code says of the configuration: whole, and up to date."""

import tomllib
from pathlib import Path

from trainer.config import Config, reference

PAGE = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()


def test_the_page_is_what_the_code_generates() -> None:
    assert reference.reference() == PAGE, "run python -m trainer.config.reference"


def test_every_field_has_a_row_with_its_meaning() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    resolved = MINIMAL.model_dump()
    fields = {name for section in resolved.values() if isinstance(section, dict) for name in section} - {
        "mixture",
        "networks",
    }  # tables of their own
    assert {row[0].strip("`") for row in rows} >= fields | {"run_dir", "seed", "weight"}
    assert [row for row in rows if len(row) != 4 or not row[3].endswith(".")] == []


def test_a_default_can_be_copied_into_a_configuration() -> None:
    """Sections filled with the defaults that the page gives read as they do when left out."""
    copied: dict[str, dict[str, object]] = {"optimizer": {}, "train": {}, "checkpoint": {}, "log": {}}
    section = ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            section = line.strip("# `[]")
        elif line.startswith("| `") and section in copied:
            name, _, default, _ = line.strip("| ").split(" | ")
            if default != "left out":
                copied[section].update(tomllib.loads(f"{name.strip('`')} = {default.strip('`')}"))
    assert all(copied.values())
    assert Config.parse({**RAW, **copied}, source="page") == MINIMAL


RAW = {
    "run_dir": "run",
    "data": {"path": "data"},
    "model": {"image_size": 8, "base_channels": 32, "channel_multipliers": [1], "attention_resolutions": []},
}
MINIMAL = Config.parse(RAW, source="test")
