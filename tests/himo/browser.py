"""Pages in a real browser, for tests of what himo writes: their content and measured layout."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip
NEEDS_BROWSER = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed"),
    pytest.mark.timeout(120),
]
# Desktop and phone, light and dark.
SCREENS = pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)]
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# Put into a copy of a page without its policy; it leaves what it measures in an attribute.
_PROBE = """<script>
addEventListener('load', () => {
  const width = document.documentElement.clientWidth;
  const result = {
    width: width,
    dark: matchMedia('(prefers-color-scheme:dark)').matches,
    overflow: document.documentElement.scrollWidth - width,
    background: getComputedStyle(document.body).backgroundColor,
  };
  SCRIPT
  parent.document.body.setAttribute('data-result', JSON.stringify(result));
});
</script></body>"""


class Elements(HTMLParser):
    """What a page shows: the rows of its tables, its tiles, and its paragraphs (class, text)."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tiles: list[tuple[str, list[str]]] = []
        self.body: dict[str, str | None] = {}
        self.paragraphs: list[tuple[str, str]] = []
        self._class: str | None = None  # of the paragraph that is open
        self._cell: list[str] | None = None
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self.body = dict(attrs)
        if tag == "p":
            self._class = dict(attrs).get("class") or ""
            self.paragraphs.append((self._class, ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "dd", "h3"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._class = None
        if tag in ("td", "th", "dd", "h3") and self._cell is not None:
            content = "".join(self._cell).strip()
            if tag == "h3":
                self.tiles.append((content, []))
            elif tag == "dd":
                self.tiles[-1][1].append(content)
            elif self.rows:
                self.rows[-1].append(content)
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._class is not None:
            self.paragraphs[-1] = (self._class, self.paragraphs[-1][1] + data)
        if self._cell is not None:
            self._cell.append(data)

    def row_after(self, head: str, name: str) -> list[str]:
        """The cells of the row `name` in the first table with `head` in its header."""
        start = next(i for i, row in enumerate(self.rows) if head in row)
        return next(row for row in self.rows[start:] if row and row[0] == name)[1:]


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The DOM of a page after loading, and what the browser's console said."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--enable-logging=stderr",
            "--virtual-time-budget=2000", "--dump-dom", *flags, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


def measured(page: Path, script: str, width: int, dark: bool, folder: Path) -> dict[str, Any]:
    """What a script adds to `result` on a page of this width, and that the page fits its width.

    Asserts that the page has the background of the scheme, that nothing sticks out to the right,
    and that the console is empty.
    """
    source, found = POLICY.subn("", page.read_text())
    assert found == 1
    source = source.replace("</body>", _PROBE.replace("SCRIPT", script))
    if width < 500:  # no window is narrower
        frame = f'<iframe width="{width}" height="900" srcdoc="{html.escape(source)}"></iframe>'
        source = f'<body style="margin:0">{frame}</body>'
    copy = folder / "probe.html"
    copy.write_text(source)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = f"--window-size={max(width, 500)},900"
    dumped, console = browse(copy, folder / "profile", size, scheme)
    assert console == []
    result: dict[str, Any] = json.loads(Elements(dumped).body["data-result"] or "")
    assert result["dark"] == dark
    assert result["background"] == ("rgb(19, 22, 27)" if dark else "rgb(255, 255, 255)")
    assert result["overflow"] <= 0
    return result
