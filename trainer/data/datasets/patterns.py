"""Brace patterns for shards, "{000..099}.tar": expanded as in bash, with a limit on the number of names."""

import math
import re
from collections.abc import Iterator

from braceexpand import braceexpand

from trainer.errors import ConfigError

MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
_RANGE_OF_ANY_LENGTH = re.compile(r"-?\d+\.\.-?\d+(\.\.-?\d+)?")


def expand(pattern: str) -> list[str]:
    """The names of a pattern, in order. Raises ConfigError for too many, or braces that do not match."""
    try:
        if _count(pattern) > MOST_SHARDS:
            raise ConfigError(f"data.path = {pattern}: stands for more than {MOST_SHARDS:,} shards")
        return list(braceexpand(pattern))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.path = {pattern}: its braces do not match") from error


def _count(pattern: str) -> float:
    """Number of names, computed without expanding; inf where a range's numbers are too long."""
    return math.prod(_choices(group) for group in _split(pattern, at="{}"))


def _choices(group: str) -> float:
    """Number of names of a group in braces: a range, or alternatives."""
    if _RANGE_OF_ANY_LENGTH.fullmatch(group):
        match = _RANGE.fullmatch(group)
        return math.inf if match is None else abs(int(match[2]) - int(match[1])) // max(1, int(match[3] or 1)) + 1
    return sum(map(_count, _split(group, at=",")))


def _split(text: str, *, at: str) -> Iterator[str]:
    """The outermost groups in braces (at "{}"), or the parts between outermost commas (at ",")."""
    depth = start = 0
    for mark in re.finditer(r"\\.|[{},]", text):
        symbol = mark[0]
        depth += (symbol == "{") - (symbol == "}")
        if symbol == "{" and depth == 1 and at == "{}":
            start = mark.end()
        elif symbol == "}" and depth == 0 and at == "{}":
            yield text[start : mark.start()]
        elif symbol == "," and depth == 0 and at == ",":
            yield text[start : mark.start()]
            start = mark.end()
    if at == ",":
        yield text[start:]
