"""Images that would cost far more than their pixels: each is read within bounds, or refused."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import hostile_images as make
import pytest
from fuzz_corpus import bounded, corpus
from hostile_images import GIB, MIB, Sparse

from himo.transforms import ImageError, Preprocess

SECONDS = 2
SPARE_MIB, BYTES_PER_PIXEL = 64, 32

# By name: the side of the image in pixels if it is to be read, and what makes the file.
READ: dict[str, tuple[int, Callable[[], bytes | Sparse]]] = {
    "jpeg-tail": (64, lambda: Sparse(make.jpeg(), GIB)),
    "jpeg-comments": (64, lambda: make.jpeg(make.segment(0xFE, bytes(65_533)) * 250)),
    "jpeg-exif": (
        64,
        lambda: make.jpeg(make.segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 250),
    ),
    "jpeg-second-image": (64, lambda: make.jpeg() + make.jpeg() * 20_000),
    "jpeg-scans-4000": (64, lambda: make.jpeg_of_scans(64, 4000)),
    "jpeg-scans-7000": (7000, lambda: make.jpeg_of_scans(7000, 8)),
    "jpeg-progressive-stating-7000": (
        7000,
        lambda: make.jpeg_stating(7000, 0xC2, progressive=True) + b"\xff\xd9",
    ),
    "jpeg-restarts": (512, lambda: make.jpeg(side=512, restart_marker_blocks=1)),
    "png-tail": (64, lambda: Sparse(make.png(), 4 * GIB)),
    "png-text-after-end": (64, lambda: make.png() + make.texts(60)),
    "png-empty-pixels-30000": (64, lambda: make.png_in_pieces(30_000)),
    "png-texts": (64, lambda: make.png(before=make.texts(60))),
    "png-texts-after": (64, lambda: make.png(after=make.texts(60, b"iTXt"))),
    "png-profile": (64, lambda: make.png(before=make.chunk(b"iCCP", b"p\0\0" + make.zeros(GIB)))),
    "png-more-pixels": (64, lambda: make.png(more=GIB)),
    "png-exif": (64, lambda: make.png(before=make.chunk(b"eXIf", bytes(1000)) * 900)),
    "png-frames": (
        64,
        lambda: make.png(
            before=make.chunk(b"acTL", struct.pack(">II", 40_000, 0)),
            after=make.chunk(b"fcTL", bytes(26)) * 40_000,
        ),
    ),
    "png-interlaced-bilevel": (4999, lambda: make.png(4999, 1, 0, 1)),
    "png-interlaced-rgba-16": (3061, lambda: make.png(3061, 16, 6, 1, byte=1)),
    "png-black-rgb-16": (3535, lambda: make.png(3535, 16)),  # decoded twice
    "png-interlaced-black-rgba-16": (2165, lambda: make.png(2165, 16, 6, 1)),
    "png-rgb-7000": (7000, lambda: make.png(7000)),
    "webp-tail": (64, lambda: Sparse(make.webp(64), GIB)),
    "webp-canvas": (5500, lambda: make.webp(5500)),
    "webp-frames": (64, lambda: make.webp(64, frames=40_000)),
    "webp-chunks": (64, lambda: make.webp(64, make.part(b"abcd", b"") * 40_000)),
    "webp-lossless-5500": (5500, lambda: make.riff(make.vp8l(5500))),
    "gif-tail": (64, lambda: Sparse(make.gif(), GIB)),
    "gif-comment": (64, lambda: make.gif(before=b"!\xfe" + make.blocks(1, 40_000))),
    "gif-frames": (64, lambda: make.gif(after=make.gif()[13 + 768 :][:-1] * 20_000)),
    "gif-7000": (7000, lambda: make.gif(7000)),
    "bmp-tail": (64, lambda: Sparse(make.encoded("BMP"), GIB)),
    "bmp-runs-of-one": (999, lambda: make.bmp(999, 999, 1, (b"\1\7" * 999 + b"\0\0") * 999)),
    "bmp-runs-4-bits": (999, lambda: make.bmp(999, 999, 2, (b"\xff\x12" * 4 + b"\0\0") * 999)),
    "ppm-tail": (64, lambda: Sparse(make.encoded("PPM"), GIB)),
    "ppm-maximum-254": (3162, lambda: b"P6 3162 3162 254\n" + bytes(3 * 3162**2)),
    "ppm-maximum-1000": (3162, lambda: b"P6 3162 3162 1000\n" + bytes(6 * 3162**2)),
    "pgm-maximum-1000": (3162, lambda: b"P5 3162 3162 1000\n" + bytes(2 * 3162**2)),
    "pbm-7000": (7000, lambda: b"P4 7000 7000\n" + bytes(875 * 7000)),
    "tiff-tail": (64, lambda: Sparse(make.encoded("TIFF"), GIB)),
    "tiff-same-strip": (
        1000,
        lambda: make.same_strip(10_000, zlib.compress(bytes(MIB // 8)), 8),
    ),
    "tiff-exif": (
        64,
        lambda: make.grey_tiff(
            64, 64, bytes(4096), more={34665: (5, 5_000_000, bytes(40_000_000))}
        ),
    ),
    "tiff-profile": (
        64,
        lambda: make.grey_tiff(64, 64, bytes(4096), more={34675: (7, 30 * MIB, bytes(30 * MIB))}),
    ),
    "tiff-deflate-more": (64, lambda: make.grey_tiff(64, 64, make.zeros(GIB // 2), 8)),
    "tiff-tiles": (1000, lambda: make.tiles(16, 3969)),
    "tiff-cut-directory": (64, lambda: make.grey_tiff(64, 64, bytes(4096))[:-20]),
    "tiff-long-values": (
        64,
        lambda: Sparse(make.grey_tiff(64, 64, bytes(4096), more={320: (3, 2**32 - 1, 8)}), GIB),
    ),
    "tiff-loop": (
        64,
        lambda: make.encoded("TIFF", compression=None)[:-4] + struct.pack("<I", 8),
    ),
}

REFUSED: dict[str, Callable[[], bytes | Sparse]] = {
    "jpeg-no-end": lambda: Sparse(make.jpeg()[:-2], GIB),
    "jpeg-empty-segments": lambda: make.jpeg(make.segment(0xE5) * 2_500_000),
    "jpeg-empty-tables": lambda: make.jpeg(make.segment(0xDB) * 2_500_000),
    "jpeg-fill-bytes": lambda: make.jpeg(b"\xff" * 10 * MIB),
    "jpeg-fill-bytes-in-pixels": lambda: make.jpeg_stating(7000)[:-2] + b"\xff" * 30 * MIB,
    "jpeg-long": lambda: make.jpeg_stating(2000)[:-2] + b"\xff\0" * 20 * MIB,
    "jpeg-junk": lambda: make.jpeg(bytes(10 * MIB)),
    "jpeg-restarts-in-header": lambda: make.jpeg(b"\xff\xd0" * 5 * MIB),
    "jpeg-markers-in-pixels": lambda: make.jpeg(after=b"\xff\x02\0\2" * 2_500_000),
    "jpeg-scans": lambda: make.jpeg_of_scans(2000, 300),
    "jpeg-scans-5000": lambda: make.jpeg_of_scans(16, 5000),
    "jpeg-arithmetic-stating-7000": lambda: make.jpeg_stating(7000, 0xC9) + bytes(MIB),
    "jpeg-lossless-stating-7000": lambda: make.jpeg_stating(7000, 0xC3) + bytes(MIB),
    "jpeg-many-sizes": lambda: make.jpeg(
        make.segment(0xC0, b"\x08" + struct.pack(">HH", 7000, 7000) + bytes(65_000)) * 200
    ),
    "png-empty-chunks": lambda: make.png(before=make.chunk(b"teXt") * 850_000),
    "png-empty-pixels": lambda: make.png_in_pieces(850_000),
    "png-interlaced-7000": lambda: make.png(7000, 8, 2, 1),
    "png-rgba-16": lambda: make.png(5000, 16, 6),
    "png-long-chunk": lambda: Sparse(make.png()[:33] + b"\xff\xff\xff\xffIDAT", 5 * GIB),
    "png-long-text": lambda: Sparse(make.png()[:33] + b"\x7f\xff\xff\xfftEXt", 4 * GIB),
    "webp-90-bytes": lambda: make.webp(7700),
    "webp-canvas-max": lambda: make.webp(1 << 24),
    "webp-lossless": lambda: make.riff(make.vp8l(16_383)),
    "webp-long": lambda: Sparse(make.riff(make.vp8l(), size=GIB), GIB + 8),
    "webp-chunks-1000000": lambda: make.webp(64, make.part(b"abcd", b"") * 1_000_000),
    "webp-long-alpha": lambda: Sparse(
        make.riff(make.canvas(64, 64, 0x10), b"ALPH" + struct.pack("<I", GIB), size=GIB + 100),
        GIB + 108,
    ),
    "gif-comments": lambda: make.gif(before=b"!\xfe" + make.blocks(1, 5_000_000)),
    "gif-extensions": lambda: make.gif(before=b"!\xff\0" * 3_000_000),
    "gif-clear-codes": lambda: make.gif(data=b"\x07" + (b"\xff" + b"\x80" * 255) * 80_000),
    "gif-empty-blocks": lambda: make.gif(before=b"!\xf9\0" * 3_000_000),
    "gif-junk": lambda: make.gif(before=bytes(10 * MIB)),
    "bmp-rle-large": lambda: make.bmp(3162, 3162, 1, b"\1\7" * 10_000_000),
    "bmp-rle-deltas": lambda: make.bmp(999, 999, 1, b"\0\2\0\0" * 2_500_000),
    "bmp-rle-4-bits-large": lambda: make.bmp(7000, 7000, 2, b"\xff\x12" * 200_000),
    "bmp-colours": lambda: make.bmp(64, 64, 0, bytes(64 * 64), 65_536),
    "bmp-header": lambda: Sparse(b"BM" + bytes(12) + b"\xff\xff\xff\x7f" + bytes(40), 3 * GIB),
    "ppm-comment": lambda: b"P6 #" + b"a" * 10 * MIB + b"\n64 64 255\n" + bytes(12_288),
    "ppm-spaces": lambda: b"P6 " + b" " * 10 * MIB + b"64 64 255\n" + bytes(12_288),
    "ppm-cut": lambda: b"P6 7000 7000 65535\n" + bytes(100),
    "tiff-1-row-strips": lambda: make.same_strip(60_000, zlib.compress(bytes(MIB)), 8),
    "tiff-overlapping-strips": lambda: make.same_strip(20_000, bytes(MIB), 5),
    "tiff-progressive-strip": lambda: make.grey_tiff(2000, 2000, make.jpeg_of_scans(2000, 300), 7),
    "tiff-tiles-of-one-pixel": lambda: make.tiles(1, 1_000_000),
    "tiff-lzma": lambda: make.grey_tiff(7000, 7000, bytes(100), 34925),
    "tiff-bits": lambda: make.grey_tiff(6000, 6000, bytes(100), more={258: make.longs(65_535)}),
    "tiff-samples": lambda: make.grey_tiff(
        64, 64, bytes(4096), more={277: make.longs(1_000_000_000)}
    ),
    "tiff-tags": lambda: (
        make.grey_tiff(64, 64, bytes(4096))[:4]
        + struct.pack("<IH", 8, 65_535)
        + struct.pack("<HHII", 256, 4, 1, 64) * 65_535
    ),
    "tiff-padding-of-a-fax": lambda: Sparse(
        make.grey_tiff(64, 64, bytes(100), 3, {258: make.longs(1), 279: make.longs(GIB)}), GIB + MIB
    ),
    "tiff-lzw-noise": lambda: make.grey_tiff(4000, 4000, bytes(range(256)) * 4000, 5),
    "tiff-old-jpeg": lambda: make.grey_tiff(64, 64, make.jpeg(), 6),
}


@pytest.mark.parametrize("case", corpus(READ))
def test_costly_image_is_read_within_its_bounds(
    case: tuple[int, Callable[[], bytes | Sparse]], tmp_path: Path
) -> None:
    side, content = case
    path = tmp_path / "image"
    make.write(path, content())
    with bounded(SECONDS, SPARE_MIB + BYTES_PER_PIXEL * side**2 / MIB):
        pixels = Preprocess(32).read(path)
    assert pixels.shape == (3, 32, 32)


@pytest.mark.parametrize("content", corpus(REFUSED))
def test_image_beyond_the_bounds_is_refused(
    content: Callable[[], bytes | Sparse], tmp_path: Path
) -> None:
    path = tmp_path / "image"
    make.write(path, content())
    with bounded(SECONDS, SPARE_MIB), pytest.raises(ImageError) as caught:
        Preprocess(32).read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and line.isprintable() and len(line) < len(str(path)) + 200
