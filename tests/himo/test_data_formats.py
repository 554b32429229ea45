"""Every format on disk: the records read, and the place that is named for a bad record."""

import csv
import gzip
import io
import json
import os
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from captioned_files import (
    image_bytes,
    read,
    sharegpt4v_record,
    write_coco,
    write_csv,
    write_images,
    write_jsonl,
    write_karpathy,
    write_sharegpt4v,
    write_tar,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from himo.data import open_dataset
from himo.data.folder import Folder
from himo.data.jsonl import JsonLines
from himo.data.records import MAX_CAPTION, MAX_RECORD, Record
from himo.data.sharegpt4v import ShareGPT4V
from himo.data.table import Table
from himo.data.webdataset import WebDataset
from himo.errors import HimoError

# Quotes, separators of csv and JSON, characters of two to four bytes, an escape-like text.
CAPTIONS = [
    'A red "door", half open; a cat.',
    "Zwei Stühle\tund ein Tisch.",
    "猫が二匹 🐈🐈, [brackets] {braces}",
    "back\\slash \\u0041 and 'quotes'",
    "line one\nline two",
]
ON_ONE_LINE = [caption.replace("\n", " ") for caption in CAPTIONS]


def _folder(folder: Path, rows: list[tuple[str, str]]) -> Path:
    for image, caption in rows:
        (folder / image).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder / "images"


def _webdataset(folder: Path, rows: list[tuple[str, str]]) -> Path:
    files = []
    for number, (image, caption) in enumerate(rows):
        key = f"{number:05}"
        data = (folder / image).read_bytes()
        text = ("txt", caption) if number % 2 else ("json", json.dumps({"caption": caption}))
        files += [(f"{key}.png", data), (f"{key}.{text[0]}", text[1].encode())]
    return write_tar(folder / "shard.tar", files)


WRITERS: dict[str, Callable[[Path, list[tuple[str, str]]], Path]] = {
    "sharegpt4v": lambda folder, rows: write_sharegpt4v(folder / "a.json", rows),
    "jsonl": lambda folder, rows: write_jsonl(folder / "a.jsonl", rows),
    "jsonl-named-json": lambda folder, rows: write_jsonl(folder / "a.json", rows),
    "coco": lambda folder, rows: write_coco(folder / "a.json", rows),
    "karpathy": lambda folder, rows: write_karpathy(folder / "a.json", rows),
    "tsv": lambda folder, rows: write_csv(folder / "a.tsv", rows),
    "csv": lambda folder, rows: write_csv(folder / "a.csv", rows, ","),
    "csv-semicolon": lambda folder, rows: write_csv(folder / "a.csv", rows, ";"),
    "folder": _folder,
    "webdataset": _webdataset,
}


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    rows = list(zip(write_images(tmp_path, len(CAPTIONS)), CAPTIONS, strict=True))

    index = open_dataset(WRITERS[form](tmp_path, rows), progress=False)

    assert [record.caption for record in index] == ON_ONE_LINE
    for number in range(len(rows)):
        assert index.open_image(number).getpixel((3, 3)) == (
            number * 37 % 256,
            number * 91 % 256,
            number * 53 % 256,
        )
    assert index.report.bad == {} and index.report.missing_count == 0


def test_sharegpt4v_takes_the_second_turn_with_line_breaks_as_spaces(tmp_path: Path) -> None:
    record = sharegpt4v_record("sam/images/sa_1.jpg", "One.\nTwo.\n\nThree.")
    record["conversations"].append({"from": "human", "value": "And?"})  # type: ignore[attr-defined]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record, {"image": "b.jpg", "caption": "Plain."}]))

    good, bad = read(ShareGPT4V(path))

    assert good == [
        Record(1, "sam/images/sa_1.jpg", "One. Two.  Three."),
        Record(1, "b.jpg", "Plain."),
    ]
    assert bad == []


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1000])
def test_sharegpt4v_is_read_the_same_whatever_the_chunk(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"{i}.jpg", f"{caption} 🐈 {i}") for i, caption in enumerate(CAPTIONS * 3)]
    text = write_sharegpt4v(tmp_path / "a.json", rows).read_text()
    text = text.replace('"id": "0"', '"id": 12345', 4).replace('"id": "0"', '"id": bad', 1)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    whole = read(ShareGPT4V(tmp_path / "a.json"))

    monkeypatch.setattr("himo.data.sharegpt4v._CHUNK", chunk)

    assert read(ShareGPT4V(tmp_path / "a.json")) == whole
    assert len(whole[0]) == len(rows) - 1
    lines = [number for number, line in enumerate(text.split("\n"), 1) if line == " {"]
    assert [record.line for record in whole[0]] == lines[:4] + lines[5:]
    (bad,) = whole[1]
    assert bad.message == f"{tmp_path}/a.json:{lines[4]}: record 5: not valid JSON: Expecting value"


