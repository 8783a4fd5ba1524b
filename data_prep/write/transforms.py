"""Resizing as in published datasets: an image to its square of `size` x `size` pixels.

Each function is named after the work that it reproduces, for 8-bit "RGB" or "L". Where the shorter side is `size`
already, all of them are the same pure crop, which changes no pixel.
"""

from collections.abc import Callable

from PIL import Image

from data_prep.format import center_crop_box
from data_prep.recipe import Transform

Resampling = Image.Resampling
Box = tuple[int, int, int, int]

MOST_PIXELS = 1 << 26  # of an upscaled image: a line of one pixel's width would need gigabytes, most of them cropped


def ddpm(image: Image.Image, size: int) -> Image.Image:
    """DDPM's LSUN and CelebA-HQ, prepared by StyleGAN2's and ProGAN's dataset_tool.py: centre square, then Lanczos."""
    return _resize_square(image, size, Resampling.LANCZOS)


def area(image: Image.Image, size: int) -> Image.Image:
    """Centre square, then the mean of the area under each pixel, like cv2.INTER_AREA."""
    return _resize_square(image, size, Resampling.BOX)


def adm(image: Image.Image, size: int) -> Image.Image:
    """`center_crop_arr` of improved- and guided-diffusion: halved by box filters, then bicubic, then cropped."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    target = round(image.width * scale), round(image.height * scale)
    middle = center_crop_box(*target, size)
    if target[0] * target[1] > MOST_PIXELS:
        return _resize_part(image, target, middle)
    if image.size != target:
        image = image.resize(target, Resampling.BICUBIC)
    return image.crop(middle)


TRANSFORMS: dict[Transform, Callable[[Image.Image, int], Image.Image]] = {
    "ddpm": ddpm,
    "adm": adm,
    "edm": ddpm,  # its dataset_tool.py with `--transform=center-crop` is derived from StyleGAN2's
    "area": area,
    "source": ddpm,  # of images whose bytes cannot be kept
}


def _resize_square(image: Image.Image, size: int, resampling: Resampling) -> Image.Image:
    square = image.crop(center_crop_box(*image.size, min(image.size)))
    return square if square.size == (size, size) else square.resize((size, size), resampling)


def _resize_part(image: Image.Image, target: tuple[int, int], box: Box) -> Image.Image:
    """`image.resize(target).crop(box)`, computing only what the crop keeps.

    Values may differ by 1, and by more where bicubic overshoots black or white between Pillow's two passes.
    """
    per_pixel = image.width / target[0], image.height / target[1]
    left, top, right, bottom = box
    source = left * per_pixel[0], top * per_pixel[1], right * per_pixel[0], bottom * per_pixel[1]
    return image.resize((right - left, bottom - top), Resampling.BICUBIC, box=source)
