"""Greys of more than 8 bits keep their picture, by one rule, or are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from himo.images import eight_bits
from himo.transforms import ImageError, Preprocess, open_image

WIDTH = 64


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def ramp(white: float, type_: str) -> np.ndarray:
    """Two rows of equal steps from 0 to white."""
    return np.tile(np.linspace(0, white, WIDTH).astype(type_), (2, 1))


def tiff(values: np.ndarray, bits: int, kind: int = 1, order: str = ">", **more: int) -> bytes:
    """A TIFF of one strip as other programs write it, its directory behind the pixels.

    more: compression (1 or 8), photometric interpretation, samples and planes.
    """
    height, width = values.shape
    samples = more.get("samples", 1)
    channels = np.repeat(values[..., None], samples, -1)
    if more.get("planes") == 2:
        channels = channels.transpose(2, 0, 1)
    pixels = channels.astype(values.dtype.newbyteorder(order)).tobytes()
    if more.get("compression") == 8:
        pixels = zlib.compress(pixels)
    counts = [len(pixels) // samples] * samples if more.get("planes") == 2 else [len(pixels)]
    tags = {256: [width], 257: [height], 258: [bits] * samples, 259: [more.get("compression", 1)]}
    tags |= {
        262: [more.get("photometric", 1)],
        273: [8 + n * counts[0] for n in range(len(counts))],
    }
    tags |= {277: [samples], 278: [height], 279: counts, 284: [more.get("planes", 1)]}
    tags[339] = [kind] * samples
    values_at = 8 + len(pixels)
    entries, behind = b"", b""
    for tag, numbers in tags.items():
        data = struct.pack(f"{order}{len(numbers)}I", *numbers)
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers))
        entries += data if len(data) == 4 else struct.pack(f"{order}I", values_at + len(behind))
        behind += data if len(data) > 4 else b""
    start = struct.pack(
        f"{order}2sHI", b"MM" if order == ">" else b"II", 42, values_at + len(behind)
    )
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return start + pixels + behind + directory


def pgm(values: np.ndarray, white: int) -> bytes:
    height, width = values.shape
    return b"P5 %d %d %d\n" % (width, height, white) + values.astype(">u2").tobytes()


# The whole range from black to white, whatever the format and the depth.
FULL_RANGE = {
    "png-16": encoded(Image.fromarray(ramp(65_535, "u2")), "PNG"),
    "png-12-of-16": encoded(Image.fromarray(ramp(4095, "u2")), "PNG"),
    "pgm-16": pgm(ramp(65_535, "u2"), 65_535),
    "pgm-1000": pgm(ramp(1000, "u2"), 1000),
    "tiff-16": encoded(Image.fromarray(ramp(65_535, "u2")), "TIFF"),
    "tiff-16-lzw": encoded(Image.fromarray(ramp(65_535, "u2")), "TIFF", compression="tiff_lzw"),
    "tiff-16-big-endian": tiff(ramp(65_535, "u2"), 16),
    "tiff-signed-16": tiff(ramp(16_383, "i2"), 16, 2),
    "tiff-negative-16": tiff(ramp(60_000, "i4").__sub__(30_000).astype("i2"), 16, 2),
    "tiff-32": encoded(Image.fromarray(ramp(65_535, "i4")), "TIFF"),
    "tiff-32-large": encoded(Image.fromarray(ramp(2_000_000_000, "i4")), "TIFF"),
    "tiff-float": encoded(Image.fromarray(ramp(1, "f4")), "TIFF"),
    "tiff-float-255": encoded(Image.fromarray(ramp(255, "f4")), "TIFF"),
    "tiff-float-deflate": encoded(
        Image.fromarray(ramp(1, "f4")), "TIFF", compression="tiff_adobe_deflate"
    ),
    "tiff-float-big-endian": tiff(ramp(1, "f4"), 32, 3),
    "tiff-one-plane": tiff(ramp(1, "f4"), 32, 3, planes=2),
    "tiff-16-big-endian-deflate": tiff(ramp(65_535, "u2"), 16, compression=8),
    "tiff-signed-16-deflate": tiff(ramp(16_383, "i2"), 16, 2, "<", compression=8),
    "tiff-float-negative": encoded(Image.fromarray(ramp(2, "f4") - 1), "TIFF"),
    "tiff-float-huge": encoded(Image.fromarray(ramp(3e38, "f4")), "TIFF"),
}


@pytest.mark.parametrize("name", FULL_RANGE)
def test_ramp_of_a_deep_grey_is_a_ramp_of_8_bits(name: str) -> None:
    image = open_image(FULL_RANGE[name])
    assert image.mode == "L"
    levels = np.asarray(image).astype(int)
    expected = np.tile(np.linspace(0, 255, WIDTH), (2, 1))
    assert np.abs(levels - expected).max() <= 1
    assert levels[0, 0] == 0 and levels[0, -1] == 255
    for mode in ("exact", "fast"):
        pixels = Preprocess(2, mode).read(FULL_RANGE[name])
        assert pixels.shape == (3, 2, 2)
        grey = Preprocess(2, mode).uint8(Image.fromarray(levels.astype(np.uint8)))
        assert pixels.equal(grey)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 255, 128]], "u2"), [0, 255, 128]),  # 8 bits that are kept in 16
        (np.array([[0, 1023, 256]], "u2"), [0, 255, 64]),
        (np.array([[0, 257, 65_535]], "u2"), [0, 1, 255]),
        (np.array([[0, 65_536, 131_072]], "i4"), [0, 128, 255]),  # 127.5, half to even
        (np.array([[-2, 0, 2]], "i4"), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], "f4"), [0, 128, 255]),
        (np.array([[0.0, 1.5, 255.0]], "f4"), [0, 2, 255]),
        (np.array([[np.nan, 1.0, 0.2]], "f4"), [0, 255, 51]),
        (np.array([[-np.inf, 1.0, np.inf]], "f4"), [0, 255, 255]),
        (np.array([[np.nan, -3.0, -1.0]], "f4"), [0, 0, 255]),
        (np.array([[0.0, 0.625, 1.25]], "f4"), [0, 128, 255]),  # a resampling that overshot 1
        (np.array([[0.0, 0.0025, 0.01]], "f4"), [0, 64, 255]),  # of 1, four levels would be left
        (np.array([[0.0, 2.5e-5, 1e-4]], "f4"), [0, 64, 255]),
        (np.array([[0.0, 0.03125, 0.0625]], "f4"), [0, 8, 16]),  # a dark picture of 1
        (np.array([[0, 1, 3, 2, 1]], "u2"), [0, 1, 3, 2, 1]),  # dark, but nothing is lost
        (np.array([[0, 40_000, 65_535]], "u2"), [0, 156, 255]),
    ],
    ids=str,
)
def test_levels_worked_by_hand(values: np.ndarray, expected: list[int]) -> None:
    image = Image.fromarray(values)
    assert np.asarray(eight_bits(image)).tolist() == [expected]
    middle = expected[len(expected) // 2]
    assert Preprocess(1).uint8(image).flatten().tolist() == [middle] * 3


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (0, "u2", 0),
        (7, "u2", 7),
        (40_000, "u2", 156),
        (0, "f4", 0),
        (0.01, "f4", 3),
        (1, "f4", 255),
    ],
)
def test_image_of_one_grey_stays_one(value: float, kind: str, expected: int) -> None:
    pixels = Preprocess(4).uint8(Image.fromarray(np.full((6, 6), value, kind)))
    assert pixels.unique().tolist() == [expected]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[60_020, 60_100]], "u2"), "from 60020 to 60100 would become one grey of 256"),
        (np.array([[0.5, 0.5001]], "f4"), "from 0.5 to 0.5001 would become one grey of 256"),
        (np.full((1, 2), np.nan, "f4"), "no pixel is a finite number"),
        # A hot pixel, and marks for no data.
        (
            np.array([[0, 60, 90, 218, 65_535]], "u2"),
            "all values but 0 and 65535 would become one or",
        ),
        (np.array([[-9999, -9999, 0.1, 0.9, 0.5]], "f4"), "all values but -9999 and 0.9 would"),
        (np.array([[3.4e38, 0.1, 0.9, 0.5]], "f4"), r"all values but 0.1 and 3.4e\+38 would"),
    ],
    ids=["dim-16", "dim-float", "nan", "hot", "no-data-low", "no-data-high"],
)
def test_picture_that_would_become_one_grey_is_refused(values: np.ndarray, message: str) -> None:
    data = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(ImageError, match=message) as caught:
        Preprocess(4).read(data)
    assert caught.value.reason in ("unknown_format", "corrupt")
    with pytest.raises(ImageError, match=message):
        Preprocess(4)(Image.fromarray(values))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (tiff(ramp(65_535, "u2"), 16, order="<", photometric=0), "white at 0"),
        (tiff(ramp(65_535, "u2"), 16, order="<", photometric=0, compression=8), "white at 0"),
        (tiff(ramp(1, "f4"), 32, 3, photometric=0), "white at 0"),
        (tiff(ramp(65_535, "u2"), 16, samples=3, photometric=2, planes=2), "a plane for each"),
        (tiff(ramp(2**32 - 1, "u4"), 32, order="<"), "without a sign"),
        (tiff(ramp(60_000, "i4").__sub__(30_000).astype("i2"), 16, 2, compression=8), "compressed"),
        (tiff(ramp(65_535, "i4"), 32, 2, compression=8), "compressed"),
        (tiff(ramp(1, "f4"), 32, 3, compression=8), "compressed"),
    ],
)
def test_layouts_that_pillow_takes_for_another_picture_are_refused(
    data: bytes, problem: str
) -> None:
    with pytest.raises(ImageError, match=problem) as caught:
        open_image(data)
    assert caught.value.reason == "unknown_format"


def test_other_modes_are_returned_as_they_are() -> None:
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        image = Image.new(mode, (3, 2))
        assert eight_bits(image) is image


def png(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits a channel, with values [rows, columns, channels]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


CHANNELS = np.repeat(ramp(65_535, "u2")[..., None], 4, axis=2)


@pytest.mark.parametrize(
    "data",
    [
        png(CHANNELS[..., :2], 4),
        png(CHANNELS[..., :3], 2),
        png(CHANNELS, 6),
        b"P6 %d 2 65535\n" % WIDTH + CHANNELS[..., :3].astype(">u2").tobytes(),
    ],
    ids=["png-grey-alpha", "png-rgb", "png-rgba", "ppm"],
)
def test_channels_of_16_bits_keep_their_picture(data: bytes) -> None:
    levels = np.asarray(open_image(data).convert("RGB")).astype(int)
    assert np.abs(levels - np.linspace(0, 255, WIDTH)[None, :, None]).max() <= 1


# Black in every channel but that of alpha; of "dark" one value is 1.
BLACK = np.zeros((4, 6, 4), "u2") + np.array([0, 0, 0, 65_280], "u2")
DARK = BLACK.copy()
DARK[2, 3, 0] = 1


def sixteen_bits(values: np.ndarray) -> dict[str, bytes]:
    """The image in each format and order of bytes whose decoder keeps the high ones."""
    rgb, kinds = values[..., :3], {"samples": 3, "photometric": 2}
    return {
        "png-grey-alpha": png(values[..., [0, 3]], 4),
        "png-rgb": png(rgb, 2),
        "png-rgba": png(values, 6),
        "tiff-little": tiff(values[..., 0], 16, order="<", **kinds),
        "tiff-big": tiff(values[..., 0], 16, order=">", **kinds),
        "tiff-little-deflate": tiff(values[..., 0], 16, order="<", compression=8, **kinds),
        "tiff-big-deflate": tiff(values[..., 0], 16, order=">", compression=8, **kinds),
    }


@pytest.mark.parametrize("name", sixteen_bits(BLACK))
def test_black_of_16_bits_is_black_and_what_is_nearly_black_is_refused(name: str) -> None:
    image = open_image(sixteen_bits(BLACK)[name])
    assert not np.asarray(image.convert("RGB")).any()
    with pytest.raises(ImageError, match="channels of 16 bits without a value above 4,095"):
        open_image(sixteen_bits(DARK)[name])


def test_black_that_takes_two_decodings_too_many_is_refused() -> None:
    data = sixteen_bits(BLACK)["png-rgb"]  # of 24 pixels, and twice the usual bits
    open_image(data, max_pixels=2 * 2 * 24)
    with pytest.raises(ImageError, match="more than max_pixels = 95") as caught:
        open_image(data, max_pixels=2 * 2 * 24 - 1)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    "data",
    [
        png(CHANNELS[..., :2] >> np.array([4, 0], "u2"), 4),
        png(CHANNELS[..., :3] >> 4, 2),
        png(CHANNELS >> np.array([8, 8, 8, 0], "u2"), 6),
        tiff(ramp(4095, "u2"), 16, order="<", samples=3, photometric=2),
    ],
    ids=["png-grey-alpha", "png-rgb", "png-rgba", "tiff-rgb"],
)
def test_channels_of_12_bits_kept_in_16_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="channels of 16 bits without a value above 4,095"):
        open_image(data)
