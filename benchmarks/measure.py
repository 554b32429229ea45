"""Accuracy and time of one call of a candidate. Memory is in memory.py, rows in rows.py."""

import gc
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.registry import (
    Candidate,
    Inputs,
    Operation,
    Outputs,
    leading_rows,
    make_inputs,
    operation,
)
from himo_kernels import nn, pca_reconstruct
from himo_kernels.process_state import full_float32
from himo_kernels.testing import oracle_info_nce, relative_error

# The oracle holds N x N logits in float64, so at most this many leading rows are checked, plus
# enough to make the last tile as ragged as the case's.
CHECKED_ROWS = {"cpu": 2048, "cuda": 8192}
# A baseline need not meet the library's budget, but must compute the same function. Half precision
# under autocast is within 1e-2, or twice plain PyTorch's error if few rows make that larger; wrong
# formulas or gradients are not.
BASELINE_ERROR = 5e-2

WARM_UP = 10  # calls before timing on a GPU, fewer if they are long; a CPU has had one
REPEATS = {"cpu": (3, 30), "cuda": (5, 50)}  # minimum and maximum rounds, or calls on a GPU
LONG_MS = 10.0  # a CPU call this long warms its own caches
GRAPH_BELOW_MS = 0.1  # launch gaps dominate below; a replayed CUDA graph shows kernel time
HOT_BELOW_MS = 5.0  # a longer call evicts the L2 itself: hot and cold are equal
FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU

CEILING_SECONDS = 3.0  # to measure the ceiling of one dtype
CEILING_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192)}
LEAST_CEILING = 1024  # a smaller matmul does not reach the peak rate
# Rows checked if half precision is emulated, and rows of the trial that detects emulation.
EMULATED_ROWS, TRIAL_ROWS = 512, 256


@dataclass(frozen=True)
class Sample:
    """Times of one candidate: milliseconds per call, sorted."""

    times_ms: list[float]
    l2: str = ""  # cold or hot, on a GPU
    timing: str = "wall"  # wall, events or graph

    def quantile(self, share: float) -> float:
        return self.times_ms[round(share * (len(self.times_ms) - 1))]


@dataclass(frozen=True)
class Problem:
    """A case with its tensors: leaves that require gradients, and incoming gradients."""

    case: Case
    inputs: Inputs
    weights: tuple[Tensor, ...]  # float32 or float64, one per output


def make_problem(case: Case, device: str) -> Problem:
    inputs = make_inputs(case, device)
    generator = torch.Generator().manual_seed(1)
    shapes = _output_shapes(case, inputs)
    weights = tuple(
        (torch.randn(shape, generator=generator) if shape else torch.ones(())).to(device)
        for shape in shapes
    )
    return Problem(case, _leaves(inputs), weights)


def _output_shapes(case: Case, inputs: Inputs) -> list[tuple[int, ...]]:
    if case.op in ("covariance", "gram"):
        *batch, n, d = inputs["x"].shape
        side = d if case.op == "covariance" else n
        return [(*batch, d), (*batch, side, side)]
    if case.op in ("pca_reconstruct", "normalize"):
        return [tuple(next(iter(inputs.values())).shape)]
    return [()] * (2 if case.op.startswith("dual") else 1)


def _leaves(inputs: Inputs) -> Inputs:
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


def step(candidate: Candidate, problem: Problem, mode: str) -> Callable[[], object]:
    """A function without arguments that runs the candidate once, with a backward for fwd+bwd."""
    case, inputs = problem.case, problem.inputs
    leaves = list(inputs.values())
    device = leaves[0].device.type

    def precision():
        # A baseline runs half precision as in a training step, under autocast. The library's
        # operators follow their inputs' dtype.
        if candidate.library or case.dtype not in ("bfloat16", "float16"):
            return nullcontext()
        return torch.autocast(device, getattr(torch, case.dtype))

    def forward() -> Outputs:
        with torch.no_grad(), precision():
            return candidate.call(inputs, case)

    def forward_and_backward() -> tuple[Outputs, tuple[Tensor, ...]]:
        with precision():
            outputs = candidate.call(inputs, case)
        weights = [w.to(o.dtype) for w, o in zip(problem.weights, outputs, strict=True)]
        return outputs, torch.autograd.grad(outputs, leaves, weights)

    return forward if mode == "fwd" else forward_and_backward


# Accuracy.


@dataclass(frozen=True)
class Oracle:
    """float64 results of the leading rows, and the errors of plain PyTorch in the case's dtype."""

    rows: int
    problem: Problem
    exact: dict[bool, list[Tensor]]  # True: of the official loss
    eager_errors: list[float]


def checked_rows(problem: Problem, device: str) -> int:
    """How many leading rows are checked, including those that make the last tile as ragged."""
    case = problem.case
    most = EMULATED_ROWS if _is_emulated(problem, device) else CHECKED_ROWS[device]
    return case.N if most + 64 >= case.N else most + case.N % 64


