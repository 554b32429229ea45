"""--figures and --pdf: charts as files of their own, and the page as PDF."""

import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import report_runs
from browser import NEEDS_BROWSER

from himo.cli import main
from himo.errors import HimoError
from himo.report import export, write_report
from himo_charts.standalone import charts_of, standalone
from himo_charts.strips import Strip, order_strips


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a HiMo run and a plain CLIP run."""
    folder = tmp_path_factory.mktemp("export")
    runs = [report_runs.write_run(folder / f"tiny-{loss}", loss) for loss in ("himo", "clip")]
    return write_report(runs, folder / "report.html")


def test_every_chart_of_a_page_becomes_a_file(page: Path, tmp_path: Path) -> None:
    names = ["tiny-himo", "<clip> & co"]
    written = export.write_figures(page, tmp_path, names)
    source = page.read_text("utf-8")
    assert len(written) == source.count('role="img"') == len(set(written)) > 20
    wanted = {"spectrum", "rank", "rho-by-k", "rho-by-words", "himo-2", "growth-0-normalised"}
    assert wanted | {"growth-0-order"} <= {path.stem for path in written}
    for path in written:
        root = ElementTree.parse(path).getroot()  # is well-formed
        text = path.read_text("utf-8")
        assert root.tag.endswith("svg") and "var(" not in text and "@media" not in text
        assert 'class="hit"' not in text and "http" not in text.replace("http://www.w3.org/", "")
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        assert root.attrib["viewBox"] == f"0 0 {width:g} {height:g}" and 100 < height < 500
    both = (tmp_path / "contrastive-loss.svg").read_text("utf-8")
    assert "tiny-himo</text>" in both and "&lt;clip&gt; &amp; co</text>" in both
    alone = (tmp_path / "component-loss.svg").read_text("utf-8")  # plain CLIP has none
    assert "tiny-himo</text>" not in alone
    assert "#0063a8" in both  # the first colour, light


def test_charts_of_takes_nested_svg_whole() -> None:
    chart = '<svg width="100%" height="9" role="img" aria-labelledby="a-title a-desc"><svg></svg>'
    page = f"<p>{chart}x</svg></p><svg>other</svg>{chart.replace('a-title', 'b-title')}y</svg>"
    found = charts_of(page)
    assert list(found) == ["a", "b"]
    assert found["a"] == f"{chart}x</svg>" and found["b"].endswith("y</svg>")
    assert charts_of("<p>no chart</p>") == {}


@pytest.mark.parametrize(("steps", "signs", "numbers"), [(1, 1, 2), (16, 16, 9), (119, 0, 12)])
def test_strips_have_a_cell_for_each_step(steps: int, signs: int, numbers: int) -> None:
    falls = [k % 3 == 0 for k in range(steps)]
    name = "<b>" + "n" * 40
    strips = [Strip(1, name, "HiMo@9 = 0.5", falls), Strip(0, "b", "", [False] * steps)]
    root = ElementTree.fromstring(order_strips("x", "Title", "Told", strips))
    cells = [of.attrib for of in root.iter("rect")]
    assert [cell["class"] for cell in cells[:steps]] == ["falls" if f else "rises" for f in falls]
    assert {cell["class"] for cell in cells[steps:]} == {"rises"} and len(cells) == 2 * steps
    lefts = [float(cell["x"].rstrip("%")) for cell in cells[:steps]]
    assert lefts == pytest.approx([100 * k / steps for k in range(steps)], abs=0.01)
    texts = list(root.iter("text"))
    assert sum(of.get("class") == "sign" for of in texts) == 2 * signs
    assert [of.text for of in texts if of.get("class") == "run"] == ["<b>" + "n" * 20 + "…", "b"]
    ticks = [of.text for of in texts if of.get("class") == "tick"]
    assert (
        ticks[0] == "1"
        and len(ticks) == numbers + 1
        and ticks[-1] == "segments of the caption read, k"
    )


def test_what_is_no_chart_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a chart of himo_charts"):
        standalone("<svg>other</svg>", [])


def test_report_writes_figures(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(page.parent / "tiny-himo"), "--out", str(tmp_path / "report.html")]
    folder = tmp_path / "made" / "here"
    assert main(["report", *runs, "--figures", str(folder)]) == 0
    count = len(list(folder.glob("*.svg")))
    assert count > 20 and f"figures: {count} SVG files in {folder}" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--pdf", "--figures"])
def test_what_cannot_be_done_is_said_before_any_work(
    flag: str,
    page: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "report.html"
    given = ["report", str(page.parent / "tiny-himo"), "--out", str(out), flag]
    if flag == "--pdf":
        monkeypatch.setenv("PATH", str(tmp_path))
        said = "--pdf: expected one of chromium, "
    else:
        (tmp_path / "file").write_text("")
        given.append(str(tmp_path / "file" / "folder"))
        said = f"--figures {given[-1]}: Not a directory"
    assert main(given) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not out.exists()


def test_a_browser_that_fails_is_one_line(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "chromium"
    fake.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text("utf-8"))
    with pytest.raises(HimoError, match="ended with status 3: no display"):
        export.print_pdf(copy)
    assert not copy.with_suffix(".pdf").exists()


class TestBrowser:
    pytestmark = NEEDS_BROWSER

    def test_pdf_of_a_page(self, page: Path, tmp_path: Path) -> None:
        copy = tmp_path / "page.html"
        copy.write_text(page.read_text("utf-8"))
        made = export.print_pdf(copy)
        data = made.read_bytes()
        assert made == tmp_path / "page.pdf" and data.startswith(b"%PDF-")
        assert len(re.findall(rb"/Type\s*/Page\b", data)) >= 3
        assert {path.name for path in tmp_path.iterdir()} == {"page.html", "page.pdf"}


@pytest.mark.skipif(shutil.which("rsvg-convert") is None, reason="no rsvg-convert is installed")
def test_another_program_draws_the_figures(page: Path, tmp_path: Path) -> None:
    for path in export.write_figures(page, tmp_path, ["a", "b"])[:4]:
        out = path.with_suffix(".pdf")
        done = subprocess.run(["rsvg-convert", "-f", "pdf", "-o", out, path], capture_output=True)
        assert done.returncode == 0 and done.stderr == b""
        assert out.read_bytes().startswith(b"%PDF-")
