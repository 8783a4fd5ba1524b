"""Images of three classes, and networks that take them."""

from pathlib import Path

from PIL import Image

from tests.data_harness import pixels
from tests.data_prep_harness import data_prep
from tests.harness import overrides

CLASSES = 3
LABELLED = overrides(model__classes=CLASSES, model__label_drop=0.3, data__cond='["label"]', model__dropout=0.0)
CONDITIONAL = LABELLED[1::2]
KINDS: dict[str, dict[str, object]] = {
    "ddpm-unet": {},
    "adm-unet": {"model__kind": "adm-unet", "model__heads": 2},
}


def prepare(folder: Path, classes: list[str], images: int = 9) -> Path:
    """8 x 8 colour images in sub-folders by class, in two shards."""
    for number in range(images):
        place = folder / "images" / classes[number % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(place / f"{number:02d}.png")
    options = ["--size", 8, "--workers", 1, "--shard-samples", 5]
    assert data_prep(folder / "images", folder / "shards", *options) == 0
    return folder / "shards"
