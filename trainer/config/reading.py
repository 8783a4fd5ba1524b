"""From a TOML file and overrides to what a configuration is made of, and what is wrong with it, in a line."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeGuard, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainer.config.shipped import located, shipped
from trainer.errors import ConfigError, brief


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds, or a shipped one that is called `path`; ConfigError names it if it cannot be read."""
    try:
        return tomllib.loads(located(path).read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: cannot be read: no such file; shipped by name: {', '.join(shipped())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set what "section.name=value" says in `raw`; ConfigError if it does not say that."""
    key, separator, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not separator or not all([*sections, name]):
        raise ConfigError(f"--set {override}: write it as section.name=value, for example train.global_batch=64")
    table = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    try:
        table[name] = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = text.strip()  # an unquoted string: a path, a span, a name


def explain(model: type[BaseModel], details: ErrorDetails) -> str:
    """One line on what is wrong with a field of `model`, and what would be right."""
    if not details["loc"]:  # fields of several sections that do not go together; the message names them
        return details["msg"].removeprefix("Value error, ")
    *sections, name = [part for part in details["loc"] if isinstance(part, str)]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"])[1:]
    if details["type"] == "extra_forbidden":
        known = _section(model, sections).model_fields
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    if details["type"] == "missing":
        expected = _section(model, sections).model_fields[name].annotation
        return f"{field}: missing section; {_needs(expected)}" if _is_section(expected) else f"{field}: missing"
    if details["type"] == "model_type":
        heading = f"[{field}]" if field.endswith(name) else f"[[{'.'.join([*sections, name])}]]"  # an item of a list
        return f"{field} = {details['input']!r}: should be a section: {heading}"
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if isinstance(details["input"], dict):  # fields that do not go together
        return f"{field}: {message}"
    return f"{field} = {brief(details['input'])}: {message}"


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _needs(section: type[BaseModel]) -> str:
    """What must be said in a section that was left out."""
    required = [name for name, field in section.model_fields.items() if field.is_required()]
    if required:
        return f"it needs {', '.join(required)}"
    try:
        section()
    except ValidationError as error:  # of several fields that are optional, one must be there
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    raise AssertionError(f"{section.__name__} needs nothing, so it should have a default")


def _section(model: type[BaseModel], sections: list[str]) -> type[BaseModel]:
    names = iter(sections)
    for name in names:
        annotation = model.model_fields[name].annotation
        *key, model = get_args(annotation) or (annotation,)  # one, a list of them, or a table of them by name
        if key:
            next(names, None)
    return model