def _is_emulated(problem: Problem, device: str) -> bool:
    # A CPU without half-precision instructions takes minutes for a matmul of 2048 rows.
    case = problem.case
    if device != "cpu" or case.dtype not in ("bfloat16", "float16") or case.N <= EMULATED_ROWS:
        return False
    formula = Candidate("formula", operation(case).formula, library=True)
    trial = _leading(problem, TRIAL_ROWS)
    raised = _leaves({name: x.float() for name, x in trial.inputs.items()})
    half, full = (
        min(_wall_ms(step(formula, tried, "fwd+bwd")) for _ in range(2))
        for tried in (trial, Problem(case, raised, trial.weights))
    )
    return half > 4 * full


def _leading(problem: Problem, rows: int) -> Problem:
    case, weights = problem.case, problem.weights
    if rows >= case.N:
        return problem
    if case.op in ("pca_reconstruct", "normalize"):
        weights = (weights[0][..., :rows, :],)
    elif case.op == "gram":
        weights = (weights[0], weights[1][..., :rows, :rows])
    return Problem(case, _leaves(leading_rows(problem.inputs, case, rows)), weights)


def make_oracle(problem: Problem, device: str, official: bool) -> Oracle:
    """Runs the formula in float64; also the official loss if a candidate computes it."""
    case, op = problem.case, operation(problem.case)
    rows = checked_rows(problem, device)
    part = _leading(problem, rows)
    double = Problem(
        case,
        _leaves({name: x.double() for name, x in part.inputs.items()}),
        tuple(w.double() for w in part.weights),
    )
    formula = Candidate("formula", op.formula, library=True)
    with full_float32(device):
        exact = {False: _results(_exact(op, case), double)}
        if official and case.preset != "official":
            exact[True] = _results(_official(op, case), double)
        elif official:
            exact[True] = exact[False]
        eager = _results(formula, part)
    errors = [relative_error(a, e) for a, e in zip(eager, exact[False], strict=True)]
    return Oracle(rows, part, exact, errors)


def _exact(op: Operation, case: Case) -> Candidate:
    # Equal rows give equal singular values, and the gradient through the SVD is 0 / 0 in any
    # precision. There the oracle is the closed form in float64 (tests/pca compares the two).
    if case.spectrum == "duplicates" and op.rank is not None and "share" not in case.config:
        return Candidate("closed form", lambda x, case: op.library(x, case, "reference"), True)
    return Candidate("formula", op.formula, library=True)


def _official(op: Operation, case: Case) -> Candidate:
    """The released code's loss in float64: official switches, but the case's threshold."""

    def call(inputs: Inputs, case: Case) -> Outputs:
        image, text = inputs["image_features"], inputs["text_features"]
        smoothing = {"label_smoothing": 0.1, "differentiate_keys": False}
        if case.op == "himo_loss":
            tau = nn.PRESETS[case.preset]["variance_threshold"]
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
            component, _ = pca_reconstruct(text, tau, gap_eps=0.0, backend="reference")
        elif "component_features" in inputs:
            component = inputs["component_features"]
        else:
            component = inputs["coefficients"] @ inputs["basis"]
        losses = [
            oracle_info_nce(image, keys, inputs["logit_scale"], **smoothing)
            for keys in (text, component)
        ]
        return (losses[0] + losses[1],) if case.op == "himo_loss" else tuple(losses)

    return Candidate("official", call, library=True)


def _results(candidate: Candidate, problem: Problem) -> list[Tensor]:
    outputs, gradients = step(candidate, problem, "fwd+bwd")()
    return [x.detach() for x in (*outputs, *gradients)]


def names_of_results(problem: Problem) -> list[str]:
    outputs = ["output"] if len(problem.weights) == 1 else [f"output {i}" for i in range(2)]
    return outputs + [f"gradient of {name}" for name in problem.inputs]


def accuracy(candidate: Candidate, oracle: Oracle) -> tuple[float, str | None]:
    """(largest relative error of outputs and gradients, which check it fails or None)."""
    case = oracle.problem.case
    actual = _results(candidate, oracle.problem)
    exact = oracle.exact[candidate.official]
    worst, wrong = 0.0, None
    eps = torch.finfo(getattr(torch, case.dtype)).eps
    rounding = eps * operation(case).terms(case) ** 0.5
    names = names_of_results(oracle.problem)
    for name, a, e, eager in zip(names, actual, exact, oracle.eager_errors, strict=True):
        error = relative_error(a, e)
        condition = 1.0
        if name == "gradient of logit_scale" and e:
            # A difference of two mean cosines: its error is relative to the cosines.
            condition = max(1.0, 1 / e.abs().item())
        # Plain PyTorch itself is NaN where the SVD's gradient is.
        eager = eager if eager < torch.inf else 0.0
        budget = eager + condition * rounding
        if not candidate.library:
            budget = max(BASELINE_ERROR, 2 * eager)
        if not error <= budget and wrong is None:
            value = f"error {error:.2e} above {budget:.2e}" if error == error else "not finite"
            wrong = f"{name}: {value}"
        worst = error if error != error else max(worst, error)
    return worst, wrong


