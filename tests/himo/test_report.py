"""The report page: what it says of whole, partial and damaged runs, and that it is safe."""

import argparse
import csv
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_runs

from himo import report
from himo.cli import main
from himo.errors import HimoError
from himo.report import growth, monotonicity, rendering, training
from himo.report import runs as reader
from himo_charts import scales, svg

HOSTILE = (
    "</title></style><script>alert(1)</script><img src=http://192.0.2.1/x onerror=a()>\"'&\x07"
)


class Page(HTMLParser):
    """The elements of a page; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(text)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A HiMo run and a plain CLIP run."""
    folder = tmp_path_factory.mktemp("runs")
    return [report_runs.write_run(folder / f"tiny-{loss}", loss) for loss in ("himo", "clip")]


def assert_self_contained(page: Page) -> None:
    """Nothing on the page is fetched or run."""
    assert set(page.tags).isdisjoint({"script", "iframe", "object", "embed", "base", "form", "use"})
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value is not None and value.startswith("data:"), (tag, name, value)
        if name == "style":
            assert re.fullmatch(r"--a:[01](\.\d+)?", value or ""), value
    style_text = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert len(style_text) == 1
    assert "url(" not in style_text[0] and "@import" not in style_text[0]
    assert "default-src 'none'" in page.source


def bare_run(folder: Path, **files: str | bytes) -> Path:
    """A run directory of some files only: config, metrics, eval."""
    names = {"config": "config.json", "metrics": "metrics.jsonl", "eval": "eval.json"}
    folder.mkdir(parents=True)
    for key, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / names[key]).write_bytes(raw)
    return folder


def test_page_shows_two_runs(runs: list[Path], tmp_path: Path) -> None:
    path = report.write_report(runs, tmp_path / "report.html")
    page = Page(path)
    assert_self_contained(page)
    assert page.source.count("<h1>") == 1
    assert "They differ in loss (himo, clip)." in page.text.replace(" . ", ". ").replace("  ", " ")
    assert "Retrieval while training" in page.source and "val-text-to-image-R1" in page.source
    for heading in ("Retrieval", "Single images", "Loss", "What the projection keeps", "Settings"):
        assert f"<h2>{heading}</h2>" in page.source
    thumbnails = sum(map(len, re.findall(r'src="data:image[^"]*"', page.source)))
    assert thumbnails > 10_000
    assert len(page.source.encode()) - thumbnails < 200_000
    # Each chart has a title, a description, a table, and a name of its vertical axis if it has one.
    charts = page.source.count('role="img"')
    named = len(re.findall(r'<text class="tick axis" x="-46"[^>]*>[^<]+</text>', page.source))
    assert named == charts - page.source.count('-order-title"')
    assert charts >= 25
    assert page.source.count("<desc ") == charts
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    labelled = [value for _, name, value in page.attributes if name == "aria-labelledby"]
    assert set(" ".join(v or "" for v in labelled).split()) <= set(ids)
    figures = re.findall(r"<figure.*?</figure>", page.source, re.DOTALL)
    assert figures and all("<table" in figure for figure in figures)