def test_sharegpt4v_of_five_thousand_records_is_read_without_holding_them(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    record = json.dumps(sharegpt4v_record("a.jpg", "word " * 200))
    path.write_text("[" + ",\n".join([record] * 5_000) + "]")  # 6 MB
    tracemalloc.start()
    count = sum(isinstance(item, Record) for item in ShareGPT4V(path).read(lambda done: None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert count == 5_000
    assert peak < 4 << 20, f"{peak:,} bytes"


LONG = "x" * (MAX_RECORD + 1)
RECORD = '{"image": "a.jpg", "caption": "c"}'
# name: one line of a jsonl file, the reason it counts as, a part of the message
BAD_OBJECTS = {
    "no JSON": ("{image: 1}", "syntax", "not valid JSON"),
    "cut off": (RECORD[:-5], "syntax", "not valid JSON"),
    "key twice": ('{"image": "a.jpg", "caption": "c", "image": "b.jpg"}', "syntax", "'image' is g"),
    "deep": ("[" * 100_000, "syntax", "nested too deeply"),
    "list": ('["a.jpg", "c"]', "type", "expected an object"),
    "number": ("3", "type", "record is 3"),
    "no image": ('{"caption": "c"}', "missing_key", "no image key 'filepath' or 'image'"),
    "no caption": ('{"image": "a.jpg"}', "missing_key", "no caption key 'title' or 'caption'"),
    "caption list": ('{"image": "a.jpg", "caption": ["c"]}', "type", "caption is ['c']"),
    "caption null": ('{"image": "a.jpg", "caption": null}', "type", "caption is None"),
    "image number": ('{"image": 7, "caption": "c"}', "type", "image path is 7, expected text"),
    "empty caption": ('{"image": "a.jpg", "caption": " \\n"}', "empty", "caption is empty"),
    "empty image": ('{"image": "", "caption": "c"}', "empty", "image path is empty"),
    "lone surrogate": ('{"image": "a.jpg", "caption": "\\ud800"}', "encoding", "not valid UTF-8"),
    "NUL": ('{"image": "a.jpg", "caption": "a\\u0000b"}', "encoding", "NUL"),
    "long caption": (
        f'{{"image": "a.jpg", "caption": "{"c" * (MAX_CAPTION + 1)}"}}',
        "too_long",
        "caption has 8,193 characters, the limit is 8,192",
    ),
    "long short caption": (
        f'{{"image": "a.jpg", "caption": "c", "caption_short": "{"c" * (MAX_CAPTION + 1)}"}}',
        "too_long",
        "caption_short has 8,193 characters",
    ),
    "short caption": (
        '{"image": "a", "caption": "c", "caption_short": 1}',
        "type",
        "caption_short",
    ),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_a_bad_record_is_counted_and_said_where(name: str, tmp_path: Path) -> None:
    line, reason, text = BAD_OBJECTS[name]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{RECORD}\n\n{line}\n{RECORD}", encoding="utf-8")

    good, (bad,) = read(JsonLines(path))

    assert [record.line for record in good] == [1, 4]
    assert bad.reason == reason and text in bad.message
    assert bad.message.startswith(f"{path}:3: ") and len(bad.message) < len(str(path)) + 300


@pytest.mark.parametrize("name", sorted(set(BAD_OBJECTS) - {"cut off", "deep"}))
def test_a_json_list_goes_on_after_a_bad_record(name: str, tmp_path: Path) -> None:
    line, reason, text = BAD_OBJECTS[name]
    path = tmp_path / "a.json"
    path.write_text(f"[{RECORD},\n\n{line},\n{RECORD}]", encoding="utf-8")

    good, (bad,) = read(ShareGPT4V(path))

    assert [record.line for record in good] == [1, 4]
    assert bad.reason == reason and text in bad.message
    assert bad.message.startswith(f"{path}:3: record 2: ")


UNUSED = [
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    '{"a": 1, "a": 2}',
    "[[[]]]",
    '"\\ud800"',
    "null",
]


@pytest.mark.parametrize("value", UNUSED, ids=lambda value: value[:20])
def test_a_field_that_is_not_used_costs_no_record(value: str, tmp_path: Path) -> None:
    line = f'{{"score": {value}, "image": "a.jpg", "caption": "c", "score": 1}}'
    (tmp_path / "a.jsonl").write_text(f"{line}\n{RECORD}")
    (tmp_path / "a.json").write_text(f"[{line},\n{RECORD}]")

    for source in (JsonLines(tmp_path / "a.jsonl"), ShareGPT4V(tmp_path / "a.json")):
        assert read(source) == ([Record(1, "a.jpg", "c"), Record(2, "a.jpg", "c")], [])


def test_json_lines_that_were_joined_without_a_line_break_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    other = RECORD.replace("a.jpg", "b.jpg")
    path.write_text(f"{RECORD}\ufeff{other}\n{other} {RECORD}\r{RECORD} x\n", encoding="utf-8-sig")

    good, (bad,) = read(JsonLines(path))

    assert [(record.line, record.image[0]) for record in good] == [
        (1, "a"),
        (1, "b"),
        (2, "b"),
        (2, "a"),
        (3, "a"),
    ]
    assert bad.message == f"{path}:3: not valid JSON: Expecting value"


TURN = {"value": "x"}
HUMAN = {"from": "human", "value": "<image>\nDescribe it."}
SYSTEM = {"from": "system", "value": "You describe images."}
CONVERSATIONS: dict[str, tuple[str, list[object]]] = {
    "system first": ("conversations", [SYSTEM, HUMAN, {"from": "gpt", "value": "A."}]),
    "assistant first": ("conversations", [{"from": "gpt", "value": "A."}, HUMAN]),
    "two answers": (
        "conversations",
        [HUMAN, {"from": "gpt", "value": "A."}, HUMAN, {"from": "gpt", "value": "B."}],
    ),
    "two questions": ("conversations", [HUMAN, HUMAN, {"from": "Assistant ", "value": "A."}]),
    "role and content": (
        "messages",
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}],
    ),
    "model": ("conversations", [{"role": "model", "value": "A."}]),
    "parts": (
        "messages",
        [{"role": "assistant", "content": [{"type": "text", "text": "A."}, {"type": "image"}]}],
    ),
    "parts of plain text": ("messages", [{"role": "assistant", "content": ["A.", 3, None]}]),
    "no turn at all": (
        "conversations",
        [None, 3, "x", {"from": 7}, {"from": "gpt", "value": "A."}],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_caption_of_a_conversation_is_what_the_assistant_says_first(
    name: str, tmp_path: Path
) -> None:
    key, turns = CONVERSATIONS[name]
    record = json.dumps({"image": "a.jpg", key: turns})
    (tmp_path / "a.json").write_text(f"[{record}]")
    (tmp_path / "a.jsonl").write_text(record)
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.json", record.encode())])

    for source in (ShareGPT4V(tmp_path / "a.json"), JsonLines(tmp_path / "a.jsonl")):
        assert read(source) == ([Record(1, "a.jpg", "A.")], [])
    assert [record.caption for record in read(WebDataset(shard))[0]] == ["A."]


BAD_CONVERSATIONS = [
    None,
    [],
    [TURN],
    "text",
    [TURN, TURN],
    [TURN, {}],
    [HUMAN, {**HUMAN, "from": "user"}],
    [HUMAN, {"from": "tool", "value": "x"}],
]


@pytest.mark.parametrize("turns", BAD_CONVERSATIONS, ids=str)
def test_conversations_without_a_caption_are_bad(turns: object, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"image": "a.jpg", "conversations": turns}]))

    good, (bad,) = read(ShareGPT4V(path))

    assert good == [] and bad.reason == "type" and "conversations are" in bad.message


BROKEN_LISTS = {
    "": "1: expected a JSON list of records, got ''",
    "{}": "1: expected a JSON list of records, got '{}'",
    "[": "1: the file ends in the middle of a record: is it complete?",
    f"[{RECORD}": "1: expected , or ] after a record, got the end of the file",
    f"[{RECORD},\n{RECORD[:20]}": "2: the file ends in the middle of a record: is it complete?",
    f"[{RECORD}\n{RECORD}]": "2: expected , or ] after a record, got",
    f"[{RECORD},\n]": "2: expected a record, got ']': is a comma left over?",
    f"[{RECORD}]\n\n{RECORD}": "3: expected nothing after the list, got",
    "[" * 100_000: "1: the file ends in the middle of a record",
    f'[{{"image": "{LONG}': f"1: a record begins that has no end within {MAX_RECORD:,} bytes",
}


@pytest.mark.parametrize("text", BROKEN_LISTS, ids=lambda text: repr(text[-30:]))
def test_a_broken_json_list_is_one_error_with_its_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)

    with pytest.raises(HimoError) as error:
        read(ShareGPT4V(path))

    assert str(error.value).startswith(f"{path}:{BROKEN_LISTS[text]}")


