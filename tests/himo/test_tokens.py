"""The token cache: equal to the tokenizer, whole or not at all, rebuilt, and never trusted."""

import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_files import write_images
from train_runs import lines, photos, refused, small_model, train_here

import himo.tokenizer
from himo.data import CaptionedImages, SampleIndex, TokenCache, open_dataset, open_tokens
from himo.data import tokens as tokens_module
from himo.data.blob_file import DamagedFile
from himo.tokenizer import TextError, Tokenizer, tokenize
from himo.transforms import Preprocess

ROOT = Path(__file__).parents[2]
CAPTIONS = [
    "A red door.",
    "Ein gr\u00fcnes T\u00fcrchen &amp; more",
    "many words " * 300,
    "\u65e5\u672c <|endoftext|> !",
    "x",
]


def data_set(folder: Path, captions: list[str] = CAPTIONS, short: str | None = None) -> SampleIndex:
    folder.mkdir(parents=True, exist_ok=True)
    names = write_images(folder, 1) * len(captions)
    path = folder / "a.jsonl"
    with path.open("w") as file:
        for number, (image, caption) in enumerate(zip(names, captions, strict=True)):
            record = {"image": image, "caption": caption}
            if short is not None and number % 2 == 0:
                record["caption_short"] = short
            file.write(json.dumps(record) + "\n")
    return open_dataset(path)


def cache_file(index: SampleIndex) -> Path:
    return Path(index.path.removesuffix(".himo-index") + ".himo-tokens")


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that this process has encoded for a cache."""
    texts = []
    plain = Tokenizer.encode_bytes

    def counted(self: Tokenizer, text: str) -> bytes:
        texts.append(text)
        return plain(self, text)

    monkeypatch.setattr(Tokenizer, "encode_bytes", counted)
    return texts


@pytest.mark.filterwarnings("ignore:tokenize")
@pytest.mark.parametrize("context_length", [2, 16, 248, 1000])
def test_tokens_are_those_of_the_tokenizer(tmp_path, context_length):
    index = data_set(tmp_path)
    cache = open_tokens(index, context_length)
    for row, record in enumerate(index):
        expected = tokenize(record.caption, context_length)[0]
        for copy in (cache, pickle.loads(pickle.dumps(cache))):
            found = copy.tokens(row)
            assert found.dtype == torch.int32 and torch.equal(found, expected)


def test_lengths_are_those_of_the_encoded_captions(tmp_path):
    index = data_set(tmp_path, short="A door.")
    tokenizer = himo.tokenizer.default_tokenizer()
    lengths = open_tokens(index, 248).lengths()
    assert lengths.dtype == np.int32
    assert lengths[:, 0].tolist() == [len(tokenizer.encode(r.caption)) for r in index]
    assert lengths[:, 1].tolist() == [3, -2, 3, -2, 3]  # -2: the record has none


def test_a_cut_caption_is_said_once_as_by_the_tokenizer(tmp_path, monkeypatch):
    cache = open_tokens(data_set(tmp_path), 248)
    monkeypatch.setattr(himo.tokenizer, "_truncation_reported", False)
    with pytest.warns(UserWarning, match=r"1 of 1 texts longer than context_length = 248 tokens"):
        cache.tokens(2)
    cache.tokens(2)


@pytest.mark.filterwarnings("ignore:tokenize")
@pytest.mark.parametrize("short", [False, True])
def test_a_data_set_with_a_cache_equals_one_without(tmp_path, short):
    index = data_set(tmp_path, short="A door.").select([4, 0, 2, 1])
    cache = open_tokens(index, 248)
    made = [
        CaptionedImages(index, Preprocess(8), tokenize, short_captions=short, cache=one)
        for one in (cache, None)
    ]
    for row in range(len(index)):
        assert torch.equal(made[0].tokens(row), made[1].tokens(row))
    assert cache.records == len(CAPTIONS)  # of the whole file


def test_it_is_made_once_and_anew_where_captions_or_the_tokenizer_changed(
    tmp_path, monkeypatch, encoded
):
    index = data_set(tmp_path)
    open_tokens(index, 248)
    assert len(encoded) == len(CAPTIONS)
    open_tokens(index, 77)  # serves every length
    open_tokens(index[:2], 248)
    assert len(encoded) == len(CAPTIONS)

    time.sleep(0.01)
    changed = data_set(tmp_path, ["A blue door.", *CAPTIONS[1:]])
    assert changed.path == index.path
    assert torch.equal(open_tokens(changed, 248).tokens(0), tokenize("A blue door.")[0])
    assert len(encoded) == 2 * len(CAPTIONS)
    monkeypatch.setattr(himo.tokenizer, "_RULES", -1)
    open_tokens(changed, 248)
    assert len(encoded) == 3 * len(CAPTIONS)


def test_workers_write_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "_CHUNK", 3)
    captions = [f"Card {number} of {number % 7} colours." for number in range(32)]
    files = []
    for workers in (0, 2):
        index = data_set(tmp_path / str(workers), captions)
        open_tokens(index, 248, workers=workers)
        files.append(cache_file(index).read_bytes())
    assert files[0] == files[1]


def test_a_caption_that_the_tokenizer_refuses_stays_refused(tmp_path, monkeypatch):
    plain = Tokenizer._encode

    def picky(self: Tokenizer, text: str) -> bytes:
        if text == "x":
            raise TextError("no x")
        return plain(self, text)

    monkeypatch.setattr(Tokenizer, "_encode", picky)
    index = data_set(tmp_path)
    cache = open_tokens(index, 248)
    assert cache.tokens(4) is None and cache.lengths()[4, 0] == -1
    data = CaptionedImages(index, Preprocess(8), tokenize, cache=cache)
    with pytest.raises(TextError, match="no x"):
        data.tokens(4)
    assert torch.equal(data.tokens(0), tokenize(CAPTIONS[0])[0])


def test_whatever_is_damaged_tokens_are_right(tmp_path, generator):
    index = data_set(tmp_path, ["A red door.", "Two blue windows.", "Three green cards."])
    open_tokens(index, 16)
    path = cache_file(index)
    whole = path.read_bytes()
    rng = random.Random(int(torch.randint(1 << 30, (), generator=generator)))
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged if rng.random() < 0.7 else whole[: rng.randrange(len(whole))])
        cache = open_tokens(index, 16)
        outcomes.add(path.read_bytes() == whole)
        data = CaptionedImages(index, Preprocess(8), _tokenize_16, cache=cache)
        for row, record in enumerate(index):
            assert torch.equal(data.tokens(row), tokenize(record.caption, 16)[0])
        path.write_bytes(whole)
    assert outcomes == {True, False}  # made anew, or read around the damage


def _tokenize_16(text: str) -> torch.Tensor:
    return tokenize(text, 16)


def test_a_file_that_shrinks_while_it_is_read_costs_nothing(tmp_path):
    index = data_set(tmp_path)
    data = CaptionedImages(index, Preprocess(8), tokenize, cache=open_tokens(index, 248))
    os.truncate(cache_file(index), 20)
    assert torch.equal(data.tokens(1), tokenize(CAPTIONS[1])[0])


def test_an_id_beyond_the_vocabulary_is_not_believed(tmp_path):
    index = data_set(tmp_path, ["A red door."])
    cache = open_tokens(index, 16)
    path = cache_file(index)
    content = bytearray(path.read_bytes())
    content[8:10] = b"\xff\xff"
    row = slice(cache._rows, cache._rows + 20)
    ids = bytes(content[8 : cache._rows])
    content[row.stop - 4 : row.stop] = struct.pack(
        "<I", tokens_module._checksum(0, ids, bytes(content[row]))
    )
    path.write_bytes(content)
    assert open_tokens(index, 16).tokens(0) is None


def test_a_cache_of_other_data_is_refused_by_its_reader(tmp_path):
    one, other = data_set(tmp_path / "1"), data_set(tmp_path / "2", ["Something else."])
    cache = open_tokens(one, 248)
    open_tokens(other, 248)
    os.replace(cache_file(other), cache_file(one))
    with pytest.raises(DamagedFile, match="of other captions or of another tokenizer; remove it"):
        TokenCache(os.fspath(cache_file(one)), cache.key, cache.records, 248)
    with pytest.raises(DamagedFile, match="of other captions"):
        pickle.loads(pickle.dumps(cache))
    assert torch.equal(open_tokens(one, 248).tokens(0), tokenize(CAPTIONS[0])[0])


def test_no_link_is_followed(tmp_path):
    index = data_set(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("do not touch")
    cache_file(index).symlink_to(secret)
    assert torch.equal(open_tokens(index, 248).tokens(0), tokenize(CAPTIONS[0])[0])
    assert secret.read_text() == "do not touch" and not cache_file(index).is_symlink()


def test_without_space_the_captions_are_encoded_when_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("himo.progress.DELAY_S", 600.0)  # no bar of a busy machine
    index = data_set(tmp_path, [f"Card {number}." for number in range(4000)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        assert open_tokens(index, 248) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = capsys.readouterr().err
    assert "himo: note: captions are encoded whenever they are read: " in said
    assert said.count("\n") == 1 and not list(tmp_path.glob("*.himo-tokens"))


_KILLED = """
import os, sys, time
from himo.data import open_dataset, open_tokens
from himo.data import tokens
plain = tokens._encoded
def slow(text):
    if text.startswith("Card 5000"):
        print("here", flush=True)
        time.sleep(60)
    return plain(text)
