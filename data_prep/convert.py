"""One image as it was found -> the bytes of one member of a shard."""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_prep.images import check_size, decode_upright, faults_are_rejects, open_image, to_mode
from data_prep.recipe import Encoding, Recipe
from data_prep.transforms import TRANSFORMS

SAVE_OPTIONS: dict[Encoding, dict[str, Any]] = {
    "webp": {"lossless": True, "method": 0, "quality": 0},  # still exact: these trade size for speed
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},  # 4:4:4, about 42 dB
}

KEPT_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
EXIF_ORIENTATION = 0x0112
UPRIGHT = 1
PNG_DEPTH_AT = 24  # the bit depth in the IHDR chunk, which is always the first


@dataclass(frozen=True, kw_only=True)
class Member:
    """An encoded image. `width` and `height` are the source's, upright; `kept` says that its bytes are too."""

    data: bytes
    extension: str
    width: int
    height: int
    kept: bool


def convert(found: bytes | Image.Image, recipe: Recipe) -> Member:
    """Turn a file's bytes (or an image) upright, bring it to mode and size, and encode it.

    Under the transform "source", bytes that decode to the wanted pixels by a mere crop are kept. Raises Reject for
    anything that is not wholly and exactly an image.
    """
    if isinstance(found, bytes):
        image = open_image(found, recipe)
        if recipe.keeps_bytes and _can_be_kept(image, found, recipe):
            decode_upright(image, found)  # only to see that it can be
            extension = KEPT_EXTENSIONS[str(image.format)]
            return Member(data=found, extension=extension, width=image.width, height=image.height, kept=True)
        image = decode_upright(image, found)
    else:
        image = found
        check_size(image, recipe)
    width, height = image.size
    extension = recipe.encoding
    data = encode(prepare(image, recipe), recipe.encoding)
    return Member(data=data, extension=extension, width=width, height=height, kept=False)


def prepare(image: Image.Image, recipe: Recipe) -> Image.Image:
    """An upright image -> `recipe.image_size` squared in `recipe.mode`, 8 bits a channel, without metadata."""
    image = TRANSFORMS[recipe.transform](to_mode(image, recipe.mode), recipe.image_size)
    image.info = {}  # or the encoders would write the source's profile and comments into every sample
    return image


def encode(image: Image.Image, encoding: Encoding) -> bytes:
    """The image as one file's bytes; webp and png are lossless."""
    stream = io.BytesIO()
    image.save(stream, encoding, **SAVE_OPTIONS[encoding])
    return stream.getvalue()


def _can_be_kept(image: Image.Image, data: bytes, recipe: Recipe) -> bool:
    """Whether every reader gets the wanted pixels from these bytes by decoding and cropping them."""
    if image.format not in KEPT_EXTENSIONS or min(image.size) != recipe.image_size or image.mode != recipe.mode:
        return False
    if image.format == "PNG" and data[PNG_DEPTH_AT] != 8:
        return False
    with faults_are_rejects(data):
        one_frame = getattr(image, "n_frames", 1) == 1
        upright = image.getexif().get(EXIF_ORIENTATION, UPRIGHT) == UPRIGHT
    return one_frame and upright and not image.has_transparency_data
