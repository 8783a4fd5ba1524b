"""Rules by file name on which files of a folder or an archive are images; excluded files are counted by rule."""

import re
from collections.abc import Iterable, Sequence

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".jp2", ".j2k", ".avif", ".npy",
})
SIDECAR_SUFFIXES = frozenset({
    ".txt", ".caption", ".captions", ".tags", ".cls", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".yaml",
    ".yml", ".toml", ".ini", ".cfg", ".md", ".rst", ".html", ".htm", ".url", ".pdf", ".doc", ".docx", ".xls", ".xlsx",
    ".log", ".py", ".sh", ".ipynb", ".mat", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".safetensors", ".db", ".sqlite",
    ".lock", ".md5", ".sha1", ".sha256", ".xmp", ".aae",
})
SIDECAR_NAMES = frozenset({"readme", "license", "licence", "copying", "authors", "changelog"})
MEDIA_SUFFIXES = frozenset({
    ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wav", ".mp3", ".flac", ".ogg", ".m4a",
})
PACKED_SUFFIXES = frozenset({
    ".gz", ".tgz", ".bz2", ".xz", ".zst", ".rar", ".7z", ".arrow", ".h5", ".hdf5", ".lmdb", ".beton", ".rec",
})
BY_PRODUCTS = frozenset({
    "__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler",
    "system volume information", "@eadir", "#recycle", "#snapshot", "@recycle", "@tmp", "lost+found",
})
# fmt: on

# The rules, as printed in the summary.
BY_PRODUCT = "hidden files, thumbnails and trash"
SIDECAR = "labels, captions, metadata and notes"
MEDIA = "videos and sounds"
MASK = "masks and the like beside their images"
PACKED = "archives and databases that are not read in place"
SPECIAL = "pipes and devices"
LINK = "links to folders that are read already"

_IMAGE = rf"(?:{'|'.join(re.escape(suffix) for suffix in sorted(IMAGE_SUFFIXES))})"
_MASK_WORDS = "seg|segm|segmentation|mask|masks|matte|trimap|parsing|depth"
_DOTTED_MASK_WORDS = (
    rf"{_MASK_WORDS}|alpha|normals?|edges?|canny|instances?|semantic|panoptic|annotations?|labels?|disparity|flow|pose"
)
_MASK = re.compile(rf"(.+)(?:[_-](?:{_MASK_WORDS})|\.(?:{_DOTTED_MASK_WORDS})){_IMAGE}", re.IGNORECASE | re.DOTALL)
_MASK_FOLDER = re.compile(
    r"(|.*/)(masks?|trimaps?|segmentations?|segmentation(?:class|object)|annotations?|labels?|depths?)(/.+)",
    re.IGNORECASE | re.DOTALL,
)
_IMAGE_FOLDERS = frozenset({"image", "images", "img", "imgs", "jpegimages", "photos"})


def parts_of(name: str) -> tuple[str, ...]:
    """The parts of a relative path with `/`, like pathlib's but five times as fast: there may be millions."""
    return tuple(part for part in name.split("/") if part not in ("", "."))


def suffix_of(name: str) -> str:
    """Pathlib's suffix of a path with `/`, in lower case."""
    stem, dot, end = name[name.rfind("/") + 1 :].rpartition(".")
    return (dot + end).lower() if stem and end else ""


def stem_of(name: str) -> str:
    """A name without its suffix."""
    return name[: len(name) - len(suffix_of(name))]


def has_image_suffix(name: str) -> bool:
    """Whether the name has the suffix of an image format."""
    return suffix_of(name) in IMAGE_SUFFIXES


def is_by_product(part: str) -> bool:
    """Whether a part of a path was created by a desktop (.DS_Store, Thumbs.db), a NAS (@eaDir) or a disk (lost+found).

    All hidden files count.
    """
    return (part.startswith(".") and part != "..") or part.casefold() in BY_PRODUCTS


def rule_against(name: str) -> str | None:
    """The rule that excludes a file by its own path; None if there is none.

    A name without a suffix, or with an unknown one, is a candidate: its content decides.
    """
    if any(is_by_product(part) for part in parts_of(name)):
        return BY_PRODUCT
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix in SIDECAR_SUFFIXES or (not suffix and name[name.rfind("/") + 1 :].casefold() in SIDECAR_NAMES):
        return SIDECAR
    if suffix in MEDIA_SUFFIXES:
        return MEDIA
    return PACKED if suffix in PACKED_SUFFIXES else None


def masks_among(names: Sequence[str]) -> frozenset[str]:
    """Masks of images among `names`: `0.seg.png`, `0_mask.png` beside `0.jpg`; `masks/0.png` beside `images/0.jpg`."""
    suspects = [name for name in names if _MASK.fullmatch(name) or _MASK_FOLDER.fullmatch(name)]
    if not suspects:
        return frozenset()
    stems = {stem_of(name) for name in names if has_image_suffix(name)}
    folders = {part for name in names for part in parts_of(name) if part.lower() in _IMAGE_FOLDERS}
    return frozenset(name for name in suspects if has_image_suffix(name) and _image_stems(name, folders) & stems)


def _image_stems(mask: str, folders: Iterable[str]) -> set[str]:
    """Possible names, without suffix, of a mask's image."""
    stems = set()
    if match := _MASK.fullmatch(mask):
        stems.add(match[1])
    if match := _MASK_FOLDER.fullmatch(mask):
        stems |= {stem_of(f"{match[1]}{folder}{match[3]}") for folder in folders}
    return stems
