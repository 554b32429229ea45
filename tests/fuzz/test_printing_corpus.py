"""Names and captions with control sequences, through the commands: they are printed as text."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fuzz_corpus import bounded, corpus
from PIL import Image
from tqdm import tqdm

from himo.checkpoint import save
from himo.cli import main
from himo.model import CONFIGS, HiMoCLIP
from himo.printing import PrintableStream, csv_cell, printable_output

# Each is a character or a sequence that terminals, editors or spreadsheets act on.
HOSTILE = {
    "escape-colour": "\x1b[31m",
    "escape-clear": "\x1b[2J\x1b[H",
    "escape-title": "\x1b]0;title\x07",
    "escape-link": "\x1b]8;;http://192.0.2.1\x1b\\",
    "escape-clipboard": "\x1b]52;c;cm0=\x07",
    "csi-c1": "\x9b31m",
    "osc-c1": "\x9d0;title\x9c",
    "dcs-c1": "\x90q\x9c",
    "next-line-c1": "\x85",
    "start-of-heading": "\x01",
    "bell": "\x07",
    "backspace": "ok\x08\x08no",
    "tab": "\t",
    "vertical-tab": "\x0b",
    "form-feed": "\x0c",
    "carriage-return": "\rhimo: done",
    "shift-out": "\x0e",
    "substitute": "\x1a",
    "delete": "\x7f",
    "right-to-left-override": "\u202egnp.exe",
    "left-to-right-override": "\u202d",
    "embedding": "\u202a\u202b\u202c",
    "isolates": "\u2066\u2067\u2068\u2069",
    "marks": "\u200e\u200f\u061c",
    "line-separator": "\u2028",
    "paragraph-separator": "\u2029",
    "zero-width": "\u200b\u200c\u200d",
    "word-joiner": "\u2060",
    "byte-order-mark": "\ufeff",
    "soft-hyphen": "\xad",
    "annotation": "\ufff9\ufffa\ufffb",
    "tags": "\U000e0041\U000e007f",
    "private-use": "\ue000",
    "unassigned": "\u0378",
    "lone-surrogate": "\udc9b",
    "bytes-of-no-encoding": "\udcff\udcfe",
    "formula": "=cmd|'/c calc'!A1",
    "everything": "".join(map(chr, [*range(1, 10), *range(11, 32), *range(127, 160), 0x202E])),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save(HiMoCLIP(CONFIGS["tiny"]), path)
    return path


def data_set(folder: Path, bad: str) -> Path:
    """Two images with captions that hold the text, and one record whose image is missing."""
    for name in ("0.png", "1.png"):
        Image.new("RGB", (32, 32)).save(folder / name)
    rows = [["filepath", "title"], ["0.png", f"{bad}a cat {bad}. It sits. {bad}"]]
    rows += [["1.png", f"a dog {bad}"], [f"{bad}.png", f"{bad}"]]
    path = folder / "pairs.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)
    return path


def commands(folder: Path, model: Path, bad: str) -> Iterator[list[str]]:
    """Commands that print the text: as a path, an argument, a caption, a key, the name of a run."""
    name, page = f"a{bad}b".replace("/", ":"), str(folder / "page.html")
    pairs = str(data_set(folder, bad))
    run = folder / name
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"name": bad, bad: bad}))
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": -2.5}\n' + json.dumps({bad: bad}) + "\n"
    )
    (run / "eval.json").write_text(json.dumps({"protocol": bad, bad: bad}))
    for at_start in (bad, name):
        yield ["report", at_start, "--out", page]
        yield ["report", str(run), "--out", at_start]
        yield ["eval", "--pretrained", at_start, "--data", pairs, "--allow-missing"]
        yield ["eval", "--pretrained", str(model), "--data", at_start]
        yield ["eval", "--pretrained", str(model), "--cola", at_start]
        yield ["convert", at_start, str(folder / "out"), "--to", "hf"]
        yield ["train", "--train-data", at_start]
        yield ["train", "--train-data", pairs, "--csv-img-key", at_start]
        yield ["plan", "--gpu-mem", "1", "--model", at_start]
        yield ["explain", at_start, "A cat. It sits.", "--pretrained", str(model)]
        yield [at_start]
        yield ["plan", "--gpu-mem", "1", at_start]
    yield ["report", str(run), "--out", page]
    yield ["report", str(run), "--out", f"{run}.html"]
    yield ["explain", str(folder / "0.png"), f"A {bad} cat. It {bad}.", "--pretrained", str(model)]
    yield ["train", "--train-data", pairs]  # whose last image is missing
    yield ["eval", "--pretrained", str(model), "--data", pairs, "--out", f"{folder}/{name}/e.json"]


@pytest.mark.parametrize("bad", corpus(HOSTILE))
def test_commands_print_text_alone(
    bad: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where results go that are named nowhere
    with bounded(seconds=30, mebibytes=400):
        for arguments in commands(tmp_path, model, bad):
            try:
                status = main(arguments)
            except SystemExit as exit:  # of argparse
                status = exit.code
            printed = capsys.readouterr()
            assert status in (0, 2), (arguments, printed.err)
            assert not unprintable(printed.out + printed.err), arguments
            assert printed.out + printed.err
    with open(tmp_path / "page.csv", newline="") as file:
        for row in csv.reader(file):
            assert not unprintable("".join(row))
            assert not row[0].startswith(("=", "+", "-", "@", "\t", "\r")), row


def unprintable(text: str) -> set[str]:
    return {character for character in text if character != "\n" and not character.isprintable()}


@pytest.mark.slow
def test_long_commands_print_text_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = "".join(HOSTILE.values()).replace("\udc9b", "").replace("\udcff\udcfe", "")
    monkeypatch.chdir(tmp_path)
    pairs = str(data_set(tmp_path, bad))
    image = tmp_path / "\x1b[31m\u202e.png"
    Image.new("RGB", (32, 32)).save(image)
    text = f"One {bad}. Two {bad}. Three."
    for arguments in (
        ["eval", "--pretrained", str(model), "--data", pairs, "--allow-missing"],
        ["convert", str(model), "\x1b[31m.pt", "--to", "open_clip"],
        ["explain", str(image), text, "--pretrained", str(model), "--out", "\x1b[31m.html"],
        ["doctor", "--train-data", pairs, "--skip-missing-images", "--logs", "\x1b[31m\u202e"],
    ):
        status = main(arguments)
        printed = capsys.readouterr()
        assert status == (1 if arguments[0] == "doctor" else 0), (arguments, printed.err)
        assert not unprintable(printed.out), arguments
        assert not unprintable(printed.err), arguments
        assert r"\x1b[31m" in printed.out + printed.err or arguments[0] == "eval", arguments


def test_a_fault_of_himo_prints_a_traceback_of_text_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(arguments: object) -> int:
        raise RuntimeError("\r\x1b[31m\x9b\u202ename\nits second line")

    monkeypatch.setattr("himo.tools.plan.run", run)
    assert main(["plan", "--gpu-mem", "1"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback ") and not unprintable(printed)
    assert "RuntimeError: " + r"\r\x1b[31m\x9b\u202ename" + "\nits second line\n" in printed


def test_a_process_of_its_own_prints_text_alone() -> None:
    command = [sys.executable, "-m", "himo", "\x1b[31m\u202e\udc9b"]
    done = subprocess.run(command, capture_output=True, timeout=240)
    assert done.returncode == 2 and not unprintable(done.stdout.decode() + done.stderr.decode())
    assert r"\x1b[31m\u202e\udc9b" in done.stderr.decode()


def test_bars_stay_bars_and_their_texts_are_escaped() -> None:
    screen = io.StringIO()
    with tqdm(
        ["\x1b[2J"], desc="index of \r\x1b[31m\u202e", file=PrintableStream(screen, bars=True)
    ) as bar:
        for item in bar:
            bar.set_postfix_str(item)
    lines = screen.getvalue().split("\r")
    assert len(lines) > 2 and not unprintable("".join(lines))
    assert r"index of \r\x1b[31m\u202e: 100%" in lines[-1] and r"\x1b[2J" in lines[-1]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_the_encoding_of_the_output_lacks_is_escaped(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    with printable_output():
        print("é 名\x1b", end="")
        sys.stdout.flush()
    shown = {"ascii": r"\xe9 \u540d\x1b", "latin-1": r"é \u540d\x1b", "utf-8": r"é 名\x1b"}
    assert written.getvalue().decode(encoding) == shown[encoding]


def test_output_is_the_callers_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), printable_output():
        sys.stdout.writelines(["a\x1b", "\n"])
        raise KeyError
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("himo", "himo"),
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-a", "'-a"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", r"'\t=1"),
        ("\r=1", r"'\r=1"),
        ("\n=1", r"'\n=1"),
        ("＝1", "'＝1"),
        ("a=1", "a=1"),
        ("a\x1b", r"a\x1b"),
    ],
)
def test_no_cell_begins_a_formula(text: str, cell: str) -> None:
    assert csv_cell(text) == cell
