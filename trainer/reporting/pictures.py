"""Pictures of a run, small enough to lie in a page."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

_LARGEST_SIDE = 768
_LARGEST_FILE = 200_000  # bytes; a smaller one is taken as it is


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as a data URI, its size in pixels, and a caption."""

    uri: str
    width: int
    height: int
    caption: str


def embed(path: Path, caption: str) -> Picture | None:
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


def spread(paths: list[Path], count: int) -> list[Path]:
    """At most `count` of them, evenly, the first and the last among them."""
    if len(paths) <= count:
        return paths
    return [paths[k * (len(paths) - 1) // (count - 1)] for k in range(count)]
