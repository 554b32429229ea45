"""himo.transforms against recorded outputs of torchvision, and its fast mode against the exact."""

import hashlib
import io
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from himo.errors import HimoError
from himo.transforms import MEAN, STD, ImageError, Preprocess, normalize

# SHA-256 (first 16 digits) of the float32 bytes that torchvision 0.28.0 gives for
# picture(mode, width, height), with torch 2.13.0 and Pillow 13.0.0:
#   Compose([Resize(R, InterpolationMode.BICUBIC), CenterCrop(R), lambda i: i.convert("RGB"),
#            ToTensor(), Normalize(MEAN, STD)])
RECORDED = {  # (mode, width, height, R)
    ("RGB", 640, 427, 224): "77212b65f94847b4",
    ("RGB", 427, 640, 224): "bf46babfcc351c3f",
    ("RGB", 224, 224, 224): "d42a3a3886273a17",
    ("RGB", 225, 224, 224): "d42a3a3886273a17",  # the odd column falls to the right
    ("RGB", 37, 53, 224): "353e3f3ca74fe895",
    ("RGB", 301, 299, 336): "fe55b98e5ab51a6c",
    ("RGB", 96, 64, 64): "58d44f6fb0d0ea78",
    ("RGB", 3, 500, 32): "353ae5239378ed3f",
    ("RGB", 500, 3, 32): "d7ff8e85ba3e4e5b",
    ("RGB", 1, 1, 32): "282cbee8aa7fc9b6",
    ("RGB", 1023, 767, 224): "9b8ea0355b8aab70",
    ("L", 131, 97, 64): "4a9eea40da459529",
    ("LA", 131, 97, 64): "471cba025e5872f5",
    ("P", 131, 97, 64): "9c522e4310f2962d",
    ("RGBA", 131, 97, 64): "80d2a81dfa753f4d",
    ("CMYK", 131, 97, 64): "87777b7618a4f293",
    ("YCbCr", 131, 97, 64): "5ee6f413f7df33ba",
    ("1", 131, 97, 64): "fc5bc5bccfb5bf24",
}


