"""A checkpoint's settings are used, or refused by name, and a note says which are missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_cases import SMALL, random_image, random_model, tokens_of_lengths
from PIL import Image
from safetensors.torch import load_file, save_file

from himo import checkpoint
from himo.checkpoint import configuration_fields
from himo.checkpoint.configurations import (
    hf_config,
    hf_preprocessor_config,
    of_open_clip,
    open_clip_config,
)
from himo.checkpoint.layouts import from_himo
from himo.cli import main
from himo.clip_config import MEAN, STD, CLIPConfig
from himo.config import TrainConfig
from himo.errors import HimoError
from himo.model import HiMoCLIP
from himo.objective import Towers
from himo.tokenizer import read_symbols, tokenize
from himo.train import build_model
from himo.transforms import Preprocess

CLIP = CLIPConfig.from_dict({**SMALL.to_dict(), "context_length": 77})
# One of each thing that no shape tells, none as himo would assume it.
OTHER = CLIPConfig.from_dict(
    CLIP.to_dict()
    | {"vision_heads": 4, "text_heads": 8, "activation": "gelu", "image_mean": [0.5, 0.4, 0.3]}
    | {"image_std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
)
NAMES = {
    "hf": ("config.json", "model.safetensors"),
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
}


def directory(path: Path, model: HiMoCLIP, layout: str, suffix: str = ".safetensors") -> Path:
    """A directory as Hugging Face or open_clip writes it: nothing in it is himo's."""
    path.mkdir()
    config, weights = NAMES[layout]
    content = hf_config(model.config) if layout == "hf" else open_clip_config(model.config)
    (path / config).write_text(json.dumps(content))
    if layout == "hf":
        processor = hf_preprocessor_config(model.config)
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    state = from_himo(model.state_dict(), layout)
    if suffix == ".safetensors":
        save_file(state, path / weights, {"format": "pt"})
    else:
        name = "pytorch_model.bin" if layout == "hf" else "open_clip_pytorch_model.bin"
        torch.save(state, path / name)
    return path


def edited(path: Path, *keys: str, value: Any) -> None:
    """Sets config[keys[0]][keys[1]]... of a JSON file."""
    content = json.loads(path.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(content))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(HimoError) as error:
        checkpoint.load(path, **options)
    return str(error.value)


def assert_same_features(got: HiMoCLIP, expected: HiMoCLIP, generator: torch.Generator) -> None:
    image = random_image(expected.config, 2, generator)
    text = tokens_of_lengths(expected.config, [5, 20], generator)
    with torch.no_grad():
        assert torch.equal(got.encode_image(image), expected.encode_image(image))
        assert torch.equal(got.encode_text(text), expected.encode_text(text))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", ["hf", "open_clip"])
