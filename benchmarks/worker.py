"""Measures cases in a separate process: JSON requests on stdin, JSON rows on stdout.

A request is {"dtypes": [...]} for the ceilings, or {"case": {...}} with the settings of a Cell. The
answer is one line per row (or the ceilings), then {"done": true}. benchmarks.run starts it, so that
a crash here loses only one case.
"""

import dataclasses
import gc
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import memory
from benchmarks.cases import Case
from benchmarks.measure import (
    REPEATS,
    Problem,
    Sample,
    accuracy,
    ceilings,
    make_oracle,
    make_problem,
    step,
    time_together,
)
from benchmarks.registry import Candidate, candidates, operation
from benchmarks.rows import Row, number
from himo_kernels.testing import separate_compile_cache


def main() -> None:
    """Answers requests until stdin ends. sys.argv[1] is the device, cpu or cuda."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps the output of libraries out of the answers
    separate_compile_cache()
    device = sys.argv[1]
    for line in sys.stdin:
        request = json.loads(line)
        if "case" not in request:
            print(json.dumps(ceilings(device, request["dtypes"])), file=answers)
        else:
            fields = request.pop("case")
            case = Case(**{**fields, "modes": tuple(fields["modes"])})
            for row in Cell(case, device, **request).rows():
                print(json.dumps(row), file=answers)
        print(json.dumps({"done": True}), file=answers)


@dataclass
class Cell:
    """One case on this device; rows() measures it."""

    case: Case
    device: str
    seconds: float  # of timing, per candidate and mode
    ceilings: dict[str, float | str]  # of this machine, from an earlier request
    compile: bool = True  # torch.compile the baselines too
    memory: bool = True  # measure peak memory if the case asks for it
    # On a CPU, total for all baselines of the cell; slower ones are left out.
    baseline_seconds: float = math.inf
    only: list[str] = field(default_factory=list)  # names of candidates; empty: all
    peaks: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # reasons by candidate
    rank: int | None = None

    def rows(self) -> Iterator[Row]:
        """A row per candidate, mode and kind of timing; refusals and failures are rows too."""
        self.load = f"{os.getloadavg()[0]:.2f}"
        if self.device == "cpu":
            self._try_in_children()
            memory.limit_to_free_memory()
        problem = make_problem(self.case, self.device)
        if (rank := operation(self.case).rank) is not None:
            self.rank = rank(problem.inputs, self.case)
        accurate = []
        for candidate, columns in self._check(problem):
            if "status" in columns:
                for mode in self.case.modes:
                    yield self._untimed(candidate, mode, **columns)
            else:
                accurate.append((candidate, columns))
            self._free()
        for mode in self.case.modes:
            yield from self._time(problem, accurate, mode)

    def _candidates(self, problem: Problem) -> list[Candidate]:
        compile = self.compile and self.case.compile
        return [
            candidate
            for candidate in candidates(self.case, problem.inputs)
            if (compile or not candidate.compiled)
            and (not self.only or candidate.name in self.only)
        ]

    def _check(self, problem: Problem) -> Iterator[tuple[Candidate, Row]]:
        # Each candidate with its accuracy columns, and a status if it must not be timed.
        chosen = self._candidates(problem)
        official = any(candidate.official for candidate in chosen)
        oracle = make_oracle(problem, self.device, official)
        for candidate in chosen:
            if candidate.refusal is not None:
                yield candidate, {"status": "refused", "reason": candidate.refusal}
                continue
            if (reason := self.left_out.get(candidate.name)) is not None:
                yield candidate, {"status": memory.LEFT_OUT, "reason": reason}
                continue
            try:
                error, wrong = accuracy(candidate, oracle)
            except Exception as failed:  # other libraries may raise anything
                yield candidate, _failure(memory.reason(failed))
                continue
            columns = {"error": number(error), "checked_n": str(oracle.rows)}
            if wrong is not None:
                columns |= {"status": "inaccurate", "reason": wrong}
            yield candidate, columns

    def _time(
        self, problem: Problem, accurate: list[tuple[Candidate, Row]], mode: str
    ) -> Iterator[Row]:
        # Compilation dominates, so compiled candidates run only fwd+bwd, as in training.
        compete = [(c, columns) for c, columns in accurate if mode != "fwd" or not c.compiled]
        steps = {}
        for candidate, _ in compete:
            peak = self.peaks.get((candidate.name, mode), {})
            reason = peak.get("reason")
            if reason is None and self.case.timed:
                reason = self._warm_up(candidate, problem, mode)
            if reason is not None:
                yield self._row(candidate, mode, **_failure(reason))
            else:
                steps[candidate.name] = step(candidate, problem, mode)
        if self.case.timed:
            samples = time_together(steps, self.device, self.seconds)
        else:
            samples = {
                name: [Sample([self.peaks[name, mode]["time_ms"]], timing="once")]
                for name in steps
                if (name, mode) in self.peaks
            }
        for candidate, columns in compete:
            for sample in samples.get(candidate.name, []):
                timed = self._columns(sample, mode)
                yield self._row(candidate, mode, **columns, **timed)

    def _warm_up(self, candidate: Candidate, problem: Problem, mode: str) -> str | None:
        # Compiles, and on a GPU measures the peak. Returns why it cannot run, or None.
        run = step(candidate, problem, mode)
        try:
            run()
            if self.device == "cuda":
                self.peaks[candidate.name, mode] = {"peak_mib": memory.peak_cuda(run)}
        except Exception as failed:
            self._free()
            return memory.reason(failed)
        return None

    def _try_in_children(self) -> None:
        """Measures peak memory if wanted, and finds baselines that are too slow for this cell."""

        def names() -> list[tuple[str, bool, bool]]:
            chosen = self._candidates(make_problem(self.case, self.device))
            found = [(c.name, c.library, c.compiled) for c in chosen if c.refusal is None]
            return sorted(found, key=lambda item: item[2])  # slow compiled ones last

        measured = self.memory and self.case.memory
        if not measured and self.baseline_seconds == math.inf and self.case.timed:
            return
        found = memory.in_child(names)
        if isinstance(found, dict):  # the inputs do not fit; rows() will report it
            return
        left_s = self.baseline_seconds
        for name, library, compiled in found:
            limited = not library and self.baseline_seconds < math.inf
            modes = [mode for mode in self.case.modes if mode != "fwd" or not compiled]
            for mode in modes if measured or limited or not self.case.timed else ():
                # Half of the remaining time, so that one slow baseline does not use it all.
                limit_s = max(left_s, 0.0) / 2 if limited else math.inf
                begun = time.perf_counter()
                peak = memory.in_child(partial(self._peak, name, mode, measured), limit_s)
                left_s -= (time.perf_counter() - begun) * limited
                if limited and "time_ms" in peak and self.case.timed:
                    rounds_s = REPEATS["cpu"][0] * peak["time_ms"] / 1e3
                    left_s -= rounds_s
                    if rounds_s > limit_s:
                        peak = {"reason": f"{memory.LEFT_OUT}: a call takes {rounds_s / 3:.3g} s"}
                if str(peak.get("reason", "")).startswith(memory.LEFT_OUT):
                    advice = f"of {self.baseline_seconds:g} s for the baselines of a cell"
                    self.left_out[name] = f"{peak['reason']}, {advice}"
                    break
                if measured or not self.case.timed:
                    self.peaks[name, mode] = peak

    def _peak(self, name: str, mode: str, measured: bool) -> dict[str, float]:
        if measured:
            memory.return_freed_blocks()
        problem = make_problem(self.case, self.device)
        candidate = next(c for c in self._candidates(problem) if c.name == name)
        run = step(candidate, problem, mode)
        if not measured:
            run()  # compiles
            begun = time.perf_counter()
            run()
            return {"time_ms": 1e3 * (time.perf_counter() - begun)}
        if candidate.compiled:  # for these shapes: a small call would compile another function
            return memory.peak_cpu(run, run)
        small = dataclasses.replace(self.case, N=min(self.case.N, 8))
        return memory.peak_cpu(step(candidate, make_problem(small, "cpu"), mode), run)

    def _untimed(self, candidate: Candidate, mode: str, **columns: str) -> Row:
        # What an inaccurate candidate takes is in words, so that it never counts as a time.
        once = self.peaks.get((candidate.name, mode), {}).get("time_ms")
        if columns["status"] == "inaccurate" and once is not None:
            columns["reason"] += f"; one call took {number(once)} ms"
        return self._row(candidate, mode, **columns)

    def _row(self, candidate: Candidate, mode: str, **columns: str) -> Row:
        case = self.case
        row = {
            "op": case.op,
            "backend": candidate.name,
            "auto": "yes" if candidate.auto else "",
            "mode": mode,
            **{name: str(getattr(case, name)) for name in ("B", "N", "D", "dtype", "config")},
            "R": "" if self.rank is None else str(self.rank),
            "peak_mib": number(self.peaks.get((candidate.name, mode), {}).get("peak_mib")),
            "ceiling_gbs": number(self.ceilings.get("copy")),
            "status": "ok",
            "load": self.load,
        }
        ceiling = self.ceilings.get(case.dtype)
        if isinstance(ceiling, str):
            row["reason"] = f"ceiling not measured: {ceiling}"
        else:
            row["ceiling_tflops"] = number(ceiling)
        return row | columns

    def _columns(self, sample: Sample, mode: str) -> Row:
        # Rates of the cost model at the median time, and their share of the roofline.
        op, case, backward = operation(self.case), self.case, mode == "fwd+bwd"
        median = sample.quantile(0.5)
        tera = op.flops(case, self.rank or 0, backward) / 1e12
        giga = op.elements(case, backward) * getattr(torch, case.dtype).itemsize / 1e9
        rates = {"gbs": giga / median * 1e3, "tflops": tera / median * 1e3}
        peak, copy = self.ceilings.get(case.dtype), self.ceilings.get("copy")
        roof: dict[str, str] = {}
        if isinstance(peak, float) and isinstance(copy, float):
            compute, traffic = tera / peak * 1e3, giga / copy * 1e3  # ms at the ceilings
            roof["fraction"] = number(max(compute, traffic) / median)
            roof["bound"] = "compute" if compute >= traffic else "memory"
        times = {"min": 0.0, "p20": 0.2, "p50": 0.5, "p80": 0.8}
        return {
            "l2": sample.l2,
            "timing": sample.timing,
            "repeats": str(len(sample.times_ms)),
            **{f"time_ms_{name}": number(sample.quantile(q)) for name, q in times.items()},
            **{name: number(value) for name, value in rates.items()},
            **roof,
        }

    def _free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _failure(reason: str) -> Row:
    status = memory.OUT_OF_MEMORY if reason == memory.OUT_OF_MEMORY else "failed"
    return {"status": status, "reason": reason}


if __name__ == "__main__":
    main()
