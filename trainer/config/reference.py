"""The reference of every configuration field, docs/configuration.md, written from the sections' own definitions."""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from trainer.config import Config
from trainer.config.backbones import BACKBONE_SECTIONS
from trainer.config.families import FAMILY_SECTIONS
from trainer.config.section import Section
from trainer.units import Span, parse_seconds, parse_size

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Span: "span"}
_BOUNDS = {
    "gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "allow_inf_nan": "or inf",
    "multiple_of": "multiple of {}", "min_length": "length >= {}", "max_length": "length <= {}",
}  # fmt: skip
_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m trainer.config.reference`: change the definitions in trainer/config, then run it again. -->

A run is one TOML file. Required are `run_dir`, `data.path` (or `[[data.mixture]]`) and `[model]`; all other fields have
defaults. An unknown field is an error that names the nearest known one. `--set section.field=value` sets one field.

| type | how it is written |
|---|---|
| span | training, in optimizer steps or in images: `"800k steps"`, `"51.2M images"` |
| size | in B, kB, MB, GB or TB, or as a number of bytes: `"200 GB"`; bounds are in bytes |
| time | in seconds, minutes or hours: `"10 minutes"`; bounds are in seconds |
| boolean, integer, number, string, list | as TOML has them |
"""


def reference() -> str:
    """The page in Markdown: one table for each section, in the order of the code."""
    return "\n".join([_INTRODUCTION, *_section(Config, "")]).rstrip() + "\n"


def _section(section: type[Section], heading: str) -> Iterator[str]:
    yield f"## {f'`{heading}`' if heading else 'Before the first section'}\n\n{_prose(section.__doc__ or '')}\n"
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    for name, field in section.model_fields.items():
        if not _sections_in(field.annotation):
            kind, meaning = _type(field.annotation, field.metadata), _prose(field.description or "")
            yield f"| `{name}` | {kind} | {_default(field)} | {meaning} |"
    yield ""
    for name, field in section.model_fields.items():
        path = f"{heading.strip('[]')}.{name}".lstrip(".")
        for inner in _sections_in(field.annotation):
            kind = f' kind = "{inner.model_fields["kind"].default}"' if "kind" in inner.model_fields else ""
            forms: dict[Any, str] = {list: f"[[{path}]]", dict: f"[{path}.NAME]"}
            yield from _section(inner, forms.get(get_origin(field.annotation), f"[{path}]{kind}"))


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field holds: its own, one for each kind, those of a list, those of a union."""
    for kinds in (BACKBONE_SECTIONS, FAMILY_SECTIONS):
        if annotation is kinds.base:
            return list(kinds)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _type(annotation: Any, metadata: list[Any]) -> str:
    """A type and its bounds, in the words of the table above."""
    parsers = [part.func for part in metadata if isinstance(part, BeforeValidator)]
    bounds = "".join(f", {bound}" for bound in _bounds(metadata))
    if parse_size in parsers or parse_seconds in parsers:
        return ("size" if parse_size in parsers else "time") + bounds
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    if not get_args(annotation):
        return _TYPES[annotation] + bounds
    inner = FieldInfo.from_annotation(get_args(annotation)[-1 if get_origin(annotation) is dict else 0])
    name = _type(inner.annotation, inner.metadata)
    return {list: f"list ({name})", dict: f"table ({name})"}.get(get_origin(annotation), name) + bounds


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for name, words in _BOUNDS.items():
        for bound in [getattr(part, name) for part in metadata if getattr(part, name, None) is not None]:
            powers = [f"{base}^{n}" for base, least in ((2, 22), (10, 7)) for n in range(least, 64) if bound == base**n]
            yield words.format(*powers or [f"{bound:,}"])


def _default(field: FieldInfo) -> str:
    value, parsers = field.default, [part.func for part in field.metadata if isinstance(part, BeforeValidator)]
    if field.is_required() or value is None:
        return "required" if field.is_required() else "left out"
    if parse_seconds in parsers:
        return f'`"{value / 60:g} minutes"`' if value > 60 else f'`"{value:g} seconds"`'
    if parse_size in parsers and value % 10**9 == 0:
        return f'`"{value / 10**9:g} GB"`'
    return f"`{json.dumps(str(value) if isinstance(value, Span) else value)}`"


def _prose(text: str) -> str:
    """A docstring as a cell of a table, with links to the pages that it names."""
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", line)


def main() -> int:
    """Write the page, or with --check compare it; exit code 1 where it differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not up to date")
    if not parser.parse_args().check:
        _PAGE.write_text(reference())
    elif not _PAGE.is_file() or _PAGE.read_text() != reference():
        print(f"error: {_PAGE}: differs from the code; run python -m trainer.config.reference", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
