"""Packed captions: the text tower without padding computes what it computes with it."""

import dataclasses
import math

import pytest
import torch
from clip_cases import SMALL, random_model, tokens_of_lengths

from himo.config import TrainConfig
from himo.errors import HimoError
from himo.model import HiMoCLIP, text_lengths
from himo.objective import Objective

LENGTHS = {
    "mixed": [2, 19, 16, 90, 37, 17, 248, 19, 32, 33],
    "one": [40],
    "equal": [21, 21, 21],
    "all of the context": [248, 248],
    "the shortest": [1, 248, 1, 2],
    "rising": list(range(1, 40)),
}


def gradients(model: HiMoCLIP, features: torch.Tensor, weight: torch.Tensor) -> dict:
    model.zero_grad(set_to_none=True)
    (features * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_features_and_gradients_are_those_of_the_padded_run(lengths, recomputed, generator):
    model = random_model(SMALL, generator).double()
    model.set_grad_checkpointing(recomputed)
    tokens = tokens_of_lengths(SMALL, lengths, generator)
    assert text_lengths(tokens) == lengths
    shape = len(lengths), SMALL.embed_dim
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    padded = model.encode_text(tokens, max_length=tokens.shape[1])
    packed = model.encode_text(tokens, lengths=lengths)
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-12)
    expected, got = (gradients(model, features, weight) for features in (padded, packed))
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)


def test_no_more_than_15_tokens_of_a_text_are_padding(generator):
    model = random_model(SMALL, generator)
    seen = []
    model.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    lengths = LENGTHS["mixed"]
    model.encode_text(tokens_of_lengths(SMALL, lengths, generator), lengths=lengths)
    rounded = [min(248, 16 * math.ceil(length / 16)) for length in lengths]
    assert seen == [(sum(rounded), SMALL.text_width)]
    assert sum(rounded) - sum(lengths) <= 15 * len(lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_token_type_packs(dtype, generator):
    model = random_model(SMALL, generator).set_precision(dtype)
    lengths = LENGTHS["mixed"]
    tokens = tokens_of_lengths(SMALL, lengths, generator).int()
    strided = tokens.T.contiguous().T  # columns together
    with torch.no_grad():
        padded = model.encode_text(tokens, normalize=True)
        packed = model.encode_text(strided, lengths=lengths, normalize=True)
        trimmed = model.encode_text(tokens[1:3, :19], lengths=lengths[1:3], normalize=True)
    assert packed.dtype == dtype
    # A few units in the last place of features of size 1, through two blocks.
    close = {"rtol": 0, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(packed, padded, **close)
    torch.testing.assert_close(trimmed, padded[1:3], **close)


def test_what_follows_the_end_of_a_packed_text_does_not_matter(generator):
    model = random_model(SMALL, generator)
    tokens = tokens_of_lengths(SMALL, [5, 30], generator)
    with torch.no_grad():
        before = model.encode_text(tokens, lengths=[5, 30])
        tokens[0, 5:] = 7
        tokens[1, 30:] = 3
        assert torch.equal(model.encode_text(tokens, lengths=[5, 30]), before)


def test_no_texts_are_no_features():
    model = HiMoCLIP(SMALL)
    none = torch.zeros(0, 9, dtype=torch.int64)
    assert text_lengths(none) == []
    assert model.encode_text(none, lengths=[]).shape == (0, SMALL.embed_dim)


@pytest.mark.parametrize("lengths", [[5], [5, 9, 9], [5, 8], [9, 5], [], [0, 9], [5, 300]])
def test_lengths_of_other_texts_are_an_error(lengths, generator):
    tokens = tokens_of_lengths(SMALL, [5, 9], generator)
    with pytest.raises(HimoError, match="encode_text: expected lengths to be those of text"):
        HiMoCLIP(SMALL).encode_text(tokens, lengths=lengths)


@pytest.mark.parametrize("size", [8, 3])  # the whole batch at once, or three at a time
def test_a_packed_step_is_the_padded_step(size, generator):
    settings = TrainConfig(train_data="x", batch_size=8)
    model = random_model(dataclasses.replace(SMALL, text_layers=2), generator)
    lengths = [5, 9, 60, 17, 248, 33, 16, 40]
    tokens = tokens_of_lengths(SMALL, lengths, generator)
    images = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    objective, steps = Objective(model, settings), []
    for packing in (None, lengths):
        model.zero_grad(set_to_none=True)
        loss = objective.backward(images, tokens, 248, size, packing)["loss"]
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        steps.append({"loss": loss.detach(), **grads})
    assert steps[0].keys() == steps[1].keys()
    for name, value in steps[0].items():
        scale = float(value.abs().max())
        torch.testing.assert_close(steps[1][name], value, rtol=0, atol=1e-4 * scale + 1e-7)