def test_a_directory_states_all_and_so_does_a_file_of_it(
    layout: str,
    suffix: str,
    tmp_path: Path,
    generator: torch.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = random_model(OTHER, generator)
    path = directory(tmp_path / "model", model, layout, suffix)
    weights = next(file for file in path.iterdir() if file.suffix == suffix)
    for place in (path, weights):
        loaded, preprocess = checkpoint.load(place)
        assert loaded.config == OTHER
        assert preprocess == Preprocess.of(OTHER)
        assert_same_features(loaded, model, generator)
        assert "does not state" not in capsys.readouterr().err


def test_an_epoch_beside_a_configuration_of_open_clip_has_it(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_model(OTHER, generator)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(open_clip_config(OTHER)))
    named = {f"module.{n}": t for n, t in from_himo(model.state_dict(), "open_clip").items()}
    torch.save({"epoch": 3, "state_dict": named}, tmp_path / "epoch_3.pt")
    assert checkpoint.load(tmp_path / "epoch_3.pt")[0].config == OTHER
    edited(tmp_path / "open_clip_config.json", "model_cfg", "vision_cfg", "width", value=128)
    message = refusal(tmp_path / "epoch_3.pt")
    assert "its configuration has vision_width 128, its tensors have 64" in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("layout", ["himo", "hf", "open_clip"])
def test_what_a_bare_file_does_not_state_is_said_and_may_be_given(
    layout: str,
    suffix: str,
    tmp_path: Path,
    generator: torch.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = random_model(OTHER, generator)
    path = tmp_path / f"bare{suffix}"
    state = from_himo(model.state_dict(), layout)
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    assumed, preprocess = checkpoint.load(path)
    assert (assumed.config.vision_heads, assumed.config.text_heads) == (1, 2)
    assert (assumed.config.activation, preprocess) == ("quick_gelu", Preprocess(32))
    lines = [line for line in capsys.readouterr().err.splitlines() if "does not state" in line]
    assert lines == [
        f"himo: note: {path} does not state its heads (assumed: one for 64 channels), "
        "activation (quick_gelu), preprocessing (CLIP's)"
    ]
    given, _ = checkpoint.load(path, activation="gelu", vision_heads=4, text_heads=8)
    assert_same_features(given, model, generator)
    assert "does not state its preprocessing (CLIP's)" in capsys.readouterr().err
    checkpoint.convert(path, tmp_path / "b.safetensors", activation="gelu", vision_heads=4)
    converted = checkpoint.load(tmp_path / "b.safetensors")[0].config
    assert (converted.activation, converted.vision_heads, converted.text_heads) == ("gelu", 4, 2)
    assert "activation to be quick_gelu or gelu, got 'relu'" in refusal(path, activation="relu")
    assert "vision_heads to divide vision_width 64, got 5" in refusal(path, vision_heads=5)


def test_what_is_given_may_not_differ_from_what_is_stated(
    tmp_path: Path, generator: torch.Generator
) -> None:
    path = directory(tmp_path / "hf", random_model(CLIP, generator), "hf")
    checkpoint.load(path, activation="quick_gelu", vision_heads=1)
    message = refusal(path, activation="gelu")
    assert message == f"{path}: activation is 'quick_gelu', but 'gelu' in what was given"
    assert "vision_heads is 1, but 2 in what was given" in refusal(path, vision_heads=2)


def test_a_file_of_himo_states_all(tmp_path: Path, generator: torch.Generator) -> None:
    model = random_model(OTHER, generator)
    checkpoint.save(model, tmp_path / "a.safetensors")
    loaded, preprocess = checkpoint.load(tmp_path / "a.safetensors")
    assert (loaded.config, preprocess) == (OTHER, Preprocess.of(OTHER))
    for layout in ("hf", "open_clip"):
        checkpoint.convert(tmp_path / "a.safetensors", tmp_path / layout, layout)
        assert checkpoint.load(tmp_path / layout)[0].config == OTHER
        # And where another program has written the weights again:
        weights = tmp_path / layout / NAMES[layout][1]
        save_file(load_file(weights), weights, {"format": "pt"})
        assert checkpoint.load(tmp_path / layout)[0].config == OTHER


def test_a_file_of_himo_from_before_has_clips_activation_and_preprocessing() -> None:
    known = {k: v for k, v in CLIP.to_dict().items() if k not in ("activation", "resize_mode")}
    known = {k: v for k, v in known.items() if not k.startswith(("image_m", "image_s", "inter"))}
    assert CLIPConfig.from_dict(known) == CLIP


# Fields of open_clip 3.3.0, with a value that changes what a model computes.
OPEN_CLIP_FIELDS = {
    "vision_cfg": {
        "mlp_ratio": 3.0, "ls_init_value": 0.1, "attentional_pool": True, "no_ln_pre": True,
        "pos_embed_type": "sin_cos_2d", "final_ln_after_pool": True, "pool_type": "avg",
        "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6},
        "block_type": "custom", "qk_norm": True, "scaled_cosine_attn": True, "scale_heads": True,
        "scale_attn_inner": True, "scale_attn": True, "scale_fc": True,
        "timm_model_name": "vit_base", "not_yet_known": 1,
    },
    "text_cfg": {
        "hf_tokenizer_name": "bert-base-uncased", "tokenizer_mode": "whole",
        "tokenizer_kwargs": {"clean": "canonicalize"}, "mlp_ratio": 3.0, "ls_init_value": 0.1,
        "embed_cls": True, "no_causal_mask": True, "final_ln_after_pool": True,
        "pool_type": "last", "proj_bias": True, "proj_type": "none",
        "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}, "qk_norm": True,
        "hf_model_name": "roberta-base", "not_yet_known": "x" * 10_000,
    },
    "preprocess_cfg": {
        "size": 48, "mode": "L", "interpolation": "nearest", "resize_mode": "longest",
        "mean": [0.5, 0.5], "std": [0.0, 0.5, 0.5], "not_yet_known": [1, 2],
    },
}  # fmt: skip
# The same fields at the values with which open_clip computes what himo does.
OPEN_CLIP_DEFAULTS = {
    "vision_cfg": {
        "mlp_ratio": 4.0, "ls_init_value": None, "patch_dropout": 0.5, "attentional_pool": False,
        "attn_pooler_queries": 256, "attn_pooler_heads": 8, "no_ln_pre": False,
        "pos_embed_type": "learnable", "final_ln_after_pool": False, "pool_type": "tok",
        "output_tokens": False, "act_kwargs": None, "norm_kwargs": None, "block_type": None,
        "qk_norm": False, "scale_fc": False, "timm_model_name": None, "timm_pool": "avg",
        "timm_drop": 0.0, "image_size": [32, 32], "not_yet_known": None,
    },
    "text_cfg": {
        "hf_tokenizer_name": None, "tokenizer_mode": None, "tokenizer_kwargs": None,
        "mlp_ratio": 4, "embed_cls": False, "pad_id": 0, "eos_id": 2, "no_causal_mask": False,
        "pool_type": "argmax", "proj_bias": False, "proj_type": "linear", "act_kwargs": {},
        "norm_kwargs": {"eps": 1e-05}, "hf_model_name": None, "hf_proj_type": "mlp",
    },
    "preprocess_cfg": {
        "size": [32, 32], "mode": "RGB", "interpolation": "random", "resize_mode": None,
        "fill_color": 0,
    },
}  # fmt: skip


def test_a_field_of_open_clip_is_refused_by_its_name(
    tmp_path: Path, generator: torch.Generator
) -> None:
    path = directory(tmp_path / "oc", random_model(CLIP, generator), "open_clip")
    config = path / NAMES["open_clip"][0]
    plain = config.read_text()
    names = {"size": "image_resolution", "mean": "image_mean", "std": "image_std"}
    for part, fields in OPEN_CLIP_FIELDS.items():
        for field, value in fields.items():
            config.write_text(plain)
            keys = (part, field) if part == "preprocess_cfg" else ("model_cfg", part, field)
            edited(config, *keys, value=value)
            message = refusal(path)
            assert names.get(field, field) in message, (part, field, message)
            assert len(message) < 400 + len(str(path))
    for field, value in {"multimodal_cfg": {}, "init_logit_bias": -10, "new": 1}.items():
        config.write_text(plain)
        edited(config, "model_cfg", field, value=value)
        assert field in refusal(path)
    config.write_text(plain)
    for part, fields in OPEN_CLIP_DEFAULTS.items():
        for field, value in fields.items():
            keys = (part, field) if part == "preprocess_cfg" else ("model_cfg", part, field)
            edited(config, *keys, value=value)
    assert checkpoint.load(path)[0].config == CLIP


HF_FIELDS = {
    "vision_config": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
                      "num_channels": 4, "num_hidden_layers": 3, "not_yet_known": 1,
                      "pruned_heads": {"0": [1]}, "model_type": "siglip_vision_model",
                      "image_size": 64, "patch_size": 4},
    "text_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "eos_token_id": 7,
                    "max_position_embeddings": 64, "vocab_size": 501, "not_yet_known": True,
                    "is_decoder": True, "model_type": "bert", "hidden_size": 64},
    "": {"model_type": "siglip", "architectures": ["CLIPTextModel"], "projection_dim": 512,
         "quantization_config": {"bits": 4}, "text_config_dict": {"hidden_act": "gelu"}},
}  # fmt: skip
PROCESSOR_FIELDS = {
    "do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False,
    "do_convert_rgb": False, "rescale_factor": 1 / 127.5, "resample": 0,
    "size": {"longest_edge": 32}, "crop_size": {"height": 24, "width": 24}, "image_mean": [0.5],
    "image_std": "CLIP", "do_pad": True, "not_yet_known": 1,
}  # fmt: skip


