"""Sections whose class depends on their field `kind`: a backbone's in [model], a family's in [diffusion]."""

import difflib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from trainer.config.section import Section
from trainer.errors import ConfigError, brief

S = TypeVar("S", bound=Section)


class Kinds(Generic[S]):
    """The sections that one field of the configuration may hold, by kind; the first kind is the default.

    name: the field's; base: the class of all its sections.
    """

    def __init__(self, name: str, base: type[S], *sections: type[S]) -> None:
        self.name = name
        self.base = base
        self._sections: dict[str, type[S]] = {}
        for section in sections:
            self.add(section)

    def add(self, section: type[S]) -> str:
        """Make a section known; returns its kind, the default of its field `kind`. ValueError where that is taken."""
        kind = section.model_fields["kind"].default
        if not isinstance(kind, str) or kind in self._sections:
            raise ValueError(f"{self.name}.kind = {kind!r}: should be the name of a new kind")
        self._sections[kind] = section
        return kind

    def __iter__(self) -> Iterator[type[S]]:
        return iter(self._sections.values())

    def of(self, kind: Any) -> type[S]:
        """The section of that kind, None for the default.

        A kind that is not known here may be one of another installed package: an entry point of the group
        "ddpm_trainer.kinds" that has its name is loaded, and should register it. Raises ConfigError where none does.
        """
        if kind is None:
            return next(iter(self))
        if isinstance(kind, str) and kind not in self._sections:
            for extension in entry_points(group="ddpm_trainer.kinds", name=kind):
                extension.load()
        if isinstance(kind, str) and kind in self._sections:
            return self._sections[kind]
        nearest = difflib.get_close_matches(str(kind), self._sections, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(self._sections)}"
        raise ConfigError(f"{self.name}.kind = {brief(kind)}: unknown kind; {hint}")
