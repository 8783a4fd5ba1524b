"""A configuration as people read it: a field a line, with the reason for its value."""

import json
from pathlib import Path
from typing import Any

from trainer.starting.recipe import Setting, Settings


def as_toml(settings: Settings, *, run_dir: Path, data: Path, about: list[str]) -> str:
    """The file's text; `about`: the comment at its head, a line each."""
    head = {"run_dir": Setting(str(run_dir)), "seed": Setting(0)}
    sections = {**settings, "data": {"path": Setting(str(data)), **settings["data"]}}
    parts = ["\n".join(f"# {line}" for line in about), _table(head)]
    parts += [f"[{name}]\n{_table(fields)}" for name, fields in sections.items()]
    return "\n\n".join(parts) + "\n"


def literal(value: Any) -> str:
    """A string, number, boolean or list of them as TOML reads it: as JSON writes it, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _table(fields: dict[str, Setting]) -> str:
    assignments = [f"{name} = {literal(value)}" for name, (value, _) in fields.items()]
    width = max(34, *(len(text) for text in assignments if len(text) < 50), 0)
    lines = (f"{text:<{width}} # {why}" if why else text for text, (_, why) in zip(assignments, fields.values()))
    return "\n".join(lines)
