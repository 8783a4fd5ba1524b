"""The further members of a sample, as they go into its tar."""

from collections.abc import Mapping
from dataclasses import replace

from data_prep.arrays import array_of_npy
from data_prep.errors import Reject
from data_prep.format import MEMBERS, UNLABELLED
from data_prep.recipe import Recipe
from data_prep.sources import Source
from data_prep.write.convert import convert
from data_prep.write.images import faults_are_rejects, open_image

MAX_TEXT_BYTES = 1 << 20


def members_of(source: Source, recipe: Recipe) -> dict[str, int]:
    """`Manifest.members` of this source's dataset; second images get the first one's side, at most the images'."""
    names = [*(["cls"] if source.classes else []), *source.members]
    return {name: _side(source, name, recipe) if MEMBERS[name] == "image" else 0 for name in names}


def _side(source: Source, name: str, recipe: Recipe) -> int:
    for i in range(len(source.names)):
        try:
            found = source.further(i).get(name)
            if found is not None:
                with faults_are_rejects(found):
                    return min(recipe.image_size, *open_image(found, replace(recipe, image_size=1)).size)
        except Reject:
            continue
    return recipe.image_size


def stored(
    found: Mapping[str, bytes], label: int, members: Mapping[str, int], recipe: Recipe
) -> dict[str, tuple[str, bytes]]:
    """Extension and bytes of each further member that the sample has, by its name, in the order of `members`.

    found: the source's files. Raises Reject where one of them is damaged, so that the sample is rejected whole.
    """
    result = {}
    for name, side in members.items():
        data = (b"%d" % label if label != UNLABELLED else None) if name == "cls" else found.get(name)
        if data is None:
            continue
        try:
            extension, content = _encoded(name, data, side, recipe)
        except Reject as reject:
            raise Reject(f"{name}: {reject.reason}", reject.detail) from reject
        if content:
            result[name] = extension, content
    return result


def _encoded(name: str, data: bytes, side: int, recipe: Recipe) -> tuple[str, bytes]:
    match MEMBERS[name]:
        case "image":
            image = convert(data, replace(recipe, image_size=side))
            return f"{name}.{image.extension}", image.data
        case "text":
            return name, _text(data)
        case "array":
            try:
                array_of_npy(data)
            except ValueError as error:
                raise Reject("no array of numbers", str(error)) from error
    return name, data


def _text(data: bytes) -> bytes:
    """The caption without blanks around it; empty where there is none."""
    if len(data) > MAX_TEXT_BYTES:
        raise Reject("file too large", f"{len(data)} bytes")
    try:
        return data.decode("utf-8-sig").strip().encode()
    except UnicodeDecodeError as error:
        raise Reject("not UTF-8", str(error)) from error
