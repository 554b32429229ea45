"""open_image on what it must not trust: every file is an image or an ImageError, soon."""

import collections
import io
import os
import pickle
import random
import socket
import struct
import time
import typing
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh_process import run_python
from PIL import Image, ImageFile, PngImagePlugin

from himo.errors import HimoError
from himo.transforms import ImageError, Preprocess, Reason, open_image

REASONS = set(typing.get_args(Reason))
MUTATIONS = 10_000


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_samples() -> dict[str, bytes]:
    """A small valid file of each format, with the parts that parsers stumble over."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:56]
    pixels = np.stack([x * 4, y * 6, (x + y) * 2], axis=-1) + rng.integers(0, 20, (40, 56, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    frames = [image.rotate(angle) for angle in (90, 180)]
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "a" * 500, zip=True)
    texts.add_itxt("title", "b" * 300, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = bytes(range(256)) * 40
    return {
        "jpeg": encoded(image, "JPEG", quality=90, exif=exif, icc_profile=profile),
        "progressive jpeg": encoded(image.convert("CMYK"), "JPEG", progressive=True),
        "png": encoded(image, "PNG", pnginfo=texts, icc_profile=profile, exif=exif),
        "webp": encoded(image, "WEBP", save_all=True, append_images=frames, quality=70),
        "gif": encoded(image, "GIF", save_all=True, append_images=frames, disposal=2),
        "bmp": encoded(image.convert("P"), "BMP"),
        "tiff": encoded(image, "TIFF", save_all=True, append_images=frames, compression="tiff_lzw"),
        "ppm": encoded(image, "PPM"),
    }


SAMPLES = make_samples()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file with a few bytes changed, removed, inserted or repeated, or cut off."""
    result = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(result[: rng.randrange(len(result))])
    reach = len(result) if kind < 3 else min(len(result), 64)  # every other one in the header
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(reach)
        if kind in (1, 3):
            result[at] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
        elif kind in (2, 4):
            result[at] ^= 1 << rng.randrange(8)
        else:
            length = rng.randint(1, 16)
            result[at : at + rng.choice([0, length])] = rng.choice(
                [b"", bytes(length), b"\xff" * length, rng.randbytes(length)]
            )
    return bytes(result)


def reason_of(data: bytes | str | os.PathLike[str], **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(data, **options)
    assert caught.value.reason in REASONS
    assert "\n" not in str(caught.value)
    return caught.value.reason


# What is read


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_is_read_from_bytes_and_from_a_file(name, tmp_path):
    path = tmp_path / "image"  # the content says what it is, not the name
    path.write_bytes(SAMPLES[name])
    image = open_image(path)
    assert image.size == (56, 40)
    expected = Image.open(io.BytesIO(SAMPLES[name]))  # its first frame
    assert image.mode == expected.mode
    assert image.tobytes() == expected.tobytes()
    assert open_image(SAMPLES[name]).tobytes() == image.tobytes()
    assert open_image(bytearray(SAMPLES[name])).tobytes() == image.tobytes()
    link = tmp_path / "link"
    link.symlink_to(path)
    assert open_image(str(link)).tobytes() == image.tobytes()
    assert Preprocess(16).read(link).equal(Preprocess(16).uint8(expected))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_of_every_mode_is_read(mode):
    image = open_image(encoded(Image.new(mode, (9, 5)), "PNG"))
    assert (image.mode, image.size) == ("L" if mode == "I;16" else mode, (9, 5))


# What is refused


@pytest.mark.timeout(20)
def test_path_that_is_no_regular_file_is_refused_without_waiting(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        for path in (fifo, tmp_path, "/dev/null", "/dev/zero", address):
            assert reason_of(path) == "not_a_file", path
    (tmp_path / "link").symlink_to(fifo)
    assert reason_of(tmp_path / "link") == "not_a_file"


@pytest.mark.parametrize(
    "path", ["absent.png", "a\0b.png", "x" * 5000, "absent\n\x1b[31m.png", "dangling", "loop", ""]
)
def test_path_that_cannot_be_opened_is_missing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    assert reason_of(path) == "missing"


@pytest.mark.parametrize(
    "source", [None, 3, ["a.png"], io.BytesIO()], ids=lambda s: type(s).__name__
)
def test_source_of_another_type_is_refused(source):
    with pytest.raises(HimoError, match="expected a path or bytes, got"):
        open_image(source)


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html>not found</html>",
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"P3\n1 1\n255\n0 0 0\n",
        encoded(Image.new("RGB", (8, 8)), "TGA"),
        encoded(Image.new("RGB", (16, 16)), "ICO"),
        encoded(Image.new("RGB", (8, 8)), "EPS"),
        encoded(Image.new("RGB", (8, 8)), "PDF"),
        b"\0",
        b"II+\0\x08\0\0\0",
    ],
    ids=["html", "wav", "text ppm", "tga", "ico", "eps", "pdf", "nul", "bigtiff"],
)
def test_format_that_is_not_on_the_list_is_refused(data):
    assert reason_of(data) == "unknown_format"


