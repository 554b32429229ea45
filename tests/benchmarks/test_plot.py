"""Tables and charts from rows; the committed tables match the committed rows."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import charts, plot
from benchmarks import rows as table

ROOT = Path(__file__).parents[2]
TEXTS = [path for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md") if path.exists()]


def row(backend: str, n: int, ms: float | None, **columns: str) -> table.Row:
    measured = {"time_ms_min": str(ms), "time_ms_p50": str(ms), "status": "ok"} if ms else {}
    found = {
        "op": "dual_info_nce", "backend": backend, "mode": "fwd+bwd", "B": "1", "N": str(n),
        "D": "768", "dtype": "float32", "config": "preset=paper", "timing": "wall",
        "device": "a CPU", "threads": "2", "torch": "2.13.0", "load": "0.5", "commit": "abc",
    }  # fmt: skip
    return dict.fromkeys(table.COLUMNS, "") | found | measured | columns


ROWS = [
    row("cpu", 1024, 10.0, auto="yes", peak_mib="5"),
    row("reference", 1024, 12.0),
    row("released", 1024, 25.0, peak_mib="50"),
    row("open_clip", 1024, 15.0, peak_mib="40"),
    row("open_clip+compile", 1024, 13.0),
    row("cpu", 2048, 40.0, auto="yes", peak_mib="10"),
    row("open_clip", 2048, 60.0, peak_mib="160"),
    row("released", 2048, None, status="inaccurate", reason="gradient of x: not finite"),
    row("cpu", 4096, 160.0, auto="yes", peak_mib="20"),
    row("open_clip", 4096, None, status="out of memory", reason="out of memory"),
    row("released", 4096, None, status="out of memory", reason="out of memory"),
]


def test_the_table():
    lines = plot.markdown(ROWS).splitlines()
    assert lines[2:5] == [
        "| dual loss 1024 x 768 | float32 | cpu | 10 | 2.50x | 1.30x (open_clip+compile) "
        "| 5 (0.10x released) |",
        "| dual loss 2048 x 768 | float32 | cpu | 40 | NaN | 1.50x (open_clip) | 10 |",
        "| dual loss 4096 x 768 | float32 | cpu | 160 | OOM | – | 20 (released: OOM) |",
    ]
    assert lines[-1].startswith("a CPU, 2 threads; torch 2.13.0; load 0.5 to 0.5; commit abc; ")


def test_memory_is_compared_with_the_best_formula_where_nothing_is_released():
    rows = [found for found in ROWS if found["backend"] != "released"]
    rows.append(row("open_clip+compile", 2048, 50.0, peak_mib="80"))
    memory = [columns[-1] for columns in plot.table_rows(rows)]
    assert memory == ["5", "10 (0.12x open_clip+compile)", "20"]


def test_the_charts_mark_what_ran_out_of_memory():
    charts = plot.draw(ROWS)
    assert set(charts) == {f"dual_info_nce_float32_{kind}.svg" for kind in ("time", "memory")}
    for svg in charts.values():
        ElementTree.fromstring(svg)
        assert "prefers-color-scheme: dark" in svg and "himo_kernels" in svg
    assert charts["dual_info_nce_float32_memory.svg"].count(">OOM<") == 2
    assert "OOM<" not in charts["dual_info_nce_float32_time.svg"]


def test_a_formula_has_one_colour_in_all_charts_of_an_operator():
    lines = [charts.Line(name, [(8, 1.0), (64, 9.0)]) for name in ("himo_kernels", "released")]
    drawn = charts.svg("t", "ms", [8, 64], lines, ["himo_kernels", "open_clip", "released"])
    assert re.findall(r'class="s(\d) run\d solid"', drawn) == ["0", "2"]


def test_a_compiled_formula_does_not_hide_the_one_beneath():
    lines = [charts.Line(name, [(8, 1.0), (64, 9.0)]) for name in ("eager", "eager+compile")]
    drawn = charts.svg("t", "ms", [8, 64], lines)
    assert re.findall(r'class="s\d run\d (solid|broken)"', drawn) == ["solid", "broken"]
    colours = re.findall(r'class="s(\d) run\d (?:solid|broken)"', drawn)
    assert colours[0] == colours[1]
    radii = re.findall(r'r="([\d.]+)"', drawn)
    assert float(radii[0]) > float(radii[-1])
    assert ">ms</text>" in drawn
    decades = charts.svg("t", "ms", [8, 64], [charts.Line("eager", [(8, 1.0), (64, 99.0)])])
    assert ">ms, log scale</text>" in decades


def test_merging_replaces_what_was_measured_and_keeps_the_rest(tmp_path):
    path = tmp_path / "dual_info_nce.csv"
    table.merge(path, ROWS)
    table.merge(path, [row("cpu", 1024, 9.0, auto="yes")])
    found = table.read(path)
    assert len(found) == len(ROWS)
    (changed,) = (r for r in found if (r["backend"], r["N"]) == ("cpu", "1024"))
    assert changed["time_ms_min"] == "9.0"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_update_replaces_what_is_between_the_markers(tmp_path, capsys):
    table.merge(tmp_path / "dual_info_nce.csv", ROWS)
    name = tmp_path.name
    text = tmp_path / "text.md"
    text.write_text(f"a\n<!-- benchmarks: {name} -->\nold\n<!-- end of benchmarks -->\nb\n")
    assert plot.main([str(tmp_path), "--update", str(text), "--svg", str(tmp_path / "svg")]) == 0
    expected = plot.markdown(table.read(tmp_path / "dual_info_nce.csv"))
    start, end = f"<!-- benchmarks: {name} -->", "<!-- end of benchmarks -->"
    assert text.read_text() == f"a\n{start}\n{expected}\n{end}\nb\n"
    assert len(list((tmp_path / "svg").iterdir())) == 2
    text.write_text("no markers\n")
    assert plot.main([str(tmp_path), "--update", str(text)]) == 2
    assert "expected the lines <!-- benchmarks:" in capsys.readouterr().err
    assert text.read_text() == "no markers\n"


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_folder_without_rows_is_one_line_and_status_2(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert plot.main([str(tmp_path / folder), "--markdown"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_committed_table_is_what_the_committed_rows_say(text):
    content = text.read_text()
    for folder in sorted(path for path in (ROOT / "benchmarks" / "results").iterdir()):
        if f"<!-- benchmarks: {folder.name}" in content:
            tables = plot.tables(folder.name, plot.read_folder(folder))
            assert plot.update(content, tables) == content
