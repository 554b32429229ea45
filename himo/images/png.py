"""PNG: the parts of a file that its decoder needs."""

import io
import struct

from PIL import PngImagePlugin

from himo.images.limits import USUAL_BITS, ImageError, Reader

_NEEDED = (b"PLTE", b"tRNS")
_MAX_NEEDED = 1 << 16  # bytes of one of them
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


def read(reader: Reader) -> PngImagePlugin.PngImageFile:
    """The image of a PNG file, or the default image of an animated one, to be decoded.

    Chunks are read up to the end of the image, except metadata, which may be compressed. All pixels
    are passed on as one chunk, because Pillow reads each chunk in Python.
    """
    before, pixels, after = [reader.exactly(8)], list[bytes](), list[bytes]()
    while len(header := reader.take(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"IDAT":
            pixels.append(reader.take(length))
            reader.skip(4)  # the checksum, which Pillow does not check
            continue
        if kind == b"IHDR":
            chunk = reader.take(length + 4)
            if len(chunk) >= 13:
                _check_header(reader, chunk)
        elif kind == b"IEND":
            after.append(header + reader.take(4))
            break
        elif not kind.isalnum():  # Pillow says so, or takes it as the end
            after.append(header)
            break
        elif kind in _NEEDED and length <= _MAX_NEEDED:
            chunk = reader.take(length + 4)
        else:
            reader.skip(length + 4)
            continue
        (after if pixels else before).append(header + chunk)
    if pixels:
        data = b"".join(pixels)
        before += [struct.pack(">I4s", len(data), b"IDAT"), data]
        after.insert(0, bytes(4))
        pixels.clear()
    return PngImagePlugin.PngImageFile(io.BytesIO(b"".join(before + after)))


def _check_header(reader: Reader, header: bytes) -> None:
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    if colour not in _CHANNELS:
        raise ImageError(f"pixels of type {colour}, which PNG does not have")
    bits = _CHANNELS[colour] * depth
    cost = max(1.0, bits / USUAL_BITS)
    reader.check_pixels(width, height, bits, 2 * cost if interlaced else cost)
