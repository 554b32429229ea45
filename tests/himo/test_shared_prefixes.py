"""Texts that begin alike: their features are those of each text alone, in fewer tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clip_cases import SMALL, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from himo.clip_config import CLIPConfig
from himo.evaluate import Encoder, read_himo_docci
from himo.evaluate.encode import distinct_tokens
from himo.evaluate.shared_prefixes import shared_rows, text_batches
from himo.tokenizer import default_tokenizer, tokenize
from himo.transforms import Preprocess

HIMO_DOCCI = Path(__file__).parents[3] / "shared" / "data" / "himo_docci.jsonl"
CONTEXT, END = 12, 9  # of the drawn texts

# The whole vocabulary, and a context that the longer captions of TEXTS do not fit in.
WORDS = CLIPConfig(**{**vars(SMALL), "vocab_size": 49_408, "context_length": 40})
TEXTS = [
    "A red chair",
    "A red chair, old",  # the end of a text is not the end of the next one's part
    "A red chair, old and worn. It stands in a hall.",
    "A red chair, old and worn. It stands in a hall. " + "A lamp hangs above it. " * 6,
    "A red chair, old and worn. It stands in a hall. " + "A lamp hangs above it. " * 7,  # cut
    "A red chairlift",  # chair is encoded differently
    "A <|endoftext|> of a text, which goes on",
    "A <|endoftext|> of a text, which ends",
    "Another image",
    "",
    "A red chair",  # again
]


def encoder(config, generator, dtype=torch.float32, batch_size=64):
    model = random_model(config, generator).set_precision(dtype)
    return Encoder(model, Preprocess.of(config), batch_size=batch_size, progress=False)


def features(encoder, texts):
    none = torch.empty(0, dtype=torch.int64)
    images = torch.empty(0, encoder.model.config.embed_dim)
    scored = encoder.score_texts(texts, none, none, images, len(texts))
    assert not scored.not_finite.any()
    return scored.features


def each_alone(model, texts):
    tokens, _ = default_tokenizer().encode_cut(texts, model.context_length)
    with torch.no_grad():
        rows = [model.encode_text(torch.from_numpy(row[None].astype("int32"))) for row in tokens]
    return F.normalize(torch.cat(rows).float(), dim=1)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_features_are_those_of_each_text_alone(batch_size, generator):
    apart = encoder(WORDS, generator, batch_size=batch_size)
    found = features(apart, TEXTS)
    torch.testing.assert_close(found, each_alone(apart.model, TEXTS), rtol=0, atol=1e-6)
    assert torch.equal(found[0], found[-1])


def test_in_float64_they_are_so_to_12_digits(generator):
    model = random_model(WORDS, generator).double()
    tokens, _, _ = distinct_tokens(TEXTS, WORDS.context_length)
    for batch in text_batches(tokens, 4):
        texts = tokens[batch.texts]
        alone = [model.encode_text(torch.from_numpy(row[None].astype(np.int32))) for row in texts]
        if batch.sizes is not None:
            rows = shared_rows(texts, batch.sizes)
            found = model.encode_shared_text(*rows.to(torch.device("cpu")))[rows.is_text]
            torch.testing.assert_close(found, torch.cat(alone), rtol=1e-12, atol=1e-12)
    assert any(batch.sizes for batch in text_batches(tokens, 4))


def test_what_begins_alike_is_one_row_and_the_rest_are_texts_alone():
    tokens, row_of_text, _ = distinct_tokens(TEXTS, WORDS.context_length)
    batches = text_batches(tokens, 64)
    groups, alone = [], []
    for batch in batches:
        if batch.sizes is None:
            alone += batch.texts.tolist()
        else:
            stops = np.cumsum(batch.sizes)
            groups += [set(group.tolist()) for group in np.split(batch.texts, stops[:-1])]
    rows = row_of_text.tolist()
    assert rows[3] == rows[4]  # both are cut after the same tokens
    assert groups == [{rows[text] for text in (0, 1, 2, 3, 5, 6, 7)}]
    assert sorted(alone) == sorted([rows[8], rows[9]])


@st.composite
def drawn_tokens(draw):
    """Distinct rows of tokens from short to long, many of which begin alike."""
    inner = st.lists(st.integers(1, 3), max_size=CONTEXT - 1)
    texts = draw(st.lists(inner, min_size=1, max_size=12))
    cuts = [text[: draw(st.integers(0, len(text)))] for text in texts]
    rows = {(*text, END, *[0] * (CONTEXT - len(text) - 1)) for text in texts + cuts}
    return np.array(sorted(rows, key=lambda row: row.index(END)), dtype=np.uint16)


@settings(deadline=None)
@given(drawn_tokens(), st.integers(1, 5))
def test_each_end_sees_its_text_and_nothing_else(tokens, batch_size):
    batches = text_batches(tokens, batch_size)
    encoded = np.concatenate([batch.texts for batch in batches])
    assert sorted(encoded.tolist()) == list(range(len(tokens)))
    for batch in batches:
        texts = tokens[batch.texts]
        if batch.sizes is None:
            assert len(texts) <= batch_size
            continue
        rows = shared_rows(texts, batch.sizes)
        assert len(batch.sizes) <= batch_size
        assert rows.tokens.numel() <= max(batch_size, 2) * CONTEXT
        assert rows.visible.diagonal(dim1=1, dim2=2).all()
        seen = []
        for row, ends in enumerate(rows.ends):
            for end in ends[rows.is_text[row]]:
                for position, token in enumerate(rows.visible[row, end].nonzero()[:, 0].tolist()):
                    # Every token sees those of its own text before it, and itself.
                    before = rows.visible[row, token].nonzero()[:, 0]
                    assert rows.positions[row, before].tolist() == list(range(position + 1))
                path = rows.visible[row, end]
                seen.append(rows.tokens[row, path].tolist())
        assert seen == [text[: text.tolist().index(END) + 1].tolist() for text in texts]


def test_no_text_has_no_features(generator):
    assert features(encoder(WORDS, generator), []).shape == (0, WORDS.embed_dim)


def test_a_token_that_is_not_finite_spoils_its_own_texts_alone(generator):
    apart = encoder(WORDS, generator)
    (token,) = tokenize("worn", context_length=3)[0][1:2].tolist()
    apart.model.token_embedding.weight.data[token] = torch.nan
    none = torch.empty(0, dtype=torch.int64)
    images = torch.empty(0, WORDS.embed_dim)
    scored = apart.score_texts(TEXTS, none, none, images, len(TEXTS))
    assert scored.not_finite.tolist() == ["worn" in text for text in TEXTS]
    good = [text for text in TEXTS if "worn" not in text]
    found = scored.features[~scored.not_finite]
    torch.testing.assert_close(found, each_alone(apart.model, good), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_differs_by_its_own_rounding(dtype, generator):
    half = encoder(WORDS, generator, dtype)
    found, alone = features(half, TEXTS), each_alone(half.model, TEXTS)
    torch.testing.assert_close(found, alone, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.skipif(not HIMO_DOCCI.exists(), reason="the captions of HiMo-Docci are not here")
@pytest.mark.parametrize("context", [77, 248])
def test_the_prefixes_of_himo_docci(context, generator):
    records, _ = read_himo_docci(HIMO_DOCCI)
    texts = [text for record in records for text in record.prefixes]
    tokens, _, _ = distinct_tokens(texts, context)
    apart = int((tokens.argmax(axis=1) + 1).sum())
    together = 0
    for batch in text_batches(tokens, 64):
        if batch.sizes is None:
            together += int((tokens[batch.texts].argmax(axis=1) + 1).max()) * len(batch.texts)
        else:  # what fills the rows up counts too
            together += shared_rows(tokens[batch.texts], batch.sizes).tokens.numel()
    assert apart >= (2.5 if context == 77 else 3.5) * together

    config = CLIPConfig(**{**vars(WORDS), "context_length": context})
    whole = encoder(config, generator)
    some = texts[:120] + texts[-60:]
    torch.testing.assert_close(
        features(whole, some), each_alone(whole.model, some), rtol=0, atol=1e-5
    )