def test_empty_file_is_truncated(tmp_path):
    (tmp_path / "empty.jpg").touch()
    assert reason_of(tmp_path / "empty.jpg") == reason_of(b"") == "truncated"


@pytest.mark.parametrize("loads_truncated", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_file_cut_in_half_is_refused(name, loads_truncated, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", loads_truncated)
    data = SAMPLES[name] if name not in ("webp", "gif", "tiff") else single_frame(name)
    reason = reason_of(data[: len(data) // 2])
    # WebP and TIFF keep lengths in their headers, and their libraries say no more than "invalid".
    assert reason in (("truncated", "corrupt") if name in ("webp", "tiff") else ("truncated",))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is loads_truncated


def test_threads_that_open_at_once_refuse_cut_files_and_leave_pillows_setting(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    cut = SAMPLES["png"][: len(SAMPLES["png"]) // 2]
    with ThreadPoolExecutor(8) as pool:
        reasons = set(pool.map(lambda _: reason_of(cut), range(400)))
    assert reasons == {"truncated"} and ImageFile.LOAD_TRUNCATED_IMAGES is True


def single_frame(name: str) -> bytes:
    return encoded(open_image(SAMPLES[name]).convert("RGB"), name.upper())


def test_error_names_the_file_and_survives_a_worker(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(SAMPLES["png"][:100])
    for read in (open_image, Preprocess(8).read):
        with pytest.raises(ImageError, match=r"/cut\.png: ") as caught:
            read(path)
        assert str(caught.value).count("cut.png") == 1
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.reason) == (str(caught.value), caught.value.reason)
    assert type(caught.value)("as a DataLoader raises it again").reason == "corrupt"


# Mutated files (promise G19)


@pytest.mark.slow
def test_mutated_files_are_images_or_image_errors(generator):
    rng = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
    counts: dict[str, collections.Counter[str]] = {n: collections.Counter() for n in SAMPLES}
    slowest, started = 0.0, time.perf_counter()
    preprocess = Preprocess(16)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for index in range(MUTATIONS):
            name = list(SAMPLES)[index % len(SAMPLES)]
            data = mutated(SAMPLES[name], rng)
            start = time.process_time()
            try:
                assert preprocess.read(data).shape == (3, 16, 16)
                outcome = "read"
            except ImageError as error:
                outcome = error.reason
            slowest = max(slowest, time.process_time() - start)
            counts[name][outcome] += 1
    print(f"{MUTATIONS} files in {time.perf_counter() - started:.1f} s, slowest {slowest:.3f} s")
    for name, counter in counts.items():
        print(f"{name:17}", dict(counter.most_common()))
        assert set(counter) <= REASONS | {"read"} and len(counter) >= 3
    assert sum(counter.total() for counter in counts.values()) == MUTATIONS
    assert slowest < 2
    assert not warned


BROKEN_TIFFS = {
    "pixels": lambda data: data[:8] + b"\xff" * 40 + data[48:],
    "directory": lambda data: data[:-60],
    "tags": lambda data: data.replace(struct.pack("<HHI", 282, 5, 1), b"\xff" * 8),
    "samples": lambda data: data.replace(
        struct.pack("<HHII", 277, 3, 1, 3), struct.pack("<HHII", 277, 3, 1, 9)
    ),
    "types": lambda data: data.replace(
        struct.pack("<HHI", 256, 4, 1), struct.pack("<HHI", 256, 2, 9)
    ),
}


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("broken", BROKEN_TIFFS)
def test_broken_tiff_says_nothing_but_its_error(broken, compression, capfd, recwarn):
    # libtiff writes to the descriptor of stderr, and Pillow warns and logs.
    data = encoded(open_image(SAMPLES["bmp"]).convert("RGB"), "TIFF", compression=compression)
    data = BROKEN_TIFFS[broken](data)
    try:
        open_image(data)
    except ImageError as error:
        assert "\n" not in str(error)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


# Bombs (promise G20)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: int | None = None, bilevel: bool = False) -> bytes:
    """A black PNG, RGB or of one bit, complete unless `rows` are fewer than its height."""
    packer = zlib.compressobj(1)
    row = bytes(1 + (-(-width // 8) if bilevel else 3 * width))
    parts = [packer.compress(row) for _ in range(height if rows is None else rows)]
    kind = (1, 0) if bilevel else (8, 2)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *kind, 0, 0, 0))
        + png_chunk(b"IDAT", b"".join(parts) + packer.flush())
        + png_chunk(b"IEND", b"")
    )


def webp(side: int) -> bytes:
    """A lossless WebP of one colour, whose pixels take no bits whatever the size."""
    data = bytearray(encoded(Image.new("RGB", (16, 16), (1, 2, 3)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28
    data[at : at + 4] = (bits | (side - 1) | (side - 1) << 14).to_bytes(4, "little")
    return bytes(data)


def gif(screen: int, frame: int) -> bytes:
    """A GIF with the disposal method for which Pillow allocates the frame in the header."""
    control = b"!\xf9\x04" + bytes([2 << 2, 0, 0, 0]) + b"\0"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", screen, screen, 0, 0, 0)
        + (b"!\xfe\x03abc\0" + control + b",")
        + struct.pack("<HHHHB", 0, 0, frame, frame, 0)
        + b"\x02\x02\x44\x01\0;"
    )


def tiff(side: int, tile: int) -> bytes:
    """A grey TIFF in one deflated tile, which may be larger than the image."""
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(tile)) for _ in range(tile)) + packer.flush()
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile}
    tags |= {324: 8 + 2 + 12 * 10 + 4, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def jpeg_of_scans(side: int, more: int) -> bytes:
    """A progressive JPEG whose last scan comes `more` times more."""
    data = encoded(Image.new("RGB", (side, side), (9, 8, 7)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * more + b"\xff\xd9"


BOMBS: dict[str, typing.Callable[[], bytes]] = {
    "png 9000": lambda: png(9000, 9000),
    "png 13000": lambda: png(13_000, 13_000, rows=200),
    "png 14000": lambda: png(14_000, 14_000, rows=200),
    "png 30000": lambda: png(30_000, 30_000, rows=100),
    "webp 8000": lambda: webp(8000),
    "webp 13000": lambda: webp(13_000),
    "webp 16383": lambda: webp(16_383),
    "gif screen": lambda: gif(9000, 1),
    "gif frame": lambda: gif(1, 9000),
    "gif 65535": lambda: gif(1, 65_535),
    "tiff tile": lambda: tiff(64, 9000),
    "tiff": lambda: tiff(9000, 9008),
    "bmp": lambda: SAMPLES["bmp"][:18] + struct.pack("<ii", 9000, 9000) + SAMPLES["bmp"][26:],
    "ppm": lambda: b"P6 30000 30000 255\n" + bytes(100),
    "jpeg": lambda: SAMPLES["jpeg"].replace(
        b"\x08\x00\x28\x00\x38\x03", b"\x08\xff\xff\xff\xff\x03"
    ),
    "jpeg scans": lambda: jpeg_of_scans(2000, 300),
}


def test_ordinary_files_made_like_the_bombs_are_read():
    assert open_image(png(300, 200)).size == (300, 200)
    assert open_image(webp(300)).size == (300, 300)
    assert open_image(gif(1, 1)).size == (1, 1)
    assert open_image(tiff(60, 64)).size == (60, 60)
    assert open_image(jpeg_of_scans(200, 5)).size == (200, 200)


def test_limit_is_the_number_of_pixels():
    assert open_image(png(100, 50), max_pixels=5000).size == (100, 50)
    assert reason_of(png(100, 51), max_pixels=5000) == "too_large"
    with pytest.raises(ImageError, match="100 x 51 pixels, more than max_pixels = 5,000"):
        open_image(png(100, 51), max_pixels=5000)
    # Neither Pillow's own limit of 89 million pixels nor its warning applies.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(png(14_000, 7000, bilevel=True), max_pixels=10**8)
    assert image.size == (14_000, 7000)


def test_limit_is_on_each_side_too():
    assert open_image(png(65_535, 2)).size == (65_535, 2)
    with pytest.raises(ImageError, match="65536 x 2 pixels, a side of more than 65,535") as caught:
        open_image(png(65_536, 2))
    assert caught.value.reason == "too_large"


REFUSE = """
import sys, time, warnings
from pathlib import Path
from himo.transforms import ImageError, open_image

def peak_mib():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)
    return int(line.split()[1]) / 1024

open_image(Path(sys.argv[1]))
for path in sys.argv[2:]:
    before, start = peak_mib(), time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        try:
            open_image(path)
            reason = "read"
        except ImageError as error:
            reason = error.reason
    seconds = time.perf_counter() - start
    print(Path(path).name, reason, len(caught), peak_mib() - before, seconds, sep="|")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for peak memory")
def test_bombs_are_refused_from_the_header(tmp_path):
    paths = []
    for name, make in BOMBS.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(make())
    (tmp_path / "small").write_bytes(SAMPLES["png"])
    printed = run_python("-c", REFUSE, str(tmp_path / "small"), *map(str, paths))
    lines = [line.split("|") for line in printed.splitlines()]
    assert [line[0] for line in lines] == list(BOMBS)
    growth = 0.0
    for name, reason, warned, mib, seconds in lines:
        growth += float(mib)  # the peak never falls
        assert (reason, warned) == ("too_large", "0"), name
        assert float(seconds) < 2, name
    print(f"peak memory grew by {growth:.1f} MiB over {len(BOMBS)} bombs")
    assert growth <= 64
