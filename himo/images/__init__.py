"""Untrusted image files: whatever they hold, the result is a decoded image or an `ImageError`.

Each format has a reader of its structure. It checks the size before memory is allocated, and passes
Pillow only the first image, whose size and work `limits` bounds.
"""

from himo.images.grey import eight_bits
from himo.images.limits import MAX_PIXELS, ImageError, Reason
from himo.images.opening import Source, decode, open_image, source_name

__all__ = [
    "MAX_PIXELS",
    "ImageError",
    "Reason",
    "Source",
    "decode",
    "eight_bits",
    "open_image",
    "source_name",
]
