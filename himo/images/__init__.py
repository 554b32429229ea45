"""Image files nobody has looked at: whatever they hold, a decoded image or an `ImageError`.

Each format has a reader of its own structure. It checks the size before memory is allocated, and
hands Pillow no more than the first image, its size and work bounded by `limits`.
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