def test_no_field_lists_a_value_twice() -> None:
    tables = [value for name, value in vars(configuration_fields).items() if name.isupper()]
    meanings = [
        values for fields in tables if isinstance(fields, dict) for values in fields.items()
    ]
    assert ("rescale_factor", (1 / 255,)) in meanings
    for field, values in meanings:
        if not isinstance(values, str):
            assert len({json.dumps(value) for value in values}) == len(values), field


def test_a_field_of_hugging_face_is_refused_by_its_name(
    tmp_path: Path, generator: torch.Generator
) -> None:
    path = directory(tmp_path / "hf", random_model(CLIP, generator), "hf")
    config, processor = path / "config.json", path / "preprocessor_config.json"
    plain, images = config.read_text(), processor.read_text()
    names = {
        "num_hidden_layers": "vision_layers", "image_size": "image_resolution",
        "patch_size": "vision_patch_size", "max_position_embeddings": "context_length",
        "vocab_size": "", "hidden_size": "text_width", "projection_dim": "embed_dim",
        "text_config_dict": "hidden_act",
    }  # fmt: skip
    for part, fields in HF_FIELDS.items():
        for field, value in fields.items():
            config.write_text(plain)
            edited(config, *((part, field) if part else (field,)), value=value)
            message = refusal(path)
            assert names.get(field, field) in message, (part, field, message)
    config.write_text(plain)
    for field, value in PROCESSOR_FIELDS.items():
        processor.write_text(images)
        edited(processor, field, value=value)
        message = refusal(path)
        assert field in message, (field, message)
    processor.write_text(images)
    edited(processor, "size", value={"shortest_edge": 64})
    edited(processor, "crop_size", value={"height": 64, "width": 64})
    assert "image_resolution is 64, but 32 in config.json" in refusal(path)
    processor.write_text(images)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert "tokenizer_class to be CLIPTokenizer" in refusal(path)
    (path / "tokenizer_config.json").unlink()
    (path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert "merges.txt: expected the merges of CLIP's tokenizer" in refusal(path)
    (path / "merges.txt").unlink()
    _, ids, merges = read_symbols()
    whole = path / "tokenizer.json"
    for of_clip in (merges, [merge.split(" ") for merge in merges]):
        whole.write_text(json.dumps({"model": {"type": "BPE", "vocab": ids, "merges": of_clip}}))
        checkpoint.load(path)
    for model in ({"type": "BPE", "merges": merges[1:]}, {"type": "WordLevel"}, None, [merges]):
        whole.write_text(json.dumps({"model": model}))
        assert "tokenizer.json: expected the merges of CLIP's tokenizer" in refusal(path)
    whole.write_text(json.dumps({"model": {"merges": [[]] * (1 << 19)}}))
    assert "tokenizer.json: not the JSON expected: more than 524,288 values" in refusal(path)


def test_what_old_and_new_versions_of_transformers_wrote_is_read(
    tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="reads its own defaults")
    path = directory(tmp_path / "hf", random_model(CLIP, generator), "hf")
    processor = path / "preprocessor_config.json"
    # All that a configuration may hold, as old versions wrote it.
    whole = transformers.CLIPConfig(**hf_config(CLIP)).to_dict()
    for tower in ("text_config", "vision_config"):
        whole[tower] |= {"bad_words_ids": None, "num_beams": 1, "temperature": 1.0, "top_k": 50}
    whole["text_config"]["eos_token_id"] = 2  # the highest token
    whole["text_config_dict"] = {"hidden_size": 128}
    (path / "config.json").write_text(json.dumps(whole))
    old = {"size": 32, "crop_size": 32, "resample": 3, "do_center_crop": True, "do_resize": True,
           "do_normalize": True, "feature_extractor_type": "CLIPFeatureExtractor",
           "image_mean": list(MEAN), "image_std": list(STD)}  # fmt: skip
    processor.write_text(json.dumps(old))
    assert checkpoint.load(path)[0].config == CLIP
    processor.unlink()
    (path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    capsys.readouterr()
    assert checkpoint.load(path)[0].config == CLIP
    assert "does not state its preprocessing (CLIP's)" in capsys.readouterr().err
    new = {"processor_class": "CLIPProcessor", "image_processor": hf_preprocessor_config(OTHER)}
    (path / "processor_config.json").write_text(json.dumps(new))
    assert checkpoint.load(path)[1] == Preprocess.of(OTHER)


def test_an_edited_processor_of_himos_own_directory_is_not_ignored(
    tmp_path: Path, generator: torch.Generator
) -> None:
    checkpoint.save(random_model(CLIP, generator), tmp_path / "a.safetensors")
    checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "hf", "hf")
    edited(tmp_path / "hf" / "preprocessor_config.json", "image_mean", value=[0.5, 0.5, 0.5])
    message = refusal(tmp_path / "hf")
    assert "image_mean is [0.5, 0.5, 0.5], but [0.48" in message


def pixels(image: Image.Image, config: CLIPConfig) -> torch.Tensor:
    """The preprocessing of a square picture, computed apart."""
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    side = config.image_resolution
    resized = np.asarray(image.resize((side, side), filters[config.interpolation])) / 255
    return torch.from_numpy((resized - config.image_mean) / config.image_std).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_preprocessing_that_is_stated_is_computed(mode: Any) -> None:
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((90, 60), Image.Resampling.BICUBIC)
    got = Preprocess.of(OTHER, mode)(image)
    # Within one level of 255: torch's resize of `fast` rounds otherwise than Pillow's.
    bound = 1e-5 if mode == "exact" else 1.01 / 255 / min(OTHER.image_std)
    assert (got - pixels(image, OTHER)).abs().max() < bound
    other = pixels(image, CLIPConfig.from_dict(OTHER.to_dict() | {"interpolation": "bicubic"}))
    assert (got - other).abs().max() > 3 * bound
    for name in ("interpolation", "resize_mode"):
        with pytest.raises(HimoError, match=f"expected {name} to be .*, got 'lanczos'"):
            Preprocess(8, **{name: "lanczos"})


def test_a_hugging_face_directory_is_whole(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="opens what is written")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = CLIPConfig.from_dict({**CLIP.to_dict(), "vocab_size": 49408, "text_width": 64})
    model = random_model(config, generator)
    checkpoint.save(model, tmp_path / "a.safetensors")
    checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "hf", "hf")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    texts = ["a cat", "Two dogs of 3 colours, don't they?", "word " * 75]
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (64, 48, 3), dtype=np.uint8))
    inputs = processor(
        text=texts, images=image, return_tensors="pt", padding="max_length", truncation=True
    )
    ours, preprocess = checkpoint.load(tmp_path / "hf")
    assert torch.equal(inputs["pixel_values"][0], preprocess(image))
    tokens = tokenize(texts, 77)
    for theirs_row, row in zip(inputs["input_ids"], tokens, strict=True):
        length = int(row.argmax()) + 1  # what follows the end has no effect
        assert torch.equal(theirs_row[:length], row[:length].long())
    with torch.no_grad():
        output = theirs(**inputs)
        text = torch.nn.functional.normalize(ours.encode_text(tokens), dim=-1)
        vision = torch.nn.functional.normalize(ours.encode_image(preprocess(image)[None]), dim=-1)
    torch.testing.assert_close(output.text_embeds, text, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.image_embeds, vision, rtol=0, atol=1e-6)


