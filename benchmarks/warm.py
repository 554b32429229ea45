"""Compiles kernels into Triton's cache before they are launched, in parallel and without a GPU.

python -m benchmarks.warm

Triton compiles a kernel at its first launch, one kernel after the other: minutes for a run that
needs hundreds. This command records the launches of the cells below and of himo_kernels.aot on meta
tensors, and parallel processes compile their kernels. They go through Triton's own launch, up to
the point where it would load the kernel. The keys in the cache are therefore the keys of a later
run with the same source, versions and environment. A second run finds every kernel there.
"""

import argparse
import functools
import importlib
import itertools
import multiprocessing
import sys
import time
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import small
from benchmarks.run import positive
from himo_kernels import aot
from himo_kernels.aot import Call, Case

TARGET = 90  # H100 and H200
FEATURES = 768
# Of the rows and of the tests, with sizes that are no multiples of 16.
SAMPLES = (128, 1024, 32768, 2048 + 37, 32768 + 37)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)


def cases() -> Iterator[Case]:
    """Returns the launches of a first run on a GPU, those that everything waits for first."""
    for samples in SAMPLES[:3]:
        yield _case("himo_loss", _head, samples, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        yield _case("small", _head, small.SAMPLES, dtype, small.FEATURES)
    tune = importlib.import_module("himo_kernels.info_nce.triton.tune")
    for text in tune.CANDIDATES:
        yield Case(f"tile {text}", functools.partial(_tune, text))
    for operator in ("dual_info_nce", "info_nce", "low_rank"):
        for dtype in DTYPES:
            for samples in SAMPLES:
                for smoothing, keys in ((0.0, True), (0.1, False), (0.1, True)):
                    yield _case(operator, _losses, operator, samples, dtype, smoothing, keys)
    for shape in ((128, 768), (8, 128, 768), (64, 16, 32), (768, 128), (4096, 96), (1000, 123)):
        for dtype in (*DTYPES, torch.float64):
            yield _case("pca_reconstruct", _hide, shape, dtype)
    yield from aot.cases()


def _case(label: str, run: Any, *arguments: object) -> Case:
    return Case(f"{label} {arguments}", functools.partial(run, *arguments))


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _head(samples: int, dtype: torch.dtype, features: int = FEATURES) -> None:
    # HiMoLoss of one process: normalised rows, HiDe and both losses.
    normalize = importlib.import_module("himo_kernels.normalize.triton")
    x = _meta(samples, features, dtype=dtype)
    normalize.normalize_bwd(normalize.normalize_fwd(x), x)
    _hide((samples, features), dtype)
    for smoothing, keys in ((0.0, True), (0.1, False)):  # presets paper and official
        _losses("dual_info_nce", samples, dtype, smoothing, keys, features)


def _hide(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pca = importlib.import_module("himo_kernels.pca.triton")
    x, threshold = _meta(*shape, dtype=dtype), _meta(dtype=torch.float64)
    output, rank, *saved = pca.pca_reconstruct_fwd(x, threshold, (1e-12, 0.0))
    for basis in (True, False):
        pca.pca_reconstruct_bwd(output, x, *saved, rank, 1e-6, basis)


def _losses(
    operator: str,
    samples: int,
    dtype: torch.dtype,
    smoothing: float,
    differentiate_keys: bool,
    width: int = FEATURES,
) -> None:
    launchers = importlib.import_module("himo_kernels.info_nce.triton")
    features, scale = _meta(samples, width, dtype=dtype), _meta()
    inner = min(samples, 257)
    inputs, name = {
        "info_nce": ((features,) * 2, "info_nce"),
        "dual_info_nce": ((features,) * 3, "dual_info_nce"),
        "low_rank": (
            (
                *(features, features, _meta(samples, inner, dtype=dtype)),
                *(_meta(inner, width, dtype=dtype), _meta(dtype=torch.int64)),
            ),
            "dual_info_nce_low_rank",
        ),
    }[operator]
    inputs = (*inputs, scale)
    outputs = getattr(launchers, f"{name}_fwd")(*inputs, smoothing)
    nlls = [output for index, output in enumerate(outputs) if index % 3]
    needs = [True] * sum(x.is_floating_point() for x in inputs)
    getattr(launchers, f"{name}_bwd")(
        *(outputs[::3] + inputs), *nlls, smoothing, differentiate_keys, needs
    )


def _tune(text: str) -> None:
    # The default of himo_kernels.info_nce.triton.tune.
    tune = importlib.import_module("himo_kernels.info_nce.triton.tune")
    tune.tiles.forced = tune.parse_tile(text)
    try:
        features = _meta(32768, FEATURES, dtype=torch.bfloat16)
        tune.forward_and_backward(features, features, _meta())
    finally:
        tune.tiles.forced = None


class _Driver:
    """What a launch asks the CUDA driver for until its kernel is compiled."""

    def __init__(self, target: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def distinct(cases: Iterable[Case], target: int = TARGET) -> Iterator[tuple[Hashable, Call]]:
    """Yields each kernel that Triton would compile once: its key in Triton, and a launch of it.

    From then on no kernel of this process can run on a device: its driver is replaced.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    driver.set_active(_Driver(target))
    keys: list[Hashable] = []

    def record(*, key: Hashable, **_: Any) -> bool:
        keys.append(key)
        return True  # compiles nothing

    found: set[Hashable] = set()
    for case in cases:
        for call in aot.calls(case, target):
            knobs.runtime.jit_cache_hook = record
            try:
                _launch(call)
            finally:
                knobs.runtime.jit_cache_hook = None
            key = call.kernel.__name__, keys.pop()
            if key not in found:
                found.add(key)
                yield key, call


def compile_call(call: Call) -> bool:
    """Compiles the kernel of a launch; returns whether it was in the cache."""
    from triton import knobs

    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    try:
        _launch(call)
    finally:
        knobs.compilation.listener = None
    return all(hits)


def _launch(call: Call) -> None:
    call.kernel.run(*call.arguments, grid=(1,), warmup=True, **call.named)


def main(arguments: list[str] | None = None) -> int:
    """Compiles the kernels; returns 1 if one cannot be compiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--processes", type=positive, help="by default one for each core")
    parser.add_argument("--first", type=positive, help="compile only so many kernels")
    options = parser.parse_args(arguments)
    if error := aot.interpreted():
        parser.error(error)
    if reason := aot.why_not():
        print(f"warm: {reason}; no kernel compiled")
        return 0
    start = time.monotonic()
    _work[:] = [call for _, call in itertools.islice(distinct(cases()), options.first)]
    print(f"{len(_work)} kernels, recorded in {time.monotonic() - start:.0f} s", flush=True)
    counts = dict.fromkeys(("compiled", "found in the cache", "failed"), 0)
    # Forked, because kernels cannot be pickled.
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        for index, result in pool.imap_unordered(_compile_at, range(len(_work))):
            if result not in counts:
                print(f"{_work[index].kernel.__name__}: {result}", flush=True)
                result = "failed"
            counts[result] += 1
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    print(f"{told}; {time.monotonic() - start:.0f} s")
    return int(counts["failed"] > 0)


_work: list[Call] = []  # filled by main for its forked processes


def _compile_at(index: int) -> tuple[int, str]:
    try:
        return index, "found in the cache" if compile_call(_work[index]) else "compiled"
    except Exception as error:  # too much shared memory, or an error of the compiler: tell, go on
        return index, f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    # Import by name: as a script, this file is a second module with another list of work.
    sys.exit(importlib.import_module("benchmarks.warm").main())
