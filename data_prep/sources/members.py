"""What goes with an image of a source: caption, array and second image, which become members of its sample."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from data_prep.format import MEMBERS
from data_prep.sources.base import Wanted, fingerprint_of
from data_prep.sources.rules import MASK, SIDECAR, has_image_suffix, parts_of, stem_of, suffix_of

PAIR = "source"  # the member that `--pair` makes

Place = TypeVar("Place")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Further(Generic[Place]):
    """By a member's name and for each image: where the source has it, its bytes, or None where the image has none."""

    columns: Mapping[str, Sequence[Place | bytes | None]] = field(default_factory=dict)

    @property
    def members(self) -> list[str]:
        """Names of the members that images have, in the order of MEMBERS."""
        return [name for name in MEMBERS if any(entry is not None for entry in self.columns.get(name, ()))]

    def placed(self, place: Callable[[Place], Other]) -> "Further[Other]":
        """The same with other places."""
        return Further(
            {
                name: [entry if entry is None or isinstance(entry, bytes) else place(entry) for entry in column]
                for name, column in self.columns.items()
            }
        )

    def fingerprint(self, facts: Callable[[Place], object]) -> str:
        """Hex sha256 of all entries, with `facts` (JSON values) for a place; empty where there are none."""
        rows = [
            [name, i, entry.hex() if isinstance(entry, bytes) else facts(entry)]
            for name in self.members
            for i, entry in enumerate(self.columns[name])
            if entry is not None
        ]
        return fingerprint_of(rows) if rows else ""

    def part(self, start: int, stop: int) -> "Further[Place]":
        """Of images [start, stop), renumbered from 0."""
        return Further({name: column[start:stop] for name, column in self.columns.items()})

    def read(self, i: int, read: Callable[[Place], bytes]) -> dict[str, bytes]:
        """The members of image `i`, read by `read`."""
        entries = ((name, column[i]) for name, column in self.columns.items())
        return {
            name: entry if isinstance(entry, bytes) else read(entry) for name, entry in entries if entry is not None
        }


class ImagesAlone:
    """A base for sources whose images have nothing but a label."""

    further_fingerprint: ClassVar[str] = ""

    @property
    def members(self) -> Sequence[str]:  # noqa: D102 - see Source
        return ()

    def further(self, i: int) -> dict[str, bytes]:  # noqa: ARG002, D102 - see Source
        return {}


def members_beside(names: Sequence[str], rules: Sequence[str | None], wanted: Wanted) -> dict[str, dict[int, int]]:
    """By a member's name: the position among `names` of each image that has one, and the member's.

    rules: what leaves out each of `names` that is no member, or None. `0.npy` goes with `0.jpg`, and `0.txt` where no
    column of captions is wanted; with `wanted.pair`, `0.PAIR.png`, `0_PAIR.png`, and `PAIR/0.png` beside `X/0.png` or
    beside `0.png`.
    """
    pair = wanted.pair
    pictures = [at for at, name in enumerate(names) if rules[at] in (None, MASK) and has_image_suffix(name)]
    seconds = dict(_second_images(names, rules, pictures, pair)) if pair else {}
    second = set(seconds.values())
    images = [at for at in pictures if rules[at] is None and at not in second]
    drawn = {stem_of(names[at]) for at in images if suffix_of(names[at]) != ".npy"}
    arrays = {at for at in images if suffix_of(names[at]) == ".npy" and stem_of(names[at]) in drawn}
    images = [at for at in images if at not in arrays]
    texts = [at for at, name in enumerate(names) if wanted.caption_column is None and suffix_of(name) == ".txt"]
    found = {
        "txt": {stem_of(names[at]): at for at in texts if rules[at] == SIDECAR},
        "npy": {stem_of(names[at]): at for at in sorted(arrays)},
    }
    beside = {name: {at: of[stem] for at in images if (stem := stem_of(names[at])) in of} for name, of in found.items()}
    return {**beside, PAIR: {at: seconds[at] for at in images if at in seconds}}


def _second_images(
    names: Sequence[str], rules: Sequence[str | None], pictures: Iterable[int], pair: str
) -> Iterator[tuple[int, int]]:
    """(position of an image, position of the second image that goes with it)."""
    by_stem: dict[str, int] = {}
    by_folder: dict[tuple[str, ...], int] = {}
    first = []
    for at in pictures:
        stem = stem_of(names[at])
        parts = parts_of(stem)
        if parts[-1].endswith((f".{pair}", f"_{pair}", f"-{pair}")):
            by_stem[stem[: -len(pair) - 1]] = at
        elif pair in parts[:-1]:
            depth = parts.index(pair)
            by_folder[(*parts[:depth], "", *parts[depth + 1 :])] = at
        elif rules[at] is None:
            first.append((at, stem, parts))
    for at, stem, parts in first:
        places = [(*parts[:depth], "", *parts[depth + skipped :]) for depth in range(len(parts)) for skipped in (1, 0)]
        found = by_stem.get(stem, next((by_folder[place] for place in places if place in by_folder), None))
        if found is not None:
            yield at, found