@pytest.fixture
def clip_77(tmp_path: Path, generator: torch.Generator) -> Path:
    """A CLIP of 77 positions and CLIP's vocabulary, as open_clip saves one after an epoch."""
    config = CLIPConfig.from_dict({**CLIP.to_dict(), "vocab_size": 49408})
    path = tmp_path / "epoch_1.pt"
    state = from_himo(random_model(config, generator).state_dict(), "open_clip")
    torch.save({"epoch": 1, "state_dict": state}, path)
    return path


LONG = "A dog by the sea, as grey as it is old. " * 10  # of 13 tokens each, and two for all


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    rows = ["filepath\ttitle"]
    for number, caption in enumerate(("A cat. It sleeps.", LONG, "A bird " + LONG.lower())):
        Image.new("RGB", (40, 36), (number, 90, 200)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png\t{caption}")
    (tmp_path / "captions.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path / "captions.tsv"


def test_a_clip_of_77_tokens_is_evaluated_as_itself(
    clip_77: Path, captions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = captions.parent / "eval.json"
    given = ["eval", "--pretrained", str(clip_77), "--data", str(captions), "--device", "cpu"]
    results = {}
    for flags in ((), ("--stretch",)):
        assert main([*given, "--out", str(out), *flags]) == 0
        results[flags] = json.loads(out.read_text()), capsys.readouterr().out
    result, printed = results[()]
    assert result["model"]["config"]["context_length"] == 77
    # The first 6 to 10 sentences of two captions; the tenth is the caption.
    assert result["protocol"]["texts_cut"] == 2 * 5
    assert "10 texts were cut after 77 tokens" in printed
    model, preprocess = checkpoint.load(clip_77)
    curve = next(curve for curve in result["curves"] if curve["image"] == "1.png")
    prefixes = [" ".join(curve["segments"][:k]) for k in range(1, 11)]
    with torch.no_grad():
        image = model.encode_image(preprocess(Image.open(captions.parent / "1.png"))[None])
        texts = model.encode_text(tokenize(prefixes, 77))
        expected = torch.nn.functional.cosine_similarity(image, texts)
    torch.testing.assert_close(torch.tensor(curve["scores"]), expected, rtol=0, atol=1e-5)
    result, printed = results[("--stretch",)]
    assert result["model"]["config"]["context_length"] == 248
    assert result["protocol"]["texts_cut"] == 0 and "were cut" not in printed


def test_a_clip_of_77_tokens_is_explained_as_itself(
    clip_77: Path, captions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, page = str(captions.parent / "1.png"), str(captions.parent / "page.html")
    given = ["explain", image, LONG, "--pretrained", str(clip_77), "--out", page]
    assert main(given) == 0
    assert "5 prefixes are longer than 77 tokens and cut" in capsys.readouterr().err
    assert main([*given, "--stretch", "--activation", "gelu", "--vision-heads", "2"]) == 0
    said = capsys.readouterr().err
    assert "cut" not in said and "does not state its heads (assumed: one for" in said
    assert "activation" not in said


def test_training_stretches_a_clip_of_77_tokens(clip_77: Path) -> None:
    settings = TrainConfig(
        train_data="none", pretrained=str(clip_77), activation="gelu", vision_heads=2
    )
    config = build_model(settings, torch.device("cpu")).config
    assert (config.context_length, config.activation) == (248, "gelu")
    assert (config.vision_heads, config.text_heads) == (2, 2)


def test_a_new_model_takes_no_settings_of_a_checkpoint() -> None:
    for given in ({"activation": "gelu"}, {"vision_heads": 2}, {"text_heads": 2}):
        with pytest.raises(HimoError, match="expected --pretrained beside it"):
            TrainConfig(train_data="none", **given)


def test_a_model_is_trained_on_the_images_that_it_states(generator: torch.Generator) -> None:
    model = random_model(OTHER, generator)
    towers = Towers(model, "fp32")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = tokens_of_lengths(OTHER, [5, 20], generator)
    centre, spread = (torch.tensor(x).view(3, 1, 1) for x in (OTHER.image_mean, OTHER.image_std))
    with torch.no_grad():
        features, _, _ = towers(images, text, 20)
        expected = model.encode_image((images / 255 - centre) / spread)
    torch.testing.assert_close(features, expected)


def test_a_published_model_of_other_towers_is_refused_by_the_field() -> None:
    towers = {
        "timm_model_name": ("vision_cfg", "convnext_base"),
        "hf_model_name": ("text_cfg", "roberta-base"),
        "hf_tokenizer_name": ("text_cfg", "facebook/xlm-v-base"),
    }
    for field, (part, value) in towers.items():
        config = open_clip_config(CLIP)
        config["model_cfg"][part][field] = value
        with pytest.raises(HimoError) as error:
            of_open_clip(config, "config")
        assert str(error.value) == f"config: expected {part}.{field} to be absent, got '{value}'"