def picture(mode: str, width: int, height: int) -> Image.Image:
    """A picture that is the same everywhere: gradients, edges and noise, made from integers."""
    y, x = np.mgrid[0:height, 0:width].astype(np.uint32)
    noise = (x * 2654435761 + y * 40503 + 12345) ^ ((x * y + 7) * 2246822519)
    channels = [
        (x * (3 + c) + y * (5 - c)) % 256 // 2
        + (noise >> (8 + 4 * c)) % 64
        + 64 * ((x // 9 + c) % 2)
        for c in range(4)
    ]
    pixels = np.stack(channels, axis=-1).astype(np.uint8)
    if mode == "P":
        indexed = Image.frombytes("P", (width, height), pixels[..., 0].tobytes())
        indexed.putpalette([(i * k) % 256 for i in range(256) for k in (7, 13, 29)])
        return indexed
    if mode == "1":
        return Image.fromarray(pixels[..., 0] > 127)
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(
        mode, (width, height), np.ascontiguousarray(pixels[..., :bands]).tobytes()
    )


def smooth_picture(width: int, height: int) -> Image.Image:
    """A picture whose spectrum falls off like a photograph's."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(8):
        side = 2**octave + 1
        planes = rng.normal(size=(3, side, side)).astype(np.float32)
        resized = [
            Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC) for p in planes
        ]
        total += np.stack([np.asarray(plane) for plane in resized], axis=-1) / 1.6**octave
    total = total / total.std() * 50 + 120
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def psnr(result: torch.Tensor, expected: torch.Tensor) -> float:
    error = (result.double() - expected.double()).square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-9))


# Exact


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: "-".join(map(str, case)))
def test_exact_mode_equals_torchvision(case):
    mode, width, height, resolution = case
    image = picture(mode, width, height)
    assert image.mode == mode
    result = Preprocess(resolution)(image)
    assert result.shape == (3, resolution, resolution) and result.dtype == torch.float32
    assert hashlib.sha256(result.numpy().tobytes()).hexdigest()[:16] == RECORDED[case]
    assert image.size == (width, height)


def test_exact_mode_of_a_checkerboard_worked_by_hand():
    # 4 x 2 pixels at resolution 2: nothing to resize, columns 1 and 2 are kept.
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    result = Preprocess(2).uint8(Image.fromarray(pixels))
    assert result.tolist() == pixels[:, 1:3].transpose(2, 0, 1).tolist()


def test_normalize_is_the_formula_per_channel():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    result = normalize(images)
    for channel in range(3):
        expected = (images[0, 0].double() / 255 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(result[1, channel].double(), expected, rtol=1e-6, atol=1e-6)
    assert normalize(images[0]).equal(result[0])


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8)], ids=["float", "last"]
)
def test_normalize_refuses_what_is_not_uint8_with_channels_first(images):
    with pytest.raises(HimoError, match=r"expected uint8 \[..., 3, R, R\], got"):
        normalize(images)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_exif_orientation_is_not_applied(mode):
    # As in CLIP's own preprocessing: Image.open does not apply it.
    image, exif = picture("RGB", 90, 60), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encoded(image, "PNG", exif=exif)
    preprocess = Preprocess(32, mode)
    assert preprocess.read(data).equal(preprocess.uint8(image))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert not preprocess.uint8(turned).equal(preprocess.uint8(image))


# Fast


@pytest.mark.parametrize(
    ("size", "least_psnr"),
    [((640, 427), 60), ((1333, 2000), 50), ((2250, 1500), 50), ((450, 1800), 50), ((100, 80), 60)],
    ids=str,
)
def test_fast_mode_is_close_to_exact_mode(size, least_psnr):
    data = encoded(smooth_picture(*size), "JPEG", quality=90)
    exact, fast = Preprocess(224).read(data), Preprocess(224, "fast").read(data)
    assert fast.shape == (3, 224, 224) and fast.dtype == torch.uint8 and fast.is_contiguous()
    assert psnr(fast, exact) > least_psnr
    assert (fast.int() - exact.int()).abs().max() <= 3


@pytest.mark.parametrize("size", [(1501, 1003), (1799, 1201), (905, 3001)], ids=str)
def test_fast_mode_crops_where_exact_mode_does(size):
    # A ramp of one grey level in four pixels: a shift by one pixel of the result shows.
    ramp = np.arange(size[0])[None, :] / 4 + np.arange(size[1])[:, None] / 8
    data = encoded(Image.fromarray((ramp % 256).astype(np.uint8)), "JPEG", quality=98)
    exact, fast = Preprocess(64).read(data), Preprocess(64, "fast").read(data)
    shifted = exact.roll(1, dims=2)
    errors = [(fast.int() - other.int()).abs().float().median() for other in (exact, shifted)]
    assert errors[0] <= 1 < errors[1]


def test_fast_mode_decodes_fewer_pixels(monkeypatch):
    data = encoded(smooth_picture(1000, 800), "JPEG", quality=90)
    seen = []
    resize = torch.nn.functional.interpolate
    monkeypatch.setattr(
        torch.nn.functional,
        "interpolate",
        lambda pixels, *rest, **options: (
            seen.append(tuple(pixels.shape)) or resize(pixels, *rest, **options)
        ),
    )
    Preprocess(100, "fast").read(data)
    Preprocess(101, "fast").read(data)  # 800 / 4 is less than twice 101
    assert seen == [(1, 3, 200, 250), (1, 3, 400, 500)]


@pytest.mark.parametrize("mode", ["LA", "P", "RGBA", "CMYK", "1"])
def test_fast_mode_takes_other_modes_the_exact_way(mode):
    image = picture(mode, 131, 97)
    assert Preprocess(64, "fast").uint8(image).equal(Preprocess(64).uint8(image))


def test_fast_mode_of_grey_has_three_equal_channels():
    result = Preprocess(64, "fast").uint8(picture("L", 131, 97))
    assert result[0].equal(result[1]) and result[0].equal(result[2])
    assert psnr(result, Preprocess(64).uint8(picture("L", 131, 97))) > 55


def test_image_of_the_caller_is_left_as_it_was():
    data = encoded(smooth_picture(1000, 800), "JPEG")
    image = Image.open(io.BytesIO(data))
    assert Preprocess(64, "fast")(image).shape == (3, 64, 64)
    assert image.size == (1000, 800)


# Errors


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)], ids=str)
def test_narrow_image_is_refused_before_it_is_blown_up(mode, size):
    data = encoded(Image.new("RGB", size), "PNG")
    with pytest.raises(ImageError, match=r"would be resized to .* more than 50,000,000") as caught:
        Preprocess(224, mode).read(data)
    assert caught.value.reason == "too_large"


def test_mode_without_rgb_is_refused():
    with pytest.raises(ImageError, match="mode La cannot become RGB") as caught:
        Preprocess(8)(Image.new("La", (20, 10)))
    assert caught.value.reason == "unknown_format"


def test_image_without_pixels_is_refused():
    with pytest.raises(ImageError, match="0 x 5 pixels"):
        Preprocess(8)(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "resolution to be an integer of at least 1, got 0"),
        ((2.5,), "resolution to be an integer of at least 1, got 2.5"),
        ((224, "Fast"), "mode to be exact or fast, got 'Fast'"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(HimoError, match=message):
        Preprocess(*arguments)


def test_preprocess_can_be_sent_to_a_worker():
    preprocess = Preprocess(224, "fast")
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess
