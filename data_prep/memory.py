"""The C library's memory allocator, told what a worker does: large images come and go, one after the other."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
KEPT_BYTES = 1 << 30  # more than the largest image that is read leaves behind, with its copies
LARGEST_KEPT = 1 << 25  # bytes; glibc's own limit on 64-bit machines


def keep_freed_memory() -> None:
    """Do not give memory back to the system after each image.

    By default glibc does so whenever twice its largest freed piece lies free, which a decoded photo, its crop and its
    resized copy may or may not reach: then every page is mapped and zeroed anew for the next image, a quarter of the
    time that bringing a JPEG from 1024 to 256 pixels takes. Does nothing where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)
