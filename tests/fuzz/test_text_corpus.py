"""Captions, names and paths that no library was made for: counted or refused, in bounded time."""

import json
from pathlib import Path

import numpy
import pytest
from fuzz_corpus import bounded, corpus
from PIL import Image

from himo.data import CaptionedImages, open_dataset
from himo.data.paths import ImageRoot
from himo.data.records import MAX_CAPTION, RecordError
from himo.errors import HimoError
from himo.evaluate.metrics import MAX_SEGMENTS, caption_segments, sentence_prefixes
from himo.tokenizer import END_OF_TEXT, START_OF_TEXT, default_tokenizer, tokenize
from himo.transforms import Preprocess

SECONDS, MEBIBYTES = 2, 64
PREFIXES_SECONDS = 10  # of the prefixes of one caption, of which there are at most 120


def _long(unit: str) -> str:
    return (unit * (MAX_CAPTION // len(unit) + 1))[:MAX_CAPTION]


TEXTS = {
    "a number of 4,301 digits": "&#" + "9" * 4301,
    "a number of 4,301 digits, ended": "&#" + "9" * 4301 + "; a cat",
    "zeros before a number": "&#" + "0" * 5000 + "65;",
    "zeros alone": "&#" + "0" * 5000,
    "a number in an entity": "&amp;#" + "9" * 4301,
    "a number in entities": "&amp;amp;#" + "9" * 4301 + ";",
    "many long numbers": ("&#" + "9" * 4000 + ";") * 2,
    "a hexadecimal number": "&#x" + "f" * 8000,
    "numbers of surrogates": _long("&#xD800;&#xDFFF;&#55357;"),
    "numbers of controls": _long("&#0;&#128;&#1;&#x7f;&#159;"),
    "digits of another script": _long("&#" + "٣" * 20),
    "nested entities": "&" + _long("amp;")[1:],
    "nested entities, not ASCII": "é&" + _long("amp;")[2:],
    "nested numbers": "é&" + _long("#38;")[2:],
    "nested entities of many kinds": "é&" + _long("amp;#38;#x26;AMP;#038;")[2:],
    "nested entities and <": "<é&" + _long("amp;")[3:],
    "many nested entities": _long("&amp;amp;amp;amp;amp;amp;amp;lt;"),
    "ampersands": _long("&"),
    "ampersands and #": _long("&#"),
    "an entity without an end": "&" + _long("a")[1:],
    "mojibake": _long("Ã¢â‚¬â„¢"),
    "mojibake of mojibake": _long("ÃƒÂ¢Ã¢â€šÂ¬"),
    "mojibake of one letter": _long("Ã"),
    "mojibake in lines": _long("é\n"),
    "replacement characters": _long("\ufffd"),
    "lossy mojibake": _long("Ã\x1a"),
    "combining marks": "a" + _long("\u0301")[1:],
    "combining marks out of order": _long("a\u0315\u0300\u05ae\u0300"),
    "joiners": _long("👩\u200d"),
    "directions": _long("\u202e\u2066a\u2069"),
    "escapes": _long("\x1b[31m\x9b2J"),
    "controls": _long("\x01\x02\x7f\x85"),
    "spaces of all kinds": _long("\xa0\u2003\u3000\u2028 "),
    "ligatures that grow": _long("ﷺ"),
    "capitals that grow": _long("İ"),
    "final sigmas": _long("Σ"),
    "one word": _long("a"),
    "one word of marks": _long("!"),
    "words of one letter": _long("a "),
    "beyond the basic plane": _long("𝒳𠀀🏴"),
    "not characters": _long("\uffff\U0010ffff"),
    "private characters": _long("\ue000"),
    "special tokens": _long("<|endoftext|><|startoftext|>"),
    "special tokens, broken": _long("<|endoftext|<|startof"),
    "apostrophes": _long("'s'ſ'll"),
    "2,730 sentences": _long("a. "),
    "2,730 sentences, not ASCII": _long("é. "),
    "sentences of entities": _long("&amp;amp; x. "),
    "sentences of nested entities": _long("é. &" + "amp;" * 100 + " x. "),
    "sentence ends": _long("."),
    "sentence ends and spaces": _long(". "),
    "lone surrogates": _long("\ud800"),
    "surrogates in pairs": _long("\ud83d\ude00"),
    "NUL": "a\0b",
    "too long": _long("a") + "b",
}


@pytest.mark.filterwarnings("ignore:tokenize. 1 of 1 texts longer")
@pytest.mark.parametrize("text", corpus(TEXTS, sample=8))
def test_a_caption_is_tokenised_or_counted_in_bounded_time(text: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [json.dumps({"image": "a.png", "caption": caption}) for caption in ("a cat", text)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    default_tokenizer()

    with bounded(SECONDS, MEBIBYTES):
        index = open_dataset(tmp_path / "a.jsonl", max_bad_fraction=0.5, progress=False)
        data = CaptionedImages(index, Preprocess(8), tokenize)
        samples = [data[row] for row in range(len(index))]
    assert len(index) + index.report.bad_count == 2
    for sample in samples:
        row = numpy.asarray(sample.tokens)
        assert row.shape == (248,) and row[0] == START_OF_TEXT and END_OF_TEXT in row
        assert sample.reason == 0
    if len(index) == 2:
        caption = " ".join(index[1].caption.split())
        with bounded(PREFIXES_SECONDS, MEBIBYTES):
            prefixes = sentence_prefixes(caption_segments(caption))
            default_tokenizer().encode_batch(prefixes, 248)
        assert len(prefixes) <= MAX_SEGMENTS
        assert not prefixes or prefixes[-1] == caption
    else:
        assert index.report.bad.keys() <= {"encoding", "too_long", "empty"}


NAMES = {
    "NUL": "a\0b",
    "NUL first": "\0",
    "lone surrogate": "\ud800",
    "surrogate of a byte": "\udcff",
    "256 bytes": "a" * 256,
    "256 bytes of two": "ü" * 128,
    "5,000 bytes": "a/" * 2500,
    "100,000 characters": "x" * 100_000,
    "empty": "",
    "a dot": ".",
    "two dots": "..",
    "slashes": "/" * 300,
    "up": "../" * 1000 + "etc/passwd",
    "control": "\x1b[2J\x07",
    "directions": "\u202egnp.a",
    "line break": "a\nb",
    "home": "~",
    "a user": "~root/x",
    "URL": "file:///etc/passwd",
    "pipe of webdataset": "pipe:cat /etc/passwd",
    "variable": "$HOME/x",
    "braces": "{0..999999999}.tar",
    "many braces": "{0..9}" * 40 + ".tar",
    "braces out of order": "{9..0}.tar",
    "endless braces": "{" + "9" * 5000 + ".." + "9" * 5000 + "}.tar",
    "format": "%s%n{0}{a.b}",
    "device": "/dev/zero",
    "process": "/proc/self/mem",
    "process name": "/proc/self/environ",
    "UNC": "\\\\server\\share",
    "drive": "C:\\a.png",
    "space": " ",
}


@pytest.mark.parametrize("name", corpus(NAMES, sample=8))
def test_a_name_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source = tmp_path / "a.jsonl"
    source.write_text('{"image": "a.png", "caption": "a cat"}')

    with bounded(SECONDS, MEBIBYTES):
        for follow_links in (False, True):
            with pytest.raises(RecordError):
                ImageRoot(tmp_path, follow_links).resolve(name)
        for kind in ("auto", "csv", "jsonl", "sharegpt4v", "folder", "webdataset"):
            with pytest.raises(HimoError) as error:
                open_dataset(f"{tmp_path}/none/{name}", kind, progress=False)
            assert str(error.value).isprintable()
        for option in ("image_root", "cache_dir"):
            try:
                open_dataset(source, progress=False, **{option: f"{tmp_path}/a.png/{name}"})
            except HimoError as error:
                assert str(error).isprintable()
        rows = [json.dumps({"image": text, "caption": "a cat"}) for text in ("a.png", name)]
        source.write_text("\n".join(rows))
        index = open_dataset(source, max_bad_fraction=0.5, skip_missing_images=True, progress=False)
    assert [record.image for record in index] == ["a.png"]
    assert index.report.bad_count + index.report.missing_count == 1
