"""The report in a real browser: what it shows, that it loads nothing, and that it fits a phone."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import report_runs
from browser import NEEDS_BROWSER, POLICY, SCREENS, Elements, browse, measured

from himo import report

pytestmark = NEEDS_BROWSER
# Adds the elements shown before and after the switches are used.
PROBE = """
const shown = s => [...document.querySelectorAll(s)].filter(e => e.getClientRects().length).length;
const state = () => ({
  normalised: shown('.normalised'), raw: shown('.raw'),
  first: shown('figure path.run0'), second: shown('figure path.run1'),
});
result.before = state();
result.outside = [...document.querySelectorAll('svg text')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.left < 0 || box.right > width);
}).map(e => e.textContent);
result.smallest = Math.min(...[...document.querySelectorAll('svg text')].map(
  e => parseFloat(getComputedStyle(e).fontSize)));
// A table wider than its box scrolls under its first column.
result.wide = 0;
result.loose = [...document.querySelectorAll('.scroll')].filter(e => {
  if (e.scrollWidth <= e.clientWidth) return false;
  result.wide += 1;
  e.scrollLeft = 60;
  const cell = e.querySelector('tbody th').getBoundingClientRect();
  const box = e.getBoundingClientRect();
  return e.scrollLeft == 0 || Math.abs(cell.left - box.left) > 1 || cell.right > box.right - 60;
}).map(e => e.textContent);
document.querySelector('.show-raw').click();
document.getElementById('show-1').click();
result.after = state();
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a HiMo run and a plain CLIP run."""
    folder = tmp_path_factory.mktemp("report")
    runs = [report_runs.write_run(folder / f"tiny-{loss}", loss) for loss in ("himo", "clip")]
    return report.write_report(runs, folder / "report.html")


@pytest.fixture(scope="module")
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port on this machine, and what was sent to it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    heard.append(connection.recv(200))

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], heard
        server.shutdown(socket.SHUT_RDWR)


def test_page_loads_cleanly_and_shows_the_numbers_of_the_runs(page: Path, tmp_path: Path) -> None:
    source, console = browse(page, tmp_path)
    assert console == []
    shown = Elements(source)
    tiles = dict(shown.tiles[:6])
    for index, name in enumerate(("tiny-himo", "tiny-clip")):
        folder = page.parent / name
        result = json.loads((folder / "eval.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        two_ways = [result["retrieval"][way] for way in ("image_to_text", "text_to_image")]
        recalls = [way[f"R@{k}"] for way in two_ways for k in (1, 5, 10)]
        chance = result["retrieval"]["chance_R@1"]
        cells = shown.row_after("chance R@1", name)
        assert [float(cell) for cell in cells[:7]] == pytest.approx([*recalls, chance], abs=5e-3)
        assert cells[8:] == [str(result["protocol"][key]) for key in ("images", "captions")]
        cells = shown.row_after("left out", name)
        for place, measure in enumerate(("HiMo@2", "HiMo@3", "HiMo@K")):
            stored = result["himo"][measure]
            value, used, left_out = cells[3 * place : 3 * place + 3]
            assert float(value.strip(" %")) == pytest.approx(stored["value"], abs=5e-3)
            assert [int(used), int(left_out)] == [stored["used"], stored["left_out"]]
        for title, value in (
            ("R@1, image to text", recalls[0]),
            ("R@1, text to image", recalls[3]),
            ("HiMo@2", result["himo"]["HiMo@2"]["value"]),
            ("HiMo@3", result["himo"]["HiMo@3"]["value"]),
            ("HiMo@K", result["himo"]["HiMo@K"]["value"]),
        ):
            assert float(tiles[title][index].strip("%ρ")) == pytest.approx(value, abs=0.051)
        # The tables under the curves: every row is a line of metrics.jsonl.
        start = next(
            i for i, row in enumerate(shown.rows) if row == ["step", "tiny-himo", "tiny-clip"]
        )
        losses = {line["step"]: line["contrastive_loss"] for line in lines}
        rows = shown.rows[start + 1 : start + 17]
        assert [int(row[0].replace(",", "")) for row in (rows[0], rows[-1])] == [10, 2400]
        for row in rows:
            step = int(row[0].replace(",", ""))
            assert float(row[index + 1]) == pytest.approx(losses[step], rel=6e-4)
    curves = json.loads((page.parent / "tiny-clip" / "eval.json").read_text())["curves"]
    start = next(i for i, row in enumerate(shown.rows) if row[:1] == ["k"])
    for k, score in enumerate(curves[0]["scores"], 1):
        cell = shown.rows[start + k][2]
        assert float(cell.rstrip(" ▼")) == pytest.approx(score, rel=6e-4)
        fell = k > 1 and not curves[0]["scores"][k - 2] < score
        assert cell.endswith("▼") == fell


def test_nothing_is_requested(
    page: Path, listener: tuple[int, list[bytes]], tmp_path: Path
) -> None:
    port, heard = listener
    hostile = page.with_name("hostile.html")
    fetch = f'<img src="http://127.0.0.1:{port}/x"><script src="http://127.0.0.1:{port}/y">'
    hostile.write_text(page.read_text().replace("<main>", f"<main>{fetch}</script>"))
    _, console = browse(hostile, tmp_path / "a")
    assert heard == []
    assert sum("Content Security Policy" in line for line in console) >= 2
    # The same page without its policy does ask: the listener hears.
    hostile.write_text(POLICY.sub("", hostile.read_text()))
    browse(hostile, tmp_path / "b")
    assert len(heard) >= 1


@SCREENS
def test_layout_and_switches(page: Path, width: int, dark: bool, tmp_path: Path) -> None:
    result = measured(page, PROBE, width, dark, tmp_path)
    assert result["outside"] == []
    assert result["smallest"] >= 12
    assert result["loose"] == [] and (result["wide"] >= 2) == (width < 500)
    # The radio buttons of an image change its curves, and the boxes of the legend hide a run.
    before, after = result["before"], result["after"]
    assert before["normalised"] == 6 and before["raw"] == 0
    assert after["normalised"] == 5 and after["raw"] == 1
    assert before["first"] > 5 and before["second"] > 5
    assert after["first"] == before["first"] and after["second"] == 0