def test_a_byte_order_mark_is_skipped_and_utf16_refused(tmp_path: Path) -> None:
    for name, text, source in (
        ("a.jsonl", RECORD, JsonLines),
        ("a.json", f"[{RECORD}]", ShareGPT4V),
        ("a.csv", "image,caption\na.jpg,c\n", Table),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8-sig")
        assert [(record.image, record.caption) for record in read(source(path))[0]] == [
            ("a.jpg", "c")
        ]
        path.write_text(text, encoding="utf-16")
        with pytest.raises(HimoError, match="is UTF-16 text, expected UTF-8"):
            read(source(path))


def test_a_line_that_is_too_long_is_one_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{RECORD}\n{LONG * 3}\n{RECORD}\n")
    good, (bad,) = read(JsonLines(path))
    assert [record.line for record in good] == [1, 3]
    assert bad.message == f"{path}:2: line is longer than 1,048,576 bytes"

    path = tmp_path / "a.csv"
    path.write_text(f"image,caption\na.jpg,c\nb.jpg,{LONG}\nc.jpg,c\n")
    good, (bad,) = read(Table(path))
    assert [record.line for record in good] == [2, 4]
    assert bad.message == f"{path}:3: line is longer than 1,048,576 bytes"


def test_a_table_reads_quoted_fields_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'filepath,title,caption_short,extra\na.jpg,"one, ""two""\nthree",short,\n\nb.jpg,four,,x\n'
    )

    good, bad = read(Table(path))

    assert good == [
        Record(2, "a.jpg", 'one, "two" three', "short"),
        Record(5, "b.jpg", "four"),
    ]
    assert bad == []


