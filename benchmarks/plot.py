"""Tables and charts of existing rows; this module measures nothing.

python -m benchmarks.plot benchmarks/results/cpu --markdown            print the table
python -m benchmarks.plot benchmarks/results/cpu --update README.md    put it between its markers
python -m benchmarks.plot benchmarks/results/cpu --svg benchmarks/results/cpu
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmarks import charts
from benchmarks import rows as table
from benchmarks.cases import OPTIONS, Case
from benchmarks.rows import LIBRARY, BenchmarkError, Row

LABELS = {
    "pca_reconstruct": "HiDe",
    "himo_loss": "whole head",
    "dual_info_nce": "dual loss",
    "dual_info_nce_low_rank": "dual loss, low rank",
    "info_nce": "InfoNCE",
    "info_nce_pairs": "InfoNCE, other forms",
    "sigmoid_loss": "sigmoid loss",
    "covariance": "covariance",
    "gram": "gram",
    "normalize": "normalize",
    "himo_loss_over_ranks": "whole head over ranks, rows of one",
}
HEAD = (
    "| forward + backward | dtype | backend | ms | to released | to best PyTorch | extra MiB |\n"
    "|---|---|---|---|---|---|---|"
)


METHOD = ("pca_reconstruct", "himo_loss", "dual_info_nce")  # operators of the short table
SHORT_TABLE = (128, 1024, 4096, 16384, 32768, 65536)  # samples


def read_folder(folder: Path) -> list[Row]:
    """The rows of all operators' files in a folder."""
    if not folder.is_dir():
        raise BenchmarkError(f"{folder}: expected a directory of rows")
    found = [row for op in LABELS for row in table.read(folder / f"{op}.csv")]
    if not found:
        raise BenchmarkError(f"{folder}: expected at least one of {', '.join(LABELS)} as csv")
    return found


def cells(rows: list[Row], mode: str = "fwd+bwd") -> dict[tuple[str, ...], dict[str, Row]]:
    """The rows of a mode by cell, then candidate: cold L2, and a graph if there is one."""
    names = ("op", "B", "N", "D", "dtype", "config")
    found: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["mode"] == mode and row["l2"] in ("", "cold"):
            cell = found[tuple(row[name] for name in names)]
            if row["timing"] == "graph" or row["backend"] not in cell:
                cell[row["backend"]] = row
    return found


def markdown(rows: list[Row]) -> str:
    """One table per device in the rows, sorted by operator."""
    devices = sorted({(row["device"], row["threads"]) for row in rows})
    parts = []
    for device, threads in devices:
        own = [row for row in rows if (row["device"], row["threads"]) == (device, threads)]
        lines = [f"| {' | '.join(columns)} |" for columns in table_rows(own)]
        if lines:
            parts.append("\n".join([HEAD, *lines, "", _caption(own)]))
    return "\n\n".join(parts)


def tables(name: str, rows: list[Row]) -> dict[str, str]:
    """{marker: table} of a folder with this name: all rows, and a short table of the method."""

    def in_short(row: Row) -> bool:
        usual = row["B"] == "1" and row["D"] == "768" and row["config"] == _default(row["op"])
        return usual and int(row["N"]) in SHORT_TABLE and row["op"] in METHOD

    return {name: markdown(rows), f"{name}, in short": markdown(list(filter(in_short, rows)))}


def table_rows(rows: list[Row]) -> list[list[str]]:
    """The table of one device, a list of columns as in HEAD for each cell."""
    found = (_columns(*item) for item in sorted(cells(rows).items(), key=place))
    return [columns for columns in found if columns]


def place(item: tuple[tuple[str, ...], object]) -> tuple:
    op, b, n, d, dtype, config = item[0]
    return (
        list(LABELS).index(op),
        config != _default(op),
        dtype != "float32",
        int(b),
        int(n),
        int(d),
    )


def _default(op: str) -> str:
    return Case(op, N=1).config if op in OPTIONS else ""


def _columns(cell: tuple[str, ...], found: dict[str, Row]) -> list[str]:
    own = next((row for row in found.values() if row["auto"] and quoted_ms(row)), None)
    if own is None:
        return []
    others = [row for row in found.values() if row["backend"] not in (*LIBRARY, "released")]
    others = [row for row in others if not row["backend"].startswith("released+")]
    timed = [row for row in others if quoted_ms(row)]
    best = min(timed, key=quoted_ms, default=None)
    return [
        work(cell),
        own["dtype"],
        own["backend"],
        f"{quoted_ms(own):.3g}",
        _ratio(own, found.get("released")),
        f"{_ratio(own, best)} ({best['backend']})" if best else "–",
        _memory(own, found.get("released", best)),
    ]


def work(cell: tuple[str, ...]) -> str:
    return " ".join([LABELS[cell[0]], size(cell), *options(cell)])


def size(cell: tuple[str, ...]) -> str:
    """B x N x D, without a batch of one."""
    b, n, d = cell[1:4]
    return " x ".join([b, n, d] if b != "1" else [n, d])


def options(cell: tuple[str, ...]) -> list[str]:
    """The options of a cell that differ from its operator's defaults."""
    usual = set(_default(cell[0]).split())
    return [option for option in cell[5].split() if option not in usual]


def quoted_ms(row: Row) -> float:
    """Milliseconds: the minimum on a CPU, which other processes disturb; the median on a GPU. 0 if
    not timed."""
    return float(row["time_ms_min" if not row["l2"] else "time_ms_p50"] or 0)