def test_numbers_beside_the_page_are_those_of_the_runs(runs: list[Path], tmp_path: Path) -> None:
    report.write_report(runs, tmp_path / "r.html")
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    written = [
        json.loads(line)
        for run in runs
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == len(written)
    for row, line in zip(rows, written, strict=True):
        for name in ("step", *reader.COLUMNS):
            value = line.get(name)
            assert row[name] == "" if value is None else float(row[name]) == value
    result = json.loads((tmp_path / "r.json").read_text())
    assert [entry["run"] for entry in result["runs"]] == ["tiny-himo", "tiny-clip"]
    for entry, run in zip(result["runs"], runs, strict=True):
        assert entry["config"] == json.loads((run / "config.json").read_text())
        stored = json.loads((run / "eval.json").read_text())
        assert entry["evaluation"]["retrieval"] == stored["retrieval"]
        assert (
            entry["last_metrics"]["loss"]
            == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        )
        assert "thumbnail" not in entry["evaluation"]["curves"][0]


def test_everything_from_data_is_escaped(tmp_path: Path) -> None:
    run = report_runs.write_run(tmp_path / 'a\'b & "c" <img src=x>', "himo", steps=100)
    config = report_runs.config("himo", 0, model=HOSTILE, **{HOSTILE: HOSTILE})
    (run / "config.json").write_text(json.dumps(config))
    result = report_runs.evaluation("himo", 0)
    result["model"] = {"path": HOSTILE, "sha256": HOSTILE}
    result["protocol"] |= {"dataset": HOSTILE, "sentence_rule": HOSTILE}
    result["coverage"] = {"used": 1, "total": 9, "left_out": {HOSTILE: 8}}
    result["himo"][HOSTILE] = {"value": 0.5, "used": 3, "left_out": 1}
    result["curves"] += [
        {"image": HOSTILE, "thumbnail": bad, "segments": [HOSTILE, "\ud800\u202e"],
         "scores": [0.1, 0.2]}
        for bad in ("http://192.0.2.1/x.png", 'data:image/png;base64,A" onload="x',
                    "data:text/html;base64,AAAA", "data:image/svg+xml;base64,AAAA", 7)
    ]  # fmt: skip
    picture = {"name": HOSTILE, "thumbnail": "http://192.0.2.1/x.png"}
    result["misses"] = [{"caption": HOSTILE, "rank": 2, "image": picture, "top": [picture] * 9}]
    result["chosen"] = {"curves": HOSTILE, "misses": [HOSTILE]}
    (run / "eval.json").write_text(json.dumps(result))
    page = Page(report.write_report([run], tmp_path / "r.html"))
    assert_self_contained(page)
    assert "alert(1)" in page.text  # shown as text
    assert "\x07" not in page.source and "\u202e" not in page.source
    assert page.tags.count("img") == 6


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config": "{}"}, ["metrics.jsonl is missing", "eval.json is missing"]),
        ({"metrics": ""}, ["metrics.jsonl is empty", "config.json is missing"]),
        ({"metrics": "\n\n"}, ["metrics.jsonl is empty"]),
        ({"metrics": '{"step": 1, "loss": 2.0}\n{"st'}, ["1 line could not", "is cut off"]),
        ({"metrics": '{"step": 1, "loss": NaN}\n'}, ["NaN or infinite: loss (1)"]),
        ({"metrics": '{"step": 1, "loss": 1e999, "lr": null}\n'}, ["infinite: loss (1)"]),
        ({"metrics": '{"step": 1, "spectrum": [1e308, 1e308, NaN]}\n'}, ["No run logged a spec"]),
        ({"metrics": '{"step": "x"}\n[1]\n7\n{"step": true}\n'}, ["4 lines could not be read"]),
        ({"metrics": b"\xff\xfe\n" + b"[" * 10**5 + b"\n"}, ["2 lines could not be read"]),
        ({"metrics": '{"step": ' + "9" * 5000 + "}\n"}, ["1 line could not be read"]),
        ({"metrics": '{"step": 3, "loss": ' + "9" * 400 + "}\n"}, ["infinite: loss (1)"]),
        ({"eval": "{"}, ["eval.json cannot be read"]),
        ({"eval": "[]"}, ["eval.json holds list, not an object"]),
        ({"eval": "{}"}, ["No run has retrieval results", "eval.json holds no similarity curves"]),
        ({"eval": '{"retrieval": [], "himo": 3, "curves": {}}'}, ["no similarity curves"]),
        ({"eval": '{"retrieval": {"image_to_text": {"R@1": NaN}}}'}, ["No run has results for"]),
        ({"eval": '{"himo": {"HiMo@2": {"value": null, "used": 0}}}'}, ["No run has a value of"]),
        ({"eval": '{"curves": [{}, {"segments": ["a"], "scores": []}]}'}, ["2 similarity curves"]),
        ({"eval": '{"curves": [{"segments": ["a", "b"], "scores": [NaN, 1]}]}'}, ["no thumbnail"]),
        (
            {"eval": '{"misses": [7, {}, {"caption": "c", "rank": true}]}'},
            ["3 misses of retrieval"],
        ),
        ({"eval": '{"misses": {"a": 1}, "curves": []}'}, ["no similarity curves"]),
        (
            {"eval": '{"misses": [{"caption": "c", "rank": 2, "image": {}, "top": [[]]}]}'},
            ["1 miss of retrieval"],
        ),
        (
            {"eval": '{"misses": [{"caption": "c", "rank": 2, "image": {}, "top": [{}]}]}'},
            ["What it mistakes", "its image: rank 2", "no thumbnail", "is not recorded"],
        ),
        ({"config": '{"loss": "himo", "preset": [], "tau": "x", "model": 3}'}, ["is missing"]),
    ],
)
def test_partial_and_damaged_runs(
    files: dict[str, str | bytes], said: list[str], tmp_path: Path
) -> None:
    run = bare_run(tmp_path / "run", **files)
    page = Page(report.write_report([run], tmp_path / "r.html"))
    assert_self_contained(page)
    for words in said:
        assert words in page.text
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)


