"""benchmarks.report: a page of real cells, what it says of two runs, and the gate."""

import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_plot import ROWS, row

from benchmarks import compare, page, report, run
from benchmarks import rows as table
from benchmarks.cases import Case

VOID = {"meta", "link", "br", "img"}


class Balanced(HTMLParser):
    """Checks that elements end in the order in which they began."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def parse(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import|<script', text)
    return parser


def timed(backend: str, n: int, ms: float, **columns: str) -> table.Row:
    spread = {"time_ms_p20": str(ms), "time_ms_p80": str(1.05 * ms), "ceiling_gbs": "50"}
    return row(backend, n, ms, **spread, **columns)


def doctored(own: float, formula: float = 20.0) -> list[table.Row]:
    """One cell: what the library and the plain formula take, in ms."""
    return [
        timed("cpu", 1024, own, auto="yes", error="1e-6"),
        timed("open_clip", 1024, formula, error="1e-6"),
        timed("open_clip+compile", 1024, 0.9 * formula),
        timed("released", 1024, 2 * formula),
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two small cells."""
    out = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "BASELINE_SECONDS", 0.3)
        patch.setattr(report, "SECONDS", 0.01)
        patch.setattr(report, "CURVE", Case("himo_loss", N=16, D=8))
        patch.setattr(report, "cpu_dtypes", lambda: ("float32",))
        arguments = ["--op", "info_nce", "himo_loss", "--n", "24", "--d", "16", "--minutes", "3"]
        assert report.main([*arguments, "--threads", "1", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_the_page_of_a_real_run(written):
    text = (written / "report.html").read_text()
    parser = parse(text)
    assert parser.seen.count("svg") > 8 and "prefers-color-scheme: dark" in text
    for words in ("InfoNCE", "whole head", "open_clip", "24 GiB", "141 GiB", "GFLOP/s in float32"):
        assert words in text
    assert "Not measured here: inf_cl (needs a CUDA device)" in text
    assert "100 steps of SGD with the whole head" in text
    assert {path.name for path in written.iterdir()} == {
        "report.html", "log.txt", "info_nce.csv", "himo_loss.csv",
    }  # fmt: skip
    rows = table.read(written / "info_nce.csv")
    assert {r["mode"] for r in rows} == {"fwd+bwd"} and {r["threads"] for r in rows} == {"1"}


def test_both_losses_give_one_curve():
    curves = report.curves("cpu", Case("himo_loss", N=32, D=16), steps=20)
    ours, plain = curves["auto"], curves["eager"]
    assert len(ours) == 20 and ours[-1] < ours[0] - 0.05
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 1e-3


def comparison(before: list[table.Row], after: list[table.Row]) -> page.Comparison:
    return page.Comparison("before", compare.changes(before, after), same=True)


def rendered(rows: list[table.Row], found: page.Comparison | None) -> str:
    facts = {"device": "a <CPU>", "threads": "2", "torch": "2.13", "commit": "abc", "load": "0.1"}
    facts |= {"instructions": "AVX2", "cuda": "", "driver": ""}
    curves = {"auto": [2.0, 1.0], "eager": [2.0, 1.0]}
    left_out = [Case("himo_loss", 4096)]
    text = page.render(rows, left_out, curves, facts, found, datetime.now(UTC))
    parse(text)
    return text


def test_a_regression_is_flagged_in_words_and_colour():
    found = comparison(doctored(10.0), doctored(15.0))
    (change,) = found.changes
    assert (change.verdict, change.is_regression) == ("slower", True)
    assert page.sentence(change) == (
        "dual loss 1024 x 768 float32 is slower: 10 ms before, 15 ms now, +50 % after the "
        "baselines' own change"
    )
    text = rendered(doctored(15.0), found)
    assert "1 of 1 cell became slower or no longer runs." in text
    assert '<tr class="bad"><th scope="row">dual loss 1024 x 768' in text
    assert "a &lt;CPU&gt;" in text and "whole head 4096 x 768 float32" in text


@pytest.mark.parametrize(
    ("own", "formula", "verdict"),
    [
        (10.4, 20.0, "within noise"),  # the repeats themselves differ by 5 %
        (15.0, 30.0, "within noise"),  # the baselines became as much slower: the machine
        (8.0, 20.0, "faster"),
        (10.0, 10.0, "slower"),  # on a machine that became twice as fast
    ],
)
def test_noise_and_the_machine_are_no_change(own, formula, verdict):
    found = comparison(doctored(10.0), doctored(own, formula))
    assert [change.verdict for change in found.changes] == [verdict]
    assert ("No regression in 1 cell." in rendered(doctored(own), found)) == (verdict != "slower")


def test_a_cell_that_no_longer_runs_is_a_regression():
    died = row(table.CRASHED, 1024, None, mode="", status="failed", reason="status 1")
    refused = row("cpu", 1024, None, auto="yes", status="inaccurate", reason="not finite")
    for after, reason in (([died], "status 1"), ([refused], "not finite")):
        (change,) = compare.changes(doctored(10.0), after)
        assert change.is_regression
        assert page.sentence(change).endswith(f"no longer runs: {reason}")
        rendered(after, comparison(doctored(10.0), after))


def test_another_machine_is_not_compared():
    found = page.Comparison("before", [], same=False)
    text = rendered(doctored(10.0), found)
    assert "No cell of this run is in before: it is of another machine" in text


def test_every_candidate_is_in_every_chart_of_its_cell():
    rows = [
        *doctored(10.0),
        row("inf_cl", 1024, None, status="refused", reason="needs a CUDA device"),
        row("cpu", 1024, 3.0, auto="yes", config="preset=official"),
        row("open_clip", 1024, 4.0, config="preset=official", error="2e-6"),
    ]
    rows[0] |= {"peak_mib": "5", "fraction": "0.5", "bound": "compute"}
    rows[1] |= {"peak_mib": "9"}
    rows[4] |= {"error": ""}
    text = rendered(rows, None)
    charts = re.findall(r"<figure><figcaption>(.*?)</figcaption>(.*?)</figure>", text, re.DOTALL)
    names = ["himo_kernels", "released", "inf_cl", "open_clip", "open_clip+compile"]
    cell = "dual loss 1024 x 768, float32"
    for title, unit in ((f"{cell}: time", "ms"), (f"{cell}: memory beyond the inputs", "MiB")):
        (chart,) = (chart for name, chart in charts if name == title)
        assert re.findall(r'text-anchor="end">(.*?)</text>', chart) == names
        assert f">{'10 ms' if unit == 'ms' else '5 MiB'}<" in chart
        assert ">needs a CUDA device<" in chart
    assert ">not measured<" in text
    # Cells of other options have charts and errors of their own.
    assert "dual loss 1024 x 768 preset=official, float32: time" in dict(charts)
    for kind in ("dual loss, float32", "dual loss, preset=official, float32"):
        assert f"<h3>{kind}</h3>" in text
    ids = re.findall(r' id="(.*?)"', text)
    assert len(ids) == len(set(ids))
    # Every line chart names its vertical axis; a wide table keeps its first column in view.
    assert text.count('class="tick axis" x="-46"') == 2 and "position: sticky" in text


def test_out_of_memory_is_marked():
    text = rendered(ROWS, None)
    assert text.count(">OOM<") >= 2


@pytest.mark.parametrize(
    ("rows", "below", "words"),
    [
        (doctored(10.0), 0, "ok    1.80x  dual loss 1024 x 768 float32 fwd+bwd (open_clip+compile"),
        (doctored(18.5), 0, "ok    0.97x"),
        (doctored(19.0), 1, "FAIL  0.95x"),
        (doctored(10.0)[:1], 0, "no formula was timed"),
        ([row(table.CRASHED, 8, None, mode="", reason="killed")], 1, "not timed: killed"),
    ],
)
def test_the_gate(rows, below, words, capsys):
    assert compare.gate(rows) == below
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(("own", "status"), [(10.0, 0), (30.0, 1)])
def test_the_gate_is_the_status_of_a_run(own, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure", lambda cases, options, log: doctored(own))
    arguments = ["--op", "dual_info_nce", "--n", "1024", "--out", str(tmp_path)]
    assert run.main(arguments) == 0 and not capsys.readouterr().out
    assert run.main([*arguments, "--gate"]) == status
    assert "below 0.97 fails" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [[], ["--fail-on-regression"]])
def test_the_status_of_a_regression(flag, tmp_path, monkeypatch, capsys):
    facts = {"device": "a CPU", "threads": "2"}
    before, after = doctored(10.0), doctored(15.0)
    table.merge(tmp_path / "dual_info_nce.csv", [r | facts for r in before])
    monkeypatch.setattr(run, "measure", lambda cases, options, log: after)
    monkeypatch.setattr(table, "_cpu_name", lambda: "a CPU")
    monkeypatch.setattr(report, "CURVE", Case("himo_loss", N=16, D=8))
    arguments = ["--baseline", str(tmp_path), "--threads", "2", "--out", str(tmp_path / "new")]
    assert report.main([*arguments, *flag]) == len(flag)
    assert "dual loss 1024 x 768 float32 is slower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x", "--minutes", "0"], "expected above 0 and at most a day, got 0"),
        (["--out", "x", "--baseline", "nowhere"], "nowhere: expected a directory of rows"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = report.main(arguments)
    except SystemExit as exit:  # argparse's own, which prints the usage first
        status = exit.code
    assert status == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())
