"""`himo bench data`: its rows, and what it refuses."""

import re
import sys
from pathlib import Path

import pytest
from captioned_files import write_csv, write_images

from himo.cli import main


@pytest.fixture
def pairs(tmp_path) -> Path:
    names = write_images(tmp_path, 12)
    return write_csv(tmp_path / "pairs.csv", [(name, f"Card {name}.") for name in names])


def flags(pairs: Path, *more: str) -> list[str]:
    given = ["bench", "data", "--train-data", str(pairs), "--model", "tiny", "--batch-size", "4"]
    return [*given, "--seconds", "0.05", "--workers", "0", *more]


def rows(text: str) -> dict[str, list[float]]:
    """ms a pair, pairs a second and pairs of each row."""
    pattern = re.compile(r"^([a-z].*?) {2,}([\d.]+) +([\d.]+) +(\d+)$", re.MULTILINE)
    return {m[1]: [float(number) for number in m.groups()[1:]] for m in pattern.finditer(text)}


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["--no-token-cache"], ["decode", "resize and crop", "tokenise"]),
        ([], ["decode", "resize and crop", "read tokens"]),
        (["--image-mode", "fast"], ["decode, resize and crop", "read tokens"]),
    ],
)
def test_each_step_and_the_loader_have_a_row(capsys, pairs, more, steps):
    assert main(flags(pairs, *more)) == 0
    text = capsys.readouterr().out
    found = rows(text)
    assert list(found) == [*steps, "one process", "loader, --workers 0"]
    for each_ms, per_second, pairs_read in found.values():
        assert each_ms > 0 and per_second == pytest.approx(1e3 / each_ms, rel=0.5)
        assert pairs_read >= 4
    together = sum(found[step][0] for step in steps)
    assert found["one process"][0] == pytest.approx(together, abs=0.02)
    assert "Without workers a step of 4 pairs\nalways waits for the loader, " in text
    assert max(map(len, text.splitlines()[1:])) < 80


def test_batches_that_were_ready_are_not_counted(capsys, pairs):
    assert main(flags(pairs, "--workers", "1")) == 0
    text = capsys.readouterr().out
    assert rows(text)["loader, --workers 1"][2] % 4 == 0
    assert "A step of 4 pairs\nwaits for the loader where it takes less than " in text


def test_the_bar_foretells_no_end_that_the_seconds_decide(capsys, monkeypatch, pairs):
    assert main(flags(pairs)) == 0  # makes the index and the tokens, whose bars know their end
    monkeypatch.setattr("himo.progress.DELAY_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(flags(pairs)) == 0
    shown = capsys.readouterr().err
    assert "by step: 0pair" in shown and "%" not in shown


def test_clock_that_stands_still_leaves_out_the_rate(capsys, monkeypatch, pairs):
    monkeypatch.setattr("time.perf_counter", lambda: 5.0)
    monkeypatch.setattr("himo.tools.bench._MAX_BATCHES", 20)  # what ends the loader then
    assert main(flags(pairs)) == 0
    text = capsys.readouterr().out
    assert re.search(r"^decode +0\.00 +- +12$", text, re.MULTILINE)
    assert re.search(r"^loader, --workers 0 +0\.00 +- +80$", text, re.MULTILINE)


def test_images_that_cannot_be_read_are_left_out(capsys, pairs):
    (pairs.parent / "images/003.png").write_bytes(b"no image")
    assert main(flags(pairs, "--max-bad-fraction", "0.5")) == 0
    assert rows(capsys.readouterr().out)["decode"][2] <= 11
    for image in (pairs.parent / "images").iterdir():
        image.write_bytes(b"no image")
    assert main(flags(pairs, "--max-bad-fraction", "1")) == 2
    assert "none of the images tried can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seconds", "0"], "--seconds: expected above 0 and up to 3600, got 0.0"),
        (["--seconds", "nan"], "--seconds: expected above 0 and up to 3600, got nan"),
        (["--batch-size", "13"], "12 samples do not fill one batch of 13"),
        (["--workers", "-1"], "--workers: expected 0 to 1024, got -1"),
        (["--model", "ViT-Z"], "--model: expected one of ViT-B-32"),
        (["--train-data", "nothing.csv"], "nothing.csv: cannot be read"),
        (["--train-data", ""], "--train-data: expected a data set, got none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named(capsys, pairs, more, said):
    assert main(flags(pairs, *more)) == 2
    message = capsys.readouterr().err
    assert message.startswith("himo: error: ") and said in message and message.count("\n") == 1