def test_damaged_run_beside_a_whole_one(runs: list[Path], tmp_path: Path) -> None:
    broken = bare_run(tmp_path / "broken", config="{", metrics='{"step": 5, "lr": 0.1}\n')
    page = Page(report.write_report([*runs, broken], tmp_path / "r.html"))
    assert "broken: config.json cannot be read" in page.text
    assert "Not logged by tiny-clip, broken." in page.text


def test_random_damage_gives_a_page_or_one_clear_error(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    whole = {
        "config": json.dumps(report_runs.config("himo", 0)),
        "metrics": "".join(
            json.dumps(line) + "\n" for line in report_runs.metrics("himo", 0, steps=60)
        ),
        "eval": json.dumps(report_runs.evaluation("himo", 0, images=20, pictures=1)),
    }
    values = ["null", "NaN", "-1e400", '"x"', "[]", "{}", "true", "0", "-3", "1e-320", "[[1]]"]
    for number in range(25):
        files: dict[str, str | bytes] = {}
        for name, content in whole.items():
            for _ in range(rng.randint(0, 6)):
                # A number, a string or a word of the JSON becomes something else.
                token = rng.choice(list(re.finditer(r'-?\d[\d.e+-]*|"[^"]{0,40}"(?!:)', content)))
                content = content[: token.start()] + rng.choice(values) + content[token.end() :]
            if rng.random() < 0.2:
                content = content[: rng.randrange(len(content))]
            files[name] = content
        run = bare_run(tmp_path / f"run{number}", **files)
        try:
            page = Page(report.write_report([run], tmp_path / "r.html"))
        except HimoError:
            pytest.fail(f"seed {seed}, case {number}: refused")
        assert_self_contained(page)


@pytest.mark.parametrize("what", ["missing", "file", "empty", "parent", "twice", "suffix", "out"])
def test_bad_arguments_are_one_line_and_exit_code_2(
    what: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "r.html", runs[0]
    given, said = {
        "missing": ([tmp_path / "none"], "does not exist"),
        "file": ([run / "eval.json"], "is not a directory"),
        "empty": ([tmp_path], "is not a run, expected config.json, metrics.jsonl, eval.json"),
        "parent": ([run.parent], "it holds runs (tiny-clip, tiny-himo): name those"),
        "twice": ([run, run], "given twice"),
        "suffix": ([run], "expected a name that ends in .html"),
        "out": ([run], "cannot be written"),
    }[what]
    if what == "suffix":
        out = tmp_path / "report.txt"
    if what == "out":
        out = tmp_path / "none" / "r.html"
    before = sorted(tmp_path.iterdir())
    assert main(["report", *map(str, given), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_full_disk_leaves_the_earlier_report(runs: list[Path], small_disk: Path) -> None:
    page = report.write_report(runs[:1], small_disk / "r.html")
    before = page.read_bytes()
    (small_disk / "filler").write_bytes(bytes(1_650_000))
    with pytest.raises(HimoError, match="bytes free"):
        report.write_report(runs, page)
    assert page.read_bytes() == before
    names = sorted(path.name for path in small_disk.iterdir())
    assert names == ["filler", "r.csv", "r.html", "r.json"]


def test_command_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my report.html"
    assert main(["report", str(runs[0]), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "my report.csv", "my report.html", "my report.json",
    ]  # fmt: skip
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert parser.parse_args(["a", "b"]).out == "report.html"


def test_lines_logged_again_after_a_resume_replace_the_earlier(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": float(s)} for s in (10, 20, 30)]
    lines += [{"step": s, "loss": -float(s)} for s in (20, 30, 40)]
    run = bare_run(tmp_path / "run", metrics="".join(json.dumps(x) + "\n" for x in lines))
    read = reader.read_run(run)
    assert read.step == [10, 20, 30, 40]
    assert read.column("loss") == [10.0, -20.0, -30.0, -40.0]
    assert any("2 lines logged again" in note for note in read.notes)


def test_runs_are_named_apart(tmp_path: Path) -> None:
    paths = [bare_run(tmp_path / parent / "run", config="{}") for parent in "ab"]
    assert [run.label for run in reader.read_runs(paths)] == ["a/run", "b/run"]


def test_runs_evaluated_differently_are_not_compared(runs: list[Path], tmp_path: Path) -> None:
    result = report_runs.evaluation("clip", 0)
    result["protocol"]["dataset_sha256"] = "other"
    result["coverage"] = {"used": 480, "total": 500, "left_out": {"truncated": 20}}
    other = bare_run(tmp_path / "other", eval=json.dumps(result))
    page = Page(report.write_report([runs[0], other], tmp_path / "r.html"))
    assert "evaluated differently (dataset_sha256): their results cannot be compared" in page.text
    assert "other: evaluated on 480 of 500 samples (left out: truncated: 20)" in page.text
    assert "ranks its caption first" not in page.text


def test_shared_captions_and_ties_are_said(tmp_path: Path) -> None:
    result = report_runs.evaluation("himo", 0)
    result["protocol"] |= {"texts": 40, "shared_captions": 490}
    result["retrieval"]["ties"] = {"image_to_text": 3, "text_to_image": 0}
    run = bare_run(tmp_path / "run", eval=json.dumps(result))
    page = Page(report.write_report([run], tmp_path / "r.html"))
    assert (
        "run: 500 captions are 40 distinct texts, and 490 are captions of several images: "
        "each of these is right." in page.text
    )
    assert (
        "run: wrong answers that tie with the right one count as above it "
        "(image to text 3, text to image 0)." in page.text
    )


@pytest.mark.parametrize("texts", [500, 40])
def test_an_older_result_differs_only_where_captions_are_shared(texts: int, tmp_path: Path) -> None:
    result = report_runs.evaluation("himo", 0)
    result["protocol"] |= {"texts": texts, "shared_captions": 500 - texts}
    newer = bare_run(tmp_path / "newer", eval=json.dumps(result))
    for key in ("texts", "pairs", "shared_captions"):
        del result["protocol"][key]
    del result["retrieval"]["ties"]
    older = bare_run(tmp_path / "older", eval=json.dumps(result))
    page = Page(report.write_report([newer, older], tmp_path / "r.html"))
    assert ("evaluated differently (texts)" in page.text) is (texts == 40)


def test_further_measures_and_what_they_left_out(tmp_path: Path) -> None:
    result = report_runs.evaluation("himo", 0)
    part = {"used": 90, "total": 100, "left_out": {"missing": 10}}
    result["himo"]["HiMo-Docci"] = {"value": 0.91237, "used": 90, "left_out": 10, "coverage": part}
    result["cola"] = {
        "accuracy": 31.25,
        "used": 32,
        "left_out": 68,
        "coverage": {**part, "used": 32},
    }
    result["protocol"]["texts_cut"] = 7
    run = bare_run(tmp_path / "run", eval=json.dumps(result))
    page = Page(report.write_report([run], tmp_path / "r.html"))
    assert "0.9124 90 10" in page.text and "31.25 % 32 68" in page.text
    assert "run on HiMo-Docci: evaluated on 90 of 100 samples (left out: missing: 10)" in page.text
    assert "run on COLA: evaluated on 32 of 100 samples" in page.text
    assert "7 texts were longer than the model's context and cut" in page.text


def test_settings_that_differ_are_marked(runs: list[Path]) -> None:
    read = reader.read_runs(runs)
    assert reader.differing(read)[0] == ["loss", "name", "command"]
    read[1].config = {**(read[1].config or {}), "wd": 0.010, "seed": False, "extra": None}
    different, same = reader.differing(read)
    assert different == ["loss", "seed", "name", "command", "extra"]
    assert "wd" in same and "tau" in same


def test_rank_and_tau(runs: list[Path]) -> None:
    himo, clip = reader.read_runs(runs)
    spectrum = reader.Spectrum(1, None, (0.5, 0.3, 0.15, 0.05))
    assert spectrum.cumulative() == pytest.approx([0.5, 0.8, 0.95, 1.0])
    assert training.chosen_rank(himo, spectrum) == 3  # tau 0.9 of the paper's preset
    assert training.chosen_rank(clip, spectrum) is None
    assert training.chosen_rank(himo, reader.Spectrum(1, 2, spectrum.ratios)) == 2
    assert himo.config is not None
    himo.config["preset"] = "official"
    assert training.chosen_rank(himo, reader.Spectrum(1, None, (0.86, 0.14))) == 1  # tau 0.85
    himo.config["tau"] = 0.5
    assert training.chosen_rank(himo, spectrum) == 1


def test_violations_and_normalisation() -> None:
    assert growth.falls([0.1, 0.2, 0.2, 0.15, 0.3]) == [3, 4]
    assert growth.falls([0.1, math.nan, 0.3]) == [2, 3]
    assert growth.normalised([2.0, 4.0, 3.0]) == [0.0, 1.0, 0.5]
    assert growth.normalised([2.0, 2.0]) == [0.5, 0.5]
    assert growth.pearson([1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert growth.pearson([1.0, 1.0, 1.0]) == 0.0
    assert math.isnan(growth.pearson([1.0, math.inf]))


def test_curves_of_runs_are_joined_by_image_and_segments(runs: list[Path]) -> None:
    read = reader.read_runs(runs)
    shown = growth.examples(read, 8)
    assert [example.image for example in shown] == [curve.image for curve in read[0].curves]
    assert all(len(example.scores) == 2 for example in shown)
    read[1].curves[0] = reader.Curve(read[1].curves[0].image, None, ("other",), (0.1,))
    assert [len(example.scores) for example in growth.examples(read, 8)] == [2] * 5 + [1] * 2


def test_segments_are_tinted_by_what_they_add(runs: list[Path], tmp_path: Path) -> None:
    curves = ((0, (0.1, 0.3, 0.2, 0.2)), (1, (0.5, 0.9, 0.9, 0.7)))
    example = growth.Example("x.png", None, tuple("abcd"), curves)
    assert growth.gains(example) == [None, *map(pytest.approx, (1.0, -0.25, -0.25))]
    shown = growth.card("x", example, ["one", "two"])["segments"]
    assert [css for _, css, _ in shown] == ["first", "raises", "lowers", "lowers"]
    assert [float(shade) for *_, shade in shown] == [0, 0.4, 0.145, 0.145]
    bad = growth.Example("x.png", None, tuple("ab"), ((0, (math.nan, 0.2)),))
    assert growth.gains(bad) == [None, None]
    alone, both = (
        Page(report.write_report(runs[:count], tmp_path / f"{count}.html")).text for count in (1, 2)
    )
    legend = "What a segment adds to the similarity"
    assert f"{legend}: lowers it much or little" in alone
    assert f"{legend}, as the mean of the runs:" in both


def test_curves_say_that_they_are_min_max_and_raw_is_beside(
    runs: list[Path], tmp_path: Path
) -> None:
    source = report.write_report(runs, tmp_path / "r.html").read_text()
    cards = re.findall(r'<article class="growth.*?</article>', source, re.DOTALL)
    assert len(cards) == 6
    for card in cards:
        assert card.count('type="radio"') == 2 and card.count('class="show-raw"') == 1
        first, raw = re.findall(r'<div class="(?:normalised|raw)">.*?</svg></div>', card, re.DOTALL)
        assert ">min–max: 0 = lowest, 1 = highest of each curve</text>" in first
        assert ">cosine similarity</text>" in raw


def test_how_images_were_chosen_is_said(runs: list[Path], tmp_path: Path) -> None:
    page = Page(report.write_report(runs, tmp_path / "r.html"))
    assert "does not rise. 6 of 458 captions of at least 4 parts, drawn at random." in page.text
    assert (
        "tiny-himo: 6 of 294 captions, drawn at random. tiny-clip: 6 of 289 captions, drawn at "
        "random. The first 3 of these are shown for each." in page.text
    )


def test_a_mistake_is_shown_with_the_five_images_that_fit_best(
    runs: list[Path], tmp_path: Path
) -> None:
    source = report.write_report(runs[:1], tmp_path / "r.html").read_text()
    misses = re.findall(r'<article class="miss .*?</article>', source, re.DOTALL)
    assert len(misses) == 6
    for number, miss in enumerate(misses, 6):
        places = re.findall(r'<li( class="right")?><img [^>]*alt="images/0*(\d+).png">', miss)
        assert [int(name) for _, name in places] == list(range(number - 2, number + 3))
        assert [bool(right) for right, _ in places] == [False, False, True, False, False]
        assert "its image: rank 3" in miss and "<small>3 ✓</small>" in miss


def test_losses_of_different_kinds_do_not_share_an_axis(runs: list[Path]) -> None:
    himo, clip = reader.read_runs(runs)
    totals = training.losses([himo, clip])[2:]
    assert [figure.title for figure in totals] == ["Total loss, himo", "Total loss, clip"]
    drawn = [set(re.findall(r"run\d", figure.chart or "")) for figure in totals]
    assert drawn == [{"run0"}, {"run1"}]
    (same,) = training.losses([himo, himo])[2:]
    assert same.title == "Total loss" and {"run0", "run1"} <= set(
        re.findall(r"run\d", same.chart or "")
    )


def test_the_best_epoch_is_marked(runs: list[Path]) -> None:
    (run,) = reader.read_runs(runs[:1])
    names = [f"val_{way}_R@1" for way in ("image_to_text", "text_to_image")]
    validated = [at for at, value in enumerate(run.column(names[0])) if value is not None]
    first, second, third, *_ = validated
    for name, values in zip(names, ((50.0, 60.0, 70.0), (50.0, 62.0, 51.0)), strict=True):
        run.columns[name] = [None] * len(run.step)
        for at, value in zip((first, second, third), values, strict=True):
            run.columns[name][at] = value
    assert training.best_line(run) == second  # of the mean, not of one direction
    for figure in training.validation([run]):
        assert "Ringed: the epoch of the best mean of both R@1 (tiny-himo 2)." in figure.caption
        (place,) = re.findall(
            r'best"><circle cx="([\d.]+)%".*?best at step (\d+)', figure.chart or ""
        )
        span = run.step[third] - run.step[first]
        expected = 100 * (run.step[second] - run.step[first]) / span
        assert float(place[0]) == pytest.approx(expected, abs=0.01)
        assert int(place[1]) == run.step[second]
    run.columns[names[1]] = [None] * len(run.step)
    assert training.best_line(run) is None


def test_followed_captions_are_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report_runs.write_run(folder, "himo", 2)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for rank, line in zip((7, 1, 3), lines, strict=False):
        own = {"image": "a.jpg", "caption": "A <b>cat</b>.", "rank": rank, "best": "A dog."}
        other = {"image": "b.jpg", "caption": "A bird.", "rank": 2, "best": "A bird."}
        broken = {"image": 3, "caption": None, "rank": "x", "best": []}
        line["predictions"] = [own, broken, other]
    lines[3]["predictions"] = "nothing"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page = tmp_path / "report.html"
    report.write_report([folder], page)
    (run,) = reader.read_runs([folder])
    table = training.predictions([run])
    assert table is not None
    assert table.rows == [
        ["a.jpg", "A <b>cat</b>.", "7 → 1 → 3", "A dog."],
        ["b.jpg", "A bird.", "2 → 2 → 2", "its own"],
    ]
    text = page.read_text(encoding="utf-8")
    assert "A &lt;b&gt;cat&lt;/b&gt;." in text and "<b>cat" not in text
    run.followed = []
    assert training.predictions([run]) is None


def test_bars_begin_at_zero_on_both_sides() -> None:
    y = scales.Scale(-0.5, 1.5)
    chart = svg.bar_chart(
        "i", "t", "d", ["a", "b"], [[1.0, -0.5]], y, y_label="ρ", chance=[None] * 2
    )
    bars = re.findall(r'<rect class="bar" x="[\d.]+%" y="([\d.]+)%" .*?height="([\d.]+)%"', chart)
    assert bars == [("25", "50"), ("75", "25")]
    (wide, thin) = re.findall(
        r'width="([\d.]+)%" height="16"',
        svg.bar_list("i", "t", "d", [svg.Bar(0, "a", 1e6, ""), svg.Bar(1, "b", 1.0, "")]),
    )
    assert float(wide) == 100 and float(thin) > 0.5


def test_long_runs_stay_small(tmp_path: Path) -> None:
    rng = random.Random(5)
    line = report_runs.metrics("himo", 0, steps=10)[0]
    lines = [line | {"step": step, "loss": rng.random()} for step in range(1, 10_000)]
    run = bare_run(tmp_path / "run", config=json.dumps(report_runs.config("himo", 0)))
    report_runs.write_metrics(run, lines)
    page = report.write_report([run], tmp_path / "r.html")
    assert page.stat().st_size < 120_000


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    """WCAG 2: 7 for text, 4.5 for the quiet text and for the colours of runs, which carry text."""
    light, dark = svg.style().split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--(\w+): (#\w{6});", light if scheme == "light" else dark))
    wanted = {"text": 7.0, "quiet": 4.5, "bad": 4.5}
    wanted |= {f"c{i}": 4.5 for i in range(svg.COLOURS)}
    for name, least in wanted.items():
        for ground in ("page", "panel", "mark") if name in ("text", "quiet") else ("page",):
            pair = sorted([luminance(colours[name]), luminance(colours[ground])])
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, (name, ground)


def test_headline_names_the_best_value_only(runs: list[Path], tmp_path: Path) -> None:
    page = report.write_report(runs, tmp_path / "two.html").read_text()
    shown: list[Any] = re.findall(r"<dd( class=best)?>([\d.,]+)<small>", page)
    assert shown[0] == (" class=best", "62.2") and shown[1] == ("", "61.2")
    alone = report.write_report(runs[:1], tmp_path / "one.html").read_text()
    assert alone.count("class=best") == 0 and alone.count("<dd>") == 6


def test_no_template_is_exempt_from_escaping() -> None:
    # Only text that the chart engine and the templates themselves have made is not escaped again.
    folder = Path(rendering.__file__).parent
    for path in [*folder.glob("templates/*"), *folder.glob("*.py")]:
        content = path.read_text()
        assert not re.search(r"\|\s*safe\b|autoescape\s+false|autoescape=False", content), path
        assert "Markup(" not in content.replace("Markup(svg.page_style())", ""), path


def test_correlation_by_words_is_the_mean_over_groups_of_similar_length(tmp_path: Path) -> None:
    words = [40, 10, 20, 30, 50, 60, 10, 20, 30, 40, 50, 60]
    rho = [0.1 * place for place in range(12)]
    histogram = {"K": [4] * 12, "rho": rho, "words": words}
    evaluation = {"himo": {"HiMo@K": {"value": 0.55}}, "histogram": histogram}
    run = reader.read_run(bare_run(tmp_path / "run", eval=json.dumps(evaluation)))
    shown = monotonicity.himo([run])
    assert shown is not None
    figure = shown["figures"][-1]
    assert figure.title == "Correlation by length of the caption"
    expected = [
        ("10", 0.35), ("11–20", 0.45), ("21–30", 0.55),
        ("31–40", 0.45), ("41–50", 0.7), ("51–60", 0.8),
    ]  # fmt: skip
    assert [(row[0], float(row[1]), row[2]) for row in figure.table.rows] == [
        (name, pytest.approx(value), "2") for name, value in expected
    ]
    # An older file has no words, and captions of one length have nothing to compare.
    for changed in ({"words": None}, {"words": [7] * 12}, {"words": [10]}):
        evaluation["histogram"] = histogram | changed
        run = reader.read_run(bare_run(tmp_path / str(changed), eval=json.dumps(evaluation)))
        shown = monotonicity.himo([run])
        assert shown is not None
        assert [f.title for f in shown["figures"]] == ["Similarity and length"]
