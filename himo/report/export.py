"""What a paper takes from a page: its charts as SVG files, and the page as PDF."""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from himo.errors import HimoError, shortened
from himo.files import atomic_path, write_text
from himo_charts.standalone import charts_of, standalone

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
    *("microsoft-edge", "msedge"),
)
_LIMIT_S = 120  # of one print
_FLAGS = (
    *("--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--no-pdf-header-footer",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that writes a page."""
    text = "also write each chart of the page as an SVG file into this folder"
    parser.add_argument("--figures", metavar="DIR", help=text)
    text = "also print the page to a .pdf next to it; needs Chromium, Chrome or Edge"
    parser.add_argument("--pdf", action="store_true", help=text)


def check(args: argparse.Namespace) -> None:
    """HimoError, before any work, where the flags cannot be done.

    Raises:
        HimoError: no browser is installed, or the folder cannot be made.
    """
    if args.pdf:
        _browser()
    if args.figures is not None:
        try:
            Path(args.figures).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HimoError(f"--figures {args.figures}: {error.strerror}") from error


def export(args: argparse.Namespace, page: Path, names: Sequence[str]) -> None:
    """Writes the figures and the PDF that the flags ask for, and prints their paths.

    Args:
        page: the page, which is written.
        names: of the runs on it, for the legends.
    """
    if args.figures is not None:
        written = write_figures(page, args.figures, names)
        print(f"figures: {len(written)} SVG files in {Path(args.figures).resolve()}")
    if args.pdf:
        print(f"pdf: {print_pdf(page).resolve()}")


def write_figures(page: Path, folder: str | os.PathLike[str], names: Sequence[str]) -> list[Path]:
    """Each chart of a page as a file of the folder, named as in the page.

    Raises:
        HimoError: a file cannot be written.
    """
    written = []
    for ident, chart in charts_of(page.read_text("utf-8")).items():
        path = Path(folder) / f"{re.sub(r'[^A-Za-z0-9-]', '-', ident)}.svg"
        write_text(path, standalone(chart, names))
        written.append(path)
    return written


def print_pdf(page: Path) -> Path:
    """Prints the page to a PDF next to it, with an installed browser; returns its path.

    Raises:
        HimoError: there is none, it fails, or the file cannot be written.
    """
    browser, out = _browser(), page.with_suffix(".pdf")
    flags = list(_FLAGS)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium does not start as root without; pages run no script
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "page.pdf"
        command = [browser, *flags, f"--user-data-dir={folder}/profile", f"--print-to-pdf={made}"]
        try:
            done = subprocess.run(
                [*command, page.resolve().as_uri()], capture_output=True, timeout=_LIMIT_S
            )
        except subprocess.TimeoutExpired as error:
            raise HimoError(f"--pdf: {browser} did not end within {_LIMIT_S} s") from error
        if done.returncode or not made.exists():
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise HimoError(
                f"--pdf: {browser} ended with status {done.returncode}: {shortened(last, 200)}"
            )
        with atomic_path(out, needed=made.stat().st_size) as temporary:
            temporary.write_bytes(made.read_bytes())
    return out


def _browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise HimoError(
            f"--pdf: expected one of {', '.join(BROWSERS)} on the PATH, found none; --figures "
            "writes SVG files without a browser"
        )
    return found
