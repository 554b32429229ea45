"""The model: what it computes, against other formulas, and what it refuses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clip_cases import SMALL, random_image, random_model, tokens_of_lengths
from torch import Tensor, nn
from torch.nn import functional as F

from himo.errors import HimoError
from himo.layers import Attention, LayerNorm
from himo.model import CONFIGS, KEPT_POSITIONS, CLIPConfig, HiMoCLIP, longest_text

ROUNDING = {"rtol": 1e-4, "atol": 2e-5}  # float32, three blocks, features of size 1


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_torch(causal: bool, generator: torch.Generator) -> None:
    ours = Attention(32, 4, causal)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())  # the same names and shapes
    x = torch.randn(3, 7, 32, generator=generator)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_normalised_on_request(dtype: torch.dtype, generator: torch.Generator) -> None:
    model = random_model(SMALL, generator).set_precision(dtype)
    image, text = random_image(SMALL, 2, generator), tokens_of_lengths(SMALL, [5, 9], generator)
    with torch.no_grad():
        for encode, batch in ((model.encode_image, image), (model.encode_text, text)):
            plain, units = encode(batch), encode(batch, normalize=True)
            assert units.dtype == dtype
            torch.testing.assert_close(units, plain / plain.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_of_half_types_is_computed_in_float32(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    norm = LayerNorm(64)
    x = (100 * torch.randn(5, 64, generator=generator) + 1000).to(dtype)  # squares pass 65504
    for module in (norm, norm.to(dtype)):
        got = module(x)
        assert got.dtype == dtype
        expected = F.layer_norm(x.double(), (64,)).to(dtype)
        torch.testing.assert_close(got, expected)


def test_layer_norm_keeps_float64(generator: torch.Generator) -> None:
    x = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    got = LayerNorm(64).double()(x)
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got, (x - x.mean(-1, True)) / (x.var(-1, False) + 1e-5)[:, None].sqrt()
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Of OpenAI's models (77 text positions), counted in their published files.
    [
        ("ViT-B-32", 151_277_313),
        ("ViT-B-16", 149_620_737),
        ("ViT-L-14", 427_616_513),
        ("ViT-L-14-336", 427_944_193),
    ],
)
def test_named_configurations_have_the_published_number_of_parameters(
    name: str, parameters: int
) -> None:
    config = dataclasses.replace(CONFIGS[name], context_length=77)
    with torch.device("meta"):
        model = HiMoCLIP(config)
    second_table = model.positional_embedding_res.numel()
    assert sum(p.numel() for p in model.parameters()) - second_table == parameters
    assert (config.vision_heads, config.text_heads) == (
        (16, 12) if name.startswith("ViT-L") else (12, 8)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_named_configurations_take_248_tokens_of_clips_vocabulary(name: str) -> None:
    assert (CONFIGS[name].context_length, CONFIGS[name].vocab_size) == (248, 49408)


def test_a_new_model_starts_from_clips_values() -> None:
    model = HiMoCLIP(SMALL)
    width, layers = SMALL.text_width, SMALL.text_layers
    block = model.transformer.resblocks[1]
    for weight, std in [
        (model.token_embedding.weight, 0.02),
        (model.positional_embedding, 0.01),
        (model.text_projection, width**-0.5),
        (model.visual.proj, SMALL.vision_width**-0.5),
        (model.visual.positional_embedding, SMALL.vision_width**-0.5),
        (block.attn.in_proj_weight, width**-0.5),
        (block.attn.out_proj.weight, (width * 2 * layers) ** -0.5),
        (block.mlp.c_fc.weight, (2 * width) ** -0.5),
        (block.mlp.c_proj.weight, (width * 2 * layers) ** -0.5),
    ]:
        # Of n normal values the relative error of the deviation is 1 / sqrt(2 n): five of them.
        assert weight.std().item() == pytest.approx(std, rel=5 / (2 * weight.numel()) ** 0.5)
    assert torch.equal(model.positional_embedding, model.positional_embedding_res)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert not block.attn.in_proj_bias.any()
    assert not any(p.isnan().any() for p in model.parameters())


def test_the_text_tower_runs_to_the_longest_caption_only(generator: torch.Generator) -> None:
    model = random_model(SMALL, generator)
    lengths = [2, 19, 21, 90, 37]
    tokens = tokens_of_lengths(SMALL, lengths, generator)
    seen: list[int] = []
    model.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        got = model.encode_text(tokens)
        padded = model.encode_text(tokens, max_length=248)
        trimmed = model.encode_text(tokens[:, :90].int())
    assert seen == [90, 248, 90]
    torch.testing.assert_close(got, padded, **ROUNDING)
    torch.testing.assert_close(got, trimmed, rtol=0, atol=0)
    for row, length in enumerate(lengths):  # alone, each is as short as it is
        alone = model.encode_text(tokens[row : row + 1])
        torch.testing.assert_close(alone, padded[row : row + 1], **ROUNDING)
        assert seen[-1] == length


def test_gradients_of_the_trimmed_run_are_those_of_the_padded_run(
    generator: torch.Generator,
) -> None:
    model = random_model(SMALL, generator).double()
    tokens = tokens_of_lengths(SMALL, [5, 60], generator)
    weight = torch.randn(2, SMALL.embed_dim, generator=generator, dtype=torch.float64)
    gradients = []
    for max_length in (None, 248):
        model.zero_grad()
        (model.encode_text(tokens, max_length) * weight).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


def test_what_follows_the_end_of_a_text_does_not_matter(generator: torch.Generator) -> None:
    model = random_model(SMALL, generator)
    tokens = tokens_of_lengths(SMALL, [30, 248], generator)
    other = tokens.clone()
    other[0, 30:] = torch.randint(0, SMALL.vocab_size - 2, (218,), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(tokens)[0], model.encode_text(other)[0], rtol=0, atol=0
        )


def test_positions_before_20_are_frozen_and_the_others_trained(generator: torch.Generator) -> None:
    model = random_model(SMALL, generator)
    model.encode_text(tokens_of_lengths(SMALL, [60], generator)).sum().backward()
    assert not model.positional_embedding.requires_grad
    gradient = model.positional_embedding_res.grad
    assert gradient is not None
    used = gradient.abs().sum(dim=1) > 0
    assert used.nonzero().flatten().tolist() == list(range(KEPT_POSITIONS, 60))


@pytest.mark.parametrize("length", [1, 19, 20, 21, 248])
def test_rows_of_the_other_table_are_never_read(length: int, generator: torch.Generator) -> None:
    model = random_model(SMALL, generator)
    tokens = tokens_of_lengths(SMALL, [length], generator)
    with torch.no_grad():
        expected = model.encode_text(tokens)
        model.positional_embedding[KEPT_POSITIONS:] = torch.nan
        model.positional_embedding_res[:KEPT_POSITIONS] = torch.nan
        assert torch.equal(model.encode_text(tokens), expected)


def test_logits_are_scaled_cosines(generator: torch.Generator) -> None:
    model = random_model(SMALL, generator)
    image = random_image(SMALL, 3, generator)
    text = tokens_of_lengths(SMALL, [4, 9], generator)
    with torch.no_grad():
        per_image, per_text = model(image, text)
        expected = F.cosine_similarity(
            model.encode_image(image)[:, None], model.encode_text(text)[None], dim=-1
        )
    torch.testing.assert_close(per_image, model.logit_scale.exp() * expected)
    assert torch.equal(per_text, per_image.T)


def test_gradient_checkpointing_gives_the_same_gradients(generator: torch.Generator) -> None:
    model = random_model(SMALL, generator)
    image = random_image(SMALL, 2, generator)
    text = tokens_of_lengths(SMALL, [4, 9], generator)
    calls: list[str] = []
    for block in (model.visual.transformer.resblocks[0], model.transformer.resblocks[0]):
        block.register_forward_pre_hook(lambda *_: calls.append("block"))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image, text)[0].diagonal().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(calls) == 2 + 4  # each block of the second run once more in the backward pass
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    model.set_grad_checkpointing(True)
    with torch.no_grad():
        model(image, text)
    assert len(calls) == 8  # nothing is recomputed without a backward pass


@pytest.mark.parametrize(
    ("lock", "trained"),
    [
        (HiMoCLIP.lock_image_tower, lambda name: not name.startswith("visual.")),
        (HiMoCLIP.lock_text_tower, lambda n: n.startswith("visual.") or n == "logit_scale"),
    ],
)
def test_locking_a_tower_freezes_all_of_it(
    lock: Callable[[HiMoCLIP], None], trained: Callable[[str], bool]
) -> None:
    model = HiMoCLIP(SMALL)
    lock(model)
    for name, parameter in model.named_parameters():
        expected = trained(name) and name != "positional_embedding"
        assert parameter.requires_grad == expected, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_norms_and_embeddings(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    model = random_model(SMALL, generator)
    image = random_image(SMALL, 2, generator)
    text = tokens_of_lengths(SMALL, [4, 90], generator)
    with torch.no_grad():
        expected = F.normalize(model.encode_image(image)), F.normalize(model.encode_text(text))
        assert model.set_precision(dtype) is model
        got = model.encode_image(image), model.encode_text(text)
    half = {name for name, p in model.named_parameters() if p.dtype == dtype}
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert len(half) + len(kept) == len(list(model.parameters()))
    assert {n for n in kept if "ln_" not in n} == {
        "logit_scale",
        "positional_embedding",
        "positional_embedding_res",
        "token_embedding.weight",
        "visual.class_embedding",
        "visual.positional_embedding",
    }
    for features, reference in zip(got, expected, strict=True):
        assert features.dtype == model.dtype == dtype
        cosine = F.cosine_similarity(features.float(), reference)
        assert cosine.min() > 1 - 32 * torch.finfo(dtype).eps
    assert model(image, text)[0].dtype == dtype


def test_double_precision_is_double_throughout(generator: torch.Generator) -> None:
    model = random_model(SMALL, generator).set_precision(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.encode_text(tokens_of_lengths(SMALL, [4], generator)).dtype == torch.float64


def test_empty_batches_have_empty_features() -> None:
    model = HiMoCLIP(SMALL)
    assert model.encode_image(torch.zeros(0, 3, 32, 32)).shape == (0, 48)
    assert model.encode_text(torch.zeros(0, 248, dtype=torch.int64)).shape == (0, 48)


def test_the_longest_text_counts_its_end(generator: torch.Generator) -> None:
    assert longest_text(tokens_of_lengths(SMALL, [3, 17, 5], generator)) == 17
    assert longest_text(torch.zeros(0, 248, dtype=torch.int64)) == 1


def _text(**changes: Any) -> Callable[[HiMoCLIP], Tensor]:
    tokens = torch.ones(2, 9, dtype=torch.int64)
    tokens[:, 5] = 499
    return lambda model: model.encode_text(changes.get("text", tokens), changes.get("max_length"))


def _image(image: Tensor) -> Callable[[HiMoCLIP], Tensor]:
    return lambda model: model.encode_image(image)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_image(torch.zeros(3, 32, 32)), "of shape [B, 3, 32, 32], got [3, 32, 32]"),
        (_image(torch.zeros(1, 3, 32, 16)), "of shape [B, 3, 32, 32], got [1, 3, 32, 16]"),
        (_image(torch.zeros(1, 1, 32, 32)), "of shape [B, 3, 32, 32], got [1, 1, 32, 32]"),
        (
            _image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
            "of a floating-point dtype, normalised, got torch.uint8",
        ),
        (_text(text=torch.ones(9, dtype=torch.int64)), "[B, L], 1 <= L <= 248, got [9]"),
        (_text(text=torch.ones(1, 249, dtype=torch.int64)), "1 <= L <= 248, got [1, 249]"),
        (_text(text=torch.ones(1, 0, dtype=torch.int64)), "1 <= L <= 248, got [1, 0]"),
        (_text(text=torch.ones(1, 9)), "of dtype int32 or int64, got torch.float32"),
        (_text(text=torch.full((1, 9), 500)), "token ids from 0 to 499, got 500"),
        (_text(text=torch.full((1, 9), -1)), "token ids from 0 to 499, got -1"),
        (_text(max_length=5), "the end of every text and no more than 9 tokens, got 5"),
        (_text(max_length=10), "the end of every text and no more than 9 tokens, got 10"),
        (_text(max_length=0), "the end of every text and no more than 9 tokens, got 0"),
        (
            lambda model: model.set_precision(torch.int8),
            "float16, bfloat16, float32 or float64, got torch.int8",
        ),
    ],
)
def test_a_wrong_input_is_named(call: Callable[[HiMoCLIP], object], message: str) -> None:
    with pytest.raises(HimoError) as error:
        call(HiMoCLIP(SMALL))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("embed_dim", 0, "embed_dim to be an integer from 1 to 1048576, got 0"),
        ("embed_dim", float("nan"), "embed_dim to be an integer from 1 to 1048576, got nan"),
        ("embed_dim", True, "embed_dim to be an integer from 1 to 1048576, got True"),
        ("text_width", "128", "text_width to be an integer from 1 to 1048576, got '128'"),
        ("vocab_size", 10**12, "vocab_size to be an integer from 1 to 1048576, got 1000000000000"),
        ("text_layers", 257, "text_layers to be an integer from 1 to 256, got 257"),
        ("image_resolution", 33, "image_resolution to be a multiple of vision_patch_size 8"),
        ("vision_heads", 3, "vision_heads to divide vision_width 64, got 3"),
        ("text_heads", None, "text_heads to be an integer from 1 to 1048576, got None"),
    ],
)
def test_an_impossible_configuration_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(HimoError) as error:
        CLIPConfig.from_dict({**SMALL.to_dict(), field: value})
    assert message in str(error.value)


def test_a_configuration_is_what_its_dictionary_says() -> None:
    values = SMALL.to_dict()
    assert CLIPConfig.from_dict(values) == SMALL
    assert (SMALL.vision_heads, SMALL.text_heads) == (1, 2)
    with pytest.raises(HimoError, match="has unknown pooling"):
        CLIPConfig.from_dict({**values, "pooling": 1})
    with pytest.raises(HimoError, match="lacks text_width"):
        CLIPConfig.from_dict({k: v for k, v in values.items() if k != "text_width"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_features_on_cuda_are_those_on_the_cpu(generator: torch.Generator) -> None:
    model = random_model(SMALL, generator)
    image = random_image(SMALL, 3, generator)
    text = tokens_of_lengths(SMALL, [4, 90], generator)
    with torch.no_grad():
        expected = model.encode_image(image), model.encode_text(text)
        model = model.cuda()
        got = model.encode_image(image.cuda()), model.encode_text(text.cuda(), longest_text(text))
    for features, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(features.cpu(), reference, rtol=1e-3, atol=1e-4)
