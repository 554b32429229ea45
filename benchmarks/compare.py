"""Compares two runs cell by cell, or one run with plain PyTorch. Nothing is measured here."""

import statistics
from dataclasses import dataclass

from benchmarks.cases import MODES
from benchmarks.plot import cells, quoted_ms, work
from benchmarks.registry import OPERATIONS
from benchmarks.rows import COLUMNS, LIBRARY, Row

GATE = 0.97  # least speed relative to the best formula: repeats of one call differ by up to 3 %
LEAST_NOISE = 0.03
SLOWER, FASTER, SAME, BROKEN = "slower", "faster", "within noise", "no longer runs"


@dataclass(frozen=True)
class Change:
    """The times of backend="auto" in one cell, in an earlier and a later run.

    The baselines of a cell do not depend on this library, so the median ratio of their times,
    `drift`, is due to the machine. `ratio` is the ratio of the library's times divided by `drift`.
    """

    work: str
    dtype: str
    before_ms: float
    after_ms: float  # 0 where it no longer runs
    drift: float
    noise: float  # relative excess of the 80th percentile over the quoted time; the larger run's
    reason: str = ""

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms / self.drift

    @property
    def verdict(self) -> str:
        if not self.after_ms:
            return BROKEN
        if self.ratio > 1 + self.noise:
            return SLOWER
        return FASTER if self.ratio < 1 / (1 + self.noise) else SAME

    @property
    def is_regression(self) -> bool:
        return self.verdict in (SLOWER, BROKEN)


def changes(before: list[Row], after: list[Row]) -> list[Change]:
    """Compares the forward + backward cells in both runs, of one device and number of threads."""
    earlier = cells(before)
    found = []
    for cell, new in cells(_with_crashes(after)).items():
        old = earlier.get(cell, {})
        then = automatic(old)
        if then is None or not quoted_ms(then):
            continue
        now = automatic(new)
        if now is None:  # the cell died, or no backend is left to choose
            now = new.get(then["backend"], next(iter(new.values())))
        ratios = [
            quoted_ms(row) / quoted_ms(old[name])
            for name, row in new.items()
            if name not in LIBRARY and quoted_ms(row) and name in old and quoted_ms(old[name])
        ]
        change = Change(
            work(cell),
            cell[4],
            quoted_ms(then),
            quoted_ms(now),
            statistics.median(ratios) if ratios else 1.0,
            max(LEAST_NOISE, _spread(then), _spread(now)),
            now["reason"] or now["status"],
        )
        found.append(change)
    return found


def automatic(found: dict[str, Row]) -> Row | None:
    """Returns the row of the backend that backend="auto" chooses."""
    return next((row for row in found.values() if row["auto"]), None)


def _with_crashes(rows: list[Row]) -> list[Row]:
    # If the process of a cell died, its row has no mode: take it as forward + backward.
    return [row | {"mode": row["mode"] or MODES[-1]} for row in map(_whole, rows)]


def _whole(row: Row) -> Row:
    return dict.fromkeys(COLUMNS, "") | row


def _spread(row: Row) -> float:
    return float(row["time_ms_p80"]) / quoted_ms(row) - 1 if quoted_ms(row) else 0.0


def formulas(op: str, found: dict[str, Row]) -> list[Row]:
    """Returns the rows of plain PyTorch formulas, eager and compiled, except the released code."""
    plain = set(OPERATIONS[op].baselines) - {"released"} if op in OPERATIONS else set()
    return [row for name, row in found.items() if name.removesuffix("+compile") in plain]


def gate(rows: list[Row]) -> int:
    """Prints each cell's speed relative to the best formula; returns how many cells fail."""
    below = 0
    print(f"speed over the best plain PyTorch formula; below {GATE} fails, 3 % is noise")
    for mode in MODES:
        for cell, found in cells(_with_crashes(rows), mode).items():
            own = automatic(found)
            name = f"{work(cell)} {cell[4]} {mode}"
            plain = formulas(cell[0], found)
            best = min(filter(quoted_ms, plain), key=quoted_ms, default=None)
            if own is None or not quoted_ms(own):
                reason = (own or next(iter(found.values())))["reason"]
                below += 1
                print(f"  FAIL  –      {name}: himo_kernels was not timed: {reason}")
                continue
            if best is None:
                print(f"  –     –      {name}: no formula was timed")
                continue
            speed = quoted_ms(best) / quoted_ms(own)
            below += speed < GATE
            untimed = sum(not quoted_ms(row) for row in plain)
            note = f"; {untimed} not timed" if untimed else ""
            mark = "FAIL" if speed < GATE else "ok"
            print(f"  {mark:<5} {speed:.2f}x  {name} ({best['backend']}{note})")
    return below
