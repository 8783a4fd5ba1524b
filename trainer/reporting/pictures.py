"""Pictures of a run, small enough to lie in a page."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

T = TypeVar("T")
_LARGEST_SIDE = 768
_LARGEST_FILE = 200_000  # bytes; a smaller one is taken as it is


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as a data URI, its size in pixels, and a caption."""

    uri: str
    width: int
    height: int
    caption: str


def embed(captions: Mapping[Path, str]) -> list[Picture]:
    """The PNG files that can be read, each with its caption."""
    embedded = [_embed(path, caption) for path, caption in captions.items()]
    return [picture for picture in embedded if picture is not None]


def _embed(path: Path, caption: str) -> Picture | None:
    """A PNG as it is, or, where it is large, made smaller and a JPEG. None where it cannot be read."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            kind, size = "png", image.size
            if len(content) > _LARGEST_FILE or image.format != "PNG":
                smaller, encoded = image.convert("RGB"), io.BytesIO()
                smaller.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
                smaller.save(encoded, "jpeg", quality=88)
                content, kind, size = encoded.getvalue(), "jpeg", smaller.size
    except (OSError, SyntaxError, Image.DecompressionBombError):  # what Pillow says of a broken file
        return None
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(uri=uri, width=size[0], height=size[1], caption=caption)


def spread(items: list[T], count: int) -> list[T]:
    """At most `count` of them, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[k * (len(items) - 1) // (count - 1)] for k in range(count)]
