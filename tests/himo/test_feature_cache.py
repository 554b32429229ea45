"""Features kept from one `himo eval` to the next: the same result, never those of other data."""

import shutil

import pytest
import torch
from evaluate_cases import IMAGES, Command, write_captions, write_checkpoint, write_prefixes
from PIL import Image

from himo.checkpoint import load, save
from himo.checkpoint.safetensors_files import write_safetensors
from himo.errors import HimoError
from himo.evaluate.feature_cache import FeatureCache
from himo.model import HiMoCLIP


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def captions(tmp_path):
    return write_captions(tmp_path)


@pytest.fixture
def evaluate(checkpoint, tmp_path, capsys):
    return Command(checkpoint, tmp_path, capsys)


@pytest.fixture
def encoded(monkeypatch):
    """How many images and texts the model has encoded."""
    counts = {"images": 0, "texts": 0}
    encode_image, encode_shared = HiMoCLIP.encode_image, HiMoCLIP.encode_shared_text
    encode_text = HiMoCLIP.encode_text

    def images(self, image, **options):
        counts["images"] += len(image)
        return encode_image(self, image, **options)

    def texts(self, text, *more, **options):
        counts["texts"] += len(text)
        return encode_text(self, text, *more, **options)

    def shared(self, tokens, positions, visible, ends):
        counts["texts"] += ends.numel()
        return encode_shared(self, tokens, positions, visible, ends)

    for name, method in (("image", images), ("text", texts), ("shared_text", shared)):
        monkeypatch.setattr(HiMoCLIP, f"encode_{name}", method)
    return counts


def test_the_second_evaluation_encodes_nothing_and_has_the_same_result(
    evaluate, captions, encoded, tmp_path
):
    options = ("--data", captions, "--himo-docci", write_prefixes(captions))
    plain = evaluate(*options).result
    first = evaluate(*options, "--feature-cache", tmp_path / "kept")
    assert first.result == plain
    encoded.update(images=0, texts=0)
    again = evaluate(*options, "--feature-cache", tmp_path / "kept", "--batch-size", 3)
    assert again.result == plain
    assert encoded == {"images": 0, "texts": 0}
    assert again.err.count("features of") == 4  # images and texts of both sets
    assert f"features of {IMAGES} images from {tmp_path / 'kept'}" in again.err


@pytest.mark.slow
def test_a_changed_image_caption_or_checkpoint_is_encoded_anew(
    evaluate, captions, encoded, checkpoint, tmp_path
):
    def differs(**changed):
        encoded.update(images=0, texts=0)
        outcome = evaluate("--data", captions, "--feature-cache", tmp_path / "kept")
        assert outcome.status == 0
        assert {name: count > 0 for name, count in encoded.items()} == changed
        assert outcome.result == evaluate("--data", captions).result

    differs(images=True, texts=True)
    differs(images=False, texts=False)
    Image.new("RGB", (40, 36), "red").save(captions.parent / "3.png")
    differs(images=True, texts=False)
    captions.write_text(captions.read_text().replace("A ", "Some ", 1))
    differs(images=False, texts=True)
    model, _ = load(checkpoint)
    model.visual.proj.data *= 1.5
    save(model, tmp_path / "other.safetensors")
    evaluate.checkpoint = tmp_path / "other.safetensors"
    differs(images=True, texts=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_another_precision_has_other_features(evaluate, captions, encoded, precision, tmp_path):
    options = ("--data", captions, "--feature-cache", tmp_path / "kept")
    evaluate(*options)
    encoded.update(images=0, texts=0)
    assert evaluate(*options, "--precision", precision).status == 0
    assert encoded["images"] == IMAGES


def test_a_damaged_file_and_one_of_other_data_are_refused(evaluate, captions, tmp_path):
    options = ("--data", captions, "--feature-cache", tmp_path / "kept")
    evaluate(*options)
    (images,) = (tmp_path / "kept").glob("images-*")
    (texts,) = (tmp_path / "kept").glob("texts-*")
    whole = images.read_bytes()
    for damage in (whole[:-7], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        images.write_bytes(damage)
        status, result, _, err = evaluate(*options)
        assert (status, result, err.count("\n")) == (2, None, 1)
        assert f"himo: error: {images}: damaged" in err
    shutil.copy(texts, images)
    status, result, _, err = evaluate(*options)
    assert (status, result) == (2, None)
    assert f"{images}: expected features of this model and data; delete it" in err


def test_what_could_not_be_read_is_not_kept(evaluate, captions, tmp_path):
    (captions.parent / "3.png").write_bytes(b"no image")
    options = ("--data", captions, "--feature-cache", tmp_path / "kept", "--allow-missing")
    for _ in range(2):
        status, result, _, _ = evaluate(*options)
        assert (status, result["coverage"]["used"]) == (0, IMAGES - 1)
    assert not list((tmp_path / "kept").glob("images-*"))


def test_a_folder_that_cannot_be_made_is_one_line(evaluate, captions):
    status, result, _, err = evaluate("--data", captions, "--feature-cache", captions)
    assert (status, result) == (2, None)
    assert f"{captions}: cannot be made" in err


def test_features_of_another_shape_are_refused(tmp_path):
    cache = FeatureCache(tmp_path, {"sha256": "0"})
    features = torch.randn(3, 4)
    cache.write("texts", "1", features)
    assert torch.equal(cache.read("texts", "1", (3, 4)), features)
    assert cache.read("texts", "2", (3, 4)) is None
    with pytest.raises(HimoError, match=r"expected float32 features \[2, 4\], got torch.float32"):
        cache.read("texts", "1", (2, 4))
    (path,) = tmp_path.glob("*.safetensors")
    write_safetensors(str(path), {}, {})
    with pytest.raises(HimoError, match="expected features of this model and data"):
        cache.read("texts", "1", (3, 4))
    cache.write("texts", "3", features.fill_(torch.nan))
    assert cache.read("texts", "3", (3, 4)) is None