def test_a_bad_row_is_counted_and_said_where(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"filepath,title\n"
        b"a.jpg,a cat, and a dog\n"  # an unquoted comma
        b"b.jpg\n"
        b'c.jpg,"odd" quote\n'
        b"d.jpg,\xff\xfe\n"
        b"e.jpg,\n"
        b"f.jpg,good\n"
        b'g.jpg,"never closed\n'
        b"h.jpg,not swallowed\n"
    )

    good, bad = read(Table(path))

    assert [record.image for record in good] == ["f.jpg", "h.jpg"]
    assert [record.reason for record in bad] == [
        "fields",
        "fields",
        "syntax",
        "encoding",
        "empty",
        "syntax",
    ]
    places = [record.message.split(": ")[0] for record in bad]
    assert places == [f"{path}:{line}" for line in (2, 3, 4, 5, 6, 8)]
    assert bad[0].message == f"{path}:2: 3 fields, the header has 2: 'a.jpg'"


def test_a_line_with_a_quote_alone_takes_no_row_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('filepath,title\na.jpg,one\n"\nb.jpg,two\n"x\ny\nc.jpg,three\n')
    good, bad = read(Table(path))
    assert [record.image for record in good] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [record.message.split(": ")[0] for record in bad] == [f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_utf_16_without_its_mark_is_named_as_such(name: str, tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / name).write_bytes('[{"filepath,title": 1}]'.encode(encoding))
        with pytest.raises(HimoError, match=rf"{name}: is UTF-16 text, expected UTF-8"):
            open_dataset(tmp_path / name, "auto" if name != "a.json" else "sharegpt4v")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.tar"])
def test_a_pointer_of_git_lfs_is_named_as_such(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(HimoError, match=rf"{name}: a pointer of Git LFS, .*git lfs pull"):
        open_dataset(tmp_path / name)


def test_a_short_file_named_as_a_shard_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("not found")
    with pytest.raises(HimoError, match=r"incomplete header: is it an uncompressed tar file"):
        open_dataset(tmp_path / "a.tar")


FIELD = st.text(st.sampled_from("ab\",;\t\n é'."), max_size=12)


@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_well_formed_table_is_read_as_by_python(
    rows: list[tuple[str, str]], data: st.DataObject
) -> None:
    separator = data.draw(st.sampled_from("\t,;"))
    text = io.StringIO()
    quoting = data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([("notes", "filepath", "title"), *((x, "a.jpg", f"c{y}.") for x, y in rows)])
    expected = list(csv.reader(io.StringIO(text.getvalue(), newline=""), delimiter=separator))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
        good, bad = read(Table(path, separator))

    assert bad == []
    assert [(record.image, record.caption) for record in good] == [
        (image, caption.replace("\n", " ").strip()) for _, image, caption in expected[1:]
    ]


BAD_HEADERS = {
    "image path,text\n": "or 'image' or 'img_path'; there is 'image path', 'text'",
    "": "no column",
    "filepath,words\n": "no column 'title' or 'caption'",
    "picture;words\n": "there is 'picture', 'words'",
    "filepath,title,title\n": "two columns are named 'title'",
    '"filepath\n': "header split at tab, comma or semicolon",
}


@pytest.mark.parametrize("header", BAD_HEADERS, ids=repr)
def test_a_header_without_the_columns_says_what_there_is(header: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{header}a.jpg,c,d\n" if header else "")

    with pytest.raises(HimoError) as error:
        read(Table(path))

    assert str(error.value).startswith(f"{path}:1: ") and BAD_HEADERS[header] in str(error.value)


def test_columns_and_separator_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("title|picture|words\nx|a.jpg|c\n")
    good, _ = read(Table(path, "|", "picture", "words"))
    assert good == [Record(2, "a.jpg", "c")]
    with pytest.raises(HimoError, match=r"a.csv:1: header split at separator ',': no column"):
        read(Table(path, ",", "picture", "words"))
    with pytest.raises(HimoError, match="separator: expected one character"):
        Table(path, "::")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("Image;Caption\na.jpg;c\n", ()),
        ("TITLE,FilePath\nc,a.jpg\n", ()),
        ("Caption;caption;image\nother;c;a.jpg\n", ()),  # the exact name first
        ("Picture;WORDS\na.jpg;c\n", ("picture", "words")),
    ],
    ids=["semicolon", "comma", "exact", "named"],
)
def test_columns_are_found_in_upper_or_lower_case(
    text: str, keys: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert read(Table(path, None, *keys)) == ([Record(2, "a.jpg", "c")], [])


def test_a_folder_pairs_files_side_by_side_and_counts_the_others(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "lonely.png", ".hidden.jpg", "._a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes())
    for name in ("b.txt", "a.txt", "sub/c.txt", "orphan.txt", "._a.txt", ".DS_Store", "notes.md"):
        (tmp_path / name).write_text(f"caption\nof {name}\n")

    source = Folder(tmp_path)
    good, bad = read(source)

    assert good == [
        Record(0, "a.PNG", "caption of a.txt"),
        Record(0, "b.jpg", "caption of b.txt"),
        Record(0, "sub/c.jpeg", "caption of sub/c.txt"),
    ]
    assert [record.message for record in bad] == [
        f"{tmp_path}/lonely.png: has no caption of the same name",
        f"{tmp_path}/orphan.txt: has no image of the same name",
    ]
    assert source.ignored == {"other files": 1, "folders behind a link": 0}


@pytest.mark.parametrize("names", [("image", "caption"), ("images", "captions")])
def test_a_folder_in_the_layout_of_urban1k(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    for number in (1, 2, 10):
        (tmp_path / names[0] / f"{number}.jpg").write_bytes(image_bytes())
        (tmp_path / names[1] / f"{number}.txt").write_text(f"first {number}\nsecond\n")
    (tmp_path / names[0] / "Thumbs.db").write_text("x")
    (tmp_path / "readme.txt").write_text("x")

    source = Folder(tmp_path, first_line=True)
    good, bad = read(source)

    assert [(r.image, r.caption) for r in good] == [
        (f"{names[0]}/{number}.jpg", f"first {number}") for number in (1, 10, 2)
    ]
    assert bad == [] and source.ignored["other files"] == 2
    assert read(Folder(tmp_path))[0][0].caption == "first 1 second"


@pytest.mark.parametrize("below", ["", "images/"])
def test_a_folder_without_captions_says_what_is_expected(below: str, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png"):
        (tmp_path / below / name).parent.mkdir(exist_ok=True)
        (tmp_path / below / name).write_bytes(image_bytes())
    (tmp_path / "pairs.csv").write_text("image,caption\n")
    expected = rf"{tmp_path}: 2 images and no captions: expected a text file NAME.txt for each"
    with pytest.raises(HimoError, match=expected):
        open_dataset(tmp_path)
    (tmp_path / below / "a.txt").write_text("A caption.")
    assert len(open_dataset(tmp_path, max_bad_fraction=0.5)) == 1


def test_a_folder_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("not a caption")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").write_bytes(image_bytes())
    os.symlink(secret, folder / "a.txt")
    os.mkfifo(folder / "b.txt")
    (folder / "c.txt").write_bytes(b"\xff\xff")
    (folder / "d.png").write_bytes(image_bytes())
    (folder / "d.txt").write_bytes("UTF-16".encode("utf-16"))
    os.symlink(tmp_path, folder / "linked")

    source = Folder(folder)
    good, bad = read(source)

    assert good == []
    assert [record.reason for record in bad] == ["outside", "not_a_file", "encoding", "encoding"]
    assert source.ignored["folders behind a link"] == 1
    assert [record.caption for record in read(Folder(folder, follow_links=True))[0]] == [
        "not a caption"
    ]

    (folder / "c.jpg").write_bytes(image_bytes())
    with pytest.raises(HimoError, match=r"'c.jpg' and 'c.png' share the caption 'c.txt'"):
        read(Folder(folder))


def test_a_type_can_be_named_and_is_told_from_the_file_else(tmp_path: Path) -> None:
    names = write_images(tmp_path, 2)
    path = tmp_path / "captions.data"
    path.write_text("".join(f'{{"image": "{name}", "caption": "c"}}\n' for name in names))
    with pytest.raises(HimoError, match=r"cannot tell the format: expected a folder or one of"):
        open_dataset(path)
    assert len(open_dataset(path, "jsonl")) == 2
    with pytest.raises(HimoError, match=r"dataset_type: expected one of auto, .*, got 'parquet'"):
        open_dataset(path, "parquet")
    with pytest.raises(HimoError, match=r"separator: means nothing for a data set of type jsonl"):
        open_dataset(path, "jsonl", separator=",")
    with pytest.raises(HimoError, match=r"no such file or folder"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(HimoError, match=r"a folder data set holds its images"):
        open_dataset(tmp_path / "images", image_root=tmp_path)
    with pytest.raises(HimoError, match=r"max_bad_fraction: expected 0 to 1, got 2"):
        open_dataset(path, "jsonl", max_bad_fraction=2)
    with pytest.raises(HimoError, match=r"image root .*: expected an existing directory"):
        open_dataset(path, "jsonl", image_root=tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(HimoError, match=r"pipe.jsonl: expected a regular file"):
        open_dataset(tmp_path / "pipe.jsonl")


def test_a_folder_of_shards_is_a_webdataset(tmp_path: Path) -> None:
    for number in (1, 0):
        files = [("a.png", image_bytes()), ("a.txt", f"caption {number}".encode())]
        write_tar(tmp_path / f"{number}.tar", files)

    assert [record.caption for record in open_dataset(tmp_path)] == ["caption 0", "caption 1"]
    assert [r.shard for r in read(WebDataset(tmp_path / "{0..1}.tar"))[0]] == [0, 1]


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize(
    ("more", "short"),
    [
        (', "caption_short": "Short."', "Short."),
        (', "caption_short": ""', ""),
        (', "caption_short": null', ""),
        (', "caption_short": 5', ""),
        (', "note": "no \\"caption_short\\" here"', ""),
        ("", ""),
    ],
)
def test_the_json_of_a_shard_may_hold_a_short_caption(
    tmp_path: Path, with_text: bool, more: str, short: str
) -> None:
    about = f'{{"caption": "one"{more}}}'.encode()
    files = [("a.png", image_bytes()), ("a.json", about)]
    files += [("a.txt", b"one")] if with_text else []
    (record,) = open_dataset(write_tar(tmp_path / "a.tar", files))
    assert (record.caption, record.caption_short) == ("one", short)


def test_a_json_beside_a_text_may_be_damaged(tmp_path: Path) -> None:
    files = [("a.png", image_bytes()), ("a.txt", b"one"), ("a.json", b'{"caption_short": "x')]
    (record,) = open_dataset(write_tar(tmp_path / "a.tar", files))
    assert (record.caption, record.caption_short) == ("one", "")


def test_an_image_of_a_gibibyte_in_a_shard_is_a_bad_record(tmp_path: Path) -> None:
    files = [("1.png", image_bytes(1)), ("1.txt", b"one"), ("2.txt", b"two")]
    path = write_tar(tmp_path / "a.tar", files)
    large = tarfile.TarInfo("2.png")
    large.size = 1 << 30
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    with path.open("r+b") as file:
        file.seek(last.offset_data + 512)
        file.write(large.tobuf() + image_bytes(2))
        file.truncate(last.offset_data + 1024 + large.size + 1024)  # a hole, and the end
    index = open_dataset(path, max_bad_fraction=0.5)
    assert [record.caption for record in index] == ["one"]
    assert index.report.bad == {"too_long": 1}
    assert "image is longer than 67,108,864 bytes" in index.report.bad_examples[0]


def test_dotted_names_in_a_shard_are_samples_of_their_own(tmp_path: Path) -> None:
    stems = [f"{number:04}" if number < 12 else f"{number:04}.v2" for number in range(20)]
    files = [
        (f"{stem}.{suffix}", data)
        for stem in stems
        for suffix, data in (("png", image_bytes()), ("txt", stem.encode()), ("mask.png", b"x"))
    ]
    index = open_dataset(write_tar(tmp_path / "a.tar", files))
    assert [record.caption for record in index] == stems
    assert [record.image for record in index] == [f"{stem}.png" for stem in stems]
    assert index.report.bad == {} and index.report.ignored == {"other files": 20}


def test_the_only_caption_of_a_sample_is_taken_and_no_other_image(tmp_path: Path) -> None:
    names = ["a.mask.png", "a.txt", "b.png", "b.cap.txt", "c.1.png", "c.2.txt"]
    good, bad = read(WebDataset(write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])))
    assert [record.image for record in good] == ["b.png"]
    assert {record.reason for record in bad} == {"missing_key"}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "folder"])
def test_a_compressed_shard_is_named_as_such(name: str, tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a", [("a.png", image_bytes()), ("a.txt", b"a")]).read_bytes()
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "0.tar").write_bytes(data)
        (path / "1.tar.gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(gzip.compress(data))
    with pytest.raises(HimoError, match=r"(a|1)\.(tar|tgz|tar.gz): is compressed \(gzip\)"):
        open_dataset(path)