# Time.


def time_together(
    steps: dict[str, Callable[[], object]], device: str, seconds: float
) -> dict[str, list[Sample]]:
    """Samples of each step. On a CPU the steps are interleaved, so that noise affects all alike."""
    if device == "cuda":
        return {name: _time_cuda(run, seconds) for name, run in steps.items()}
    fewest, most = REPEATS["cpu"]
    times: dict[str, list[float]] = {name: [] for name in steps}
    start, rounds = time.perf_counter(), 0
    gc.collect()
    gc.disable()
    try:
        while rounds < fewest or (
            rounds < most and time.perf_counter() - start < seconds * len(steps)
        ):
            for name, run in steps.items():
                times[name].extend(_burst(run))
            rounds += 1
    finally:
        gc.enable()
    return {name: [Sample(sorted(values))] for name, values in times.items()}


def _burst(run: Callable[[], object]) -> list[float]:
    # One call, or several if it is short. Then the first is discarded: caches are cold and threads
    # asleep.
    first = _wall_ms(run)
    if first > LONG_MS:
        return [first]
    return [_wall_ms(run) for _ in range(max(1, min(20, int(LONG_MS / first))))]


def _wall_ms(run: Callable[[], object]) -> float:
    before = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - before) / 1e6


def _time_cuda(run: Callable[[], object], seconds: float) -> list[Sample]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    once = _events(run, 1, None)[0]
    _events(run, max(1, min(WARM_UP, int(seconds * 1000 / max(once, 1e-3)))), None)
    once = _events(run, 1, None)[0]
    fewest, most = REPEATS["cuda"]
    repeats = max(fewest, min(most, int(seconds * 1000 / max(once, 1e-3))))
    cold = Sample(_events(run, repeats, flush), "cold", "events")
    samples = [cold]
    if cold.quantile(0.5) < HOT_BELOW_MS:
        samples.append(Sample(_events(run, repeats, None), "hot", "events"))
    if samples[-1].quantile(0.5) < GRAPH_BELOW_MS and (replay := _graph(run)) is not None:
        samples.append(Sample(_events(replay, repeats, flush), "cold", "graph"))
        samples.append(Sample(_events(replay, repeats, None), "hot", "graph"))
    return samples


def _events(run: Callable[[], object], repeats: int, flush: Tensor | None) -> list[float]:
    pairs = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in pairs)


def _graph(run: Callable[[], object]) -> Callable[[], object] | None:
    # None if the call cannot be captured, because it syncs or allocates outside the pool.
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return None
    return graph.replay


def ceilings(device: str, dtypes: Iterable[str]) -> dict[str, float | str]:
    """Measures the TFLOP/s of a square matmul for each dtype, and the GB/s of a copy.

    If a matmul of LEAST_CEILING rows does not fit into CEILING_SECONDS, the dtype gets the reason
    instead of a rate.
    """
    found: dict[str, float | str] = {}
    with full_float32(device):
        for dtype in dtypes:
            found[dtype] = _product_rate(getattr(torch, dtype), device)
    bytes_copied = 256 << 20 if device == "cpu" else 1 << 30
    source = torch.empty(bytes_copied, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    copy_ms = _best_ms(lambda: target.copy_(source), device, CEILING_SECONDS)
    found["copy"] = 2 * bytes_copied / copy_ms / 1e6
    return found


def _product_rate(dtype: torch.dtype, device: str) -> float | str:
    # The rate of the largest matmul that fits, in the layout that was fastest at the previous size.
    # A layout can be a thousand times slower than another: bfloat16 without AVX-512 is.
    end = time.perf_counter() + CEILING_SECONDS
    layouts: list[str] = ["rows x rows", "rows x columns"]
    for n in CEILING_SIZES[device]:
        left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        products = {
            "rows x rows": lambda a=left, b=right: a @ b.T,
            "rows x columns": lambda a=left, b=right: a @ b,
        }
        share = (end - time.perf_counter()) / 2 / len(layouts)
        times = {name: _best_ms(products[name], device, share) for name in layouts}
        best_ms = min(times.values())
        layouts = [name for name in layouts if times[name] == best_ms]
        # Two calls of the next size, each eight times the work, and twice that for cache misses.
        if time.perf_counter() + 2 * 2 * 8 * best_ms / 1e3 > end:
            break
    if n < LEAST_CEILING:
        return f"a product of {n} takes {best_ms:.0f} ms, larger ones over {CEILING_SECONDS:g} s"
    return 2 * n**3 / best_ms / 1e9


def _best_ms(run: Callable[[], object], device: str, seconds: float) -> float:
    # After a warm-up call, the minimum of at most seven calls that begin within the seconds.
    end = time.perf_counter() + seconds
    run()
    if device == "cuda":
        return _events(run, 20, None)[0]
    times = [_wall_ms(run)]
    while len(times) < 7 and time.perf_counter() < end:
        times.append(_wall_ms(run))
    return min(times)
