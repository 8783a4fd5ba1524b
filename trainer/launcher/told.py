"""What a launcher or a file that it names asks for, in terms of our configuration."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Wish:
    """A value for a field of the configuration, and in whose words it was asked for: "zero_stage = 2"."""

    name: str
    value: Any
    words: str


@dataclass
class Told:
    """All that was asked for. What belongs to a strategy counts only if that strategy is taken."""

    strategy: Wish | None = None
    details: list[Wish] = field(default_factory=list)
    """Fields that belong to `strategy`."""
    wishes: list[Wish] = field(default_factory=list)
    """Other fields."""
    accumulation: Wish | None = None
    """Micro-batches in a step; of which size depends on the configuration."""
    refused: list[str] = field(default_factory=list)
    """What would train another run, each with what would be right."""
    refused_details: list[str] = field(default_factory=list)
    """The same, of `strategy`."""
    unused: list[str] = field(default_factory=list)
    """What is done here in another way, with the same result."""
    cpu: bool = False
    """To train on CPUs even where there are GPUs."""
    lone: bool = False
    """Whether one process was started where several may have been asked for."""


def is_true(text: str | None) -> bool:
    """A switch in an environment variable, as Accelerate reads it."""
    return (text or "").strip().lower() in ("1", "true", "yes", "y", "on", "t")


def number(value: Any) -> float | None:
    """A number, or text that is one; None for anything else, as "auto"."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def positive_whole(value: Any) -> int | None:
    """As `number`, for counts from 1."""
    found = number(value)
    return int(found) if found is not None and found >= 1 and found.is_integer() else None


def is_left_open(value: Any) -> bool:
    """Whether a setting asks for nothing: left out, "auto", or "none"."""
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "auto", "none"))