def _ratio(own: Row, other: Row | None) -> str:
    if other is None:
        return "–"
    if not quoted_ms(other):
        return _why(other)
    return f"{quoted_ms(other) / quoted_ms(own):.2f}x"


def _why(row: Row) -> str:
    if row["status"] == "inaccurate":
        return "NaN" if "not finite" in row["reason"] else "wrong"
    return {"out of memory": "OOM"}.get(row["status"], row["status"])


def _memory(own: Row, other: Row | None) -> str:
    if not own["peak_mib"]:
        return "–"
    text = f"{float(own['peak_mib']):.3g}"
    if other is not None and other["peak_mib"]:
        ratio = float(own["peak_mib"]) / float(other["peak_mib"])
        text += f" ({ratio:.2f}x {other['backend']})"
    elif other is not None and other["status"] == "out of memory":
        text += f" ({other['backend']}: OOM)"
    return text


def _caption(rows: list[Row]) -> str:
    first = rows[0]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    loads = [float(row["load"]) for row in rows if row["load"]]
    on = f"{first['device']}, {first['threads']} threads"
    times = "median with a cold L2" if any(row["l2"] for row in rows) else "minimum over repeats"
    versions = f"torch {first['torch']}" + (f", CUDA {first['cuda']}" if first["cuda"] else "")
    return (
        f"{on}; {versions}; load {min(loads):.1f} to {max(loads):.1f}; commit {commits}; "
        f"times are the {times}. A ratio is the other's time over ours, in the same process."
    )


def between_markers(text: str, name: str) -> re.Match[str]:
    """The position of a generated table in a text. Raises BenchmarkError if it has none."""
    marker = rf"(<!-- benchmarks: {re.escape(name)} -->\n).*?(<!-- end of benchmarks -->)"
    found = re.search(marker, text, re.DOTALL)
    if found is None:
        start, end = f"<!-- benchmarks: {name} -->", "<!-- end of benchmarks -->"
        raise BenchmarkError(f"expected the lines {start} and {end} in the text")
    return found


def update(text: str, contents: dict[str, str]) -> str:
    """The text with each content inserted between the markers of its name, if present."""
    present = [name for name in contents if f"<!-- benchmarks: {name} -->" in text]
    for name in present or contents:
        found = between_markers(text, name)
        content = contents[name]
        text = text[: found.start()] + f"{found[1]}{content}\n{found[2]}" + text[found.end() :]
    return text


def draw(rows: list[Row]) -> dict[str, str]:
    """{file name: SVG}: time and extra memory over N, per operator and dtype with >= 3 sizes."""
    found: dict[str, str] = {}
    for op in LABELS:
        for dtype in ("float32", "bfloat16"):
            own = {
                int(cell[2]): candidates
                for cell, candidates in cells(rows).items()
                if cell[0] == op
                and cell[1] == "1"
                and cell[3] == "768"
                and cell[4] == dtype
                and cell[5] == _default(op)
            }
            if len(own) < 3:
                continue
            title = f"{LABELS[op]}, D = 768, {dtype}, forward + backward"
            kinds = {
                "time": ("ms", _lines(own, quoted_ms, oom=False)),
                "memory": ("MiB", _lines(own, _peak, oom=True)),
            }
            every = [line.formula for _, lines in kinds.values() for line in lines]
            formulas = list(dict.fromkeys(every))  # one colour in both charts
            for kind, (unit, lines) in kinds.items():
                if any(len(line.points) > 1 for line in lines):
                    sizes = {n for line in lines for n in (*dict(line.points), *line.out_of_memory)}
                    svg = charts.svg(f"{title}: {kind}", unit, sorted(sizes), lines, formulas)
                    found[f"{op}_{dtype}_{kind}.svg"] = svg
    return found


def _peak(row: Row) -> float:
    return float(row["peak_mib"] or 0)


def _lines(
    sizes: dict[int, dict[str, Row]], value: Callable[[Row], float], oom: bool
) -> list[charts.Line]:
    # First the choice of "auto" at each size as one line, then the baselines.
    points: dict[str, dict[int, float]] = defaultdict(dict)
    crosses: dict[str, list[int]] = defaultdict(list)
    for n, candidates in sizes.items():
        for name, row in candidates.items():
            if row["auto"]:
                name = "himo_kernels"
            elif name in LIBRARY:
                continue
            if value(row):
                points[name][n] = value(row)
            elif oom and row["status"] == "out of memory":
                crosses[name].append(n)
    names = sorted({*points, *crosses}, key=lambda name: (name != "himo_kernels", name))
    return [charts.Line(n, sorted(points[n].items()), sorted(crosses[n])) for n in names]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="rows of one device, as run.py writes them")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    parser.add_argument(
        "--update",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="put its tables into texts",
    )
    parser.add_argument("--svg", type=Path, metavar="DIR", help="write the charts")
    options = parser.parse_args(arguments)
    try:
        rows = read_folder(options.folder)
        if options.markdown:
            print(markdown(rows))
        for path in options.update:
            text = update(path.read_text(), tables(options.folder.name, rows))
            table.write_whole(path, text)
        if options.svg:
            options.svg.mkdir(parents=True, exist_ok=True)
            for name, svg in draw(rows).items():
                table.write_whole(options.svg / name, svg)
    except BenchmarkError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"benchmarks: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