tokens._encoded = slow
open_tokens(open_dataset(sys.argv[1]), 248)
"""


def test_a_killed_writer_leaves_no_cache_and_the_next_one_removes_its_rest(tmp_path):
    index = data_set(tmp_path, [f"Card {number}." for number in range(6000)])
    path = tmp_path / "a.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert not cache_file(index).exists() and list(tmp_path.glob(".himo-*.tmp"))
    cache = open_tokens(index, 248)
    assert torch.equal(cache.tokens(5999), tokenize("Card 5999.")[0])
    assert not list(tmp_path.glob(".himo-*.tmp"))


def test_training_is_the_same_with_and_without_it(tmp_path):
    pairs = photos(tmp_path)
    flags = [*small_model(tmp_path), "--epochs", "1"]
    found = []
    for name, more in (("with", []), ("without", ["--no-token-cache"]), ("again", [])):
        for file in tmp_path.glob("*.himo-tokens"):
            file.unlink()
        assert train_here(pairs, tmp_path / name, *flags, *more) == 0
        assert bool(list(tmp_path.glob("*.himo-tokens"))) == (not more)
        found.append([line["loss"] for line in lines(tmp_path / name)])
    assert found[0] == found[1] == found[2]


def test_a_run_may_be_resumed_with_the_other_choice(tmp_path, capsys):
    pairs = photos(tmp_path)
    flags = [*small_model(tmp_path), "--epochs", "2"]
    assert train_here(pairs, tmp_path, *flags, "--save-every-n-steps", "1") == 0
    state = tmp_path / "run/checkpoints/state-00000005.safetensors"
    assert state.exists()
    assert train_here(pairs, tmp_path, *flags, "--no-token-cache", "--resume", str(state)) == 0
    assert "token-cache" not in capsys.readouterr().err


def test_a_value_for_the_switch_is_refused(tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text('token_cache = "yes"\n')
    message = refused(capsys, photos(tmp_path), tmp_path, "--config", str(config))
    assert "token_cache" in message or "token-cache" in message
