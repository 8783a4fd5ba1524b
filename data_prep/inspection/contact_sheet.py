"""Contact sheet: a picture of some of a dataset's images, for visual inspection."""

import io
import math

import numpy as np
from PIL import Image

from data_prep.inspection.dataset import Dataset

MAX_IMAGES = 64
MAX_SHEET_SIDE = 2048
GAP = 2
GAP_COLOUR = "white"


def contact_sheet(dataset: Dataset) -> bytes:
    """A PNG of up to 64 samples, evenly spaced over the dataset, in their original size where it fits the sheet.

    Raises InputError where a sample cannot be read.
    """
    samples = dataset.manifest.samples
    chosen = np.unique(np.linspace(0, samples - 1, min(samples, MAX_IMAGES)).astype(int))
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    side = min(dataset.manifest.image_size, MAX_SHEET_SIDE // columns - GAP)
    sheet = Image.new(dataset.manifest.mode, (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP), GAP_COLOUR)
    for place, sample in enumerate(chosen):
        image = dataset.read(int(sample))
        if image.width != side:
            image = image.resize((side, side), Image.Resampling.BOX)
        row, column = divmod(place, columns)
        sheet.paste(image, (column * (side + GAP), row * (side + GAP)))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()
