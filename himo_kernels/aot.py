"""Compiles every Triton kernel for sm_80 and sm_90, without a GPU: registers, spills, memory.

python -m himo_kernels.aot [word ...]     only the cases whose label has all of these words

What is compiled is what the launchers launch: each case runs them on meta tensors, and a launch is
recorded, with its types, constants and options, rather than made. A spill fails the run, unless
its case says that it may.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himo_kernels import _triton

TARGETS = (80, 90)  # A100, H100 and H200
# Bytes of shared memory that a block may have: CUDA C++ Programming Guide, compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}

# Modules with a function aot_cases() -> Iterable[Case].
MODULES: tuple[str, ...] = (
    "himo_kernels.covariance.triton",
    "himo_kernels.normalize.triton",
    "himo_kernels.pca.triton",
    "himo_kernels.info_nce.triton",
)


@dataclass(frozen=True)
class Case:
    """One way of calling launchers: run() calls them on meta tensors."""

    label: str
    run: Callable[[], object]
    may_spill: bool = False


@dataclass(frozen=True)
class Launch:
    """What the compiler needs of one recorded launch."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]  # (argument, type), "constexpr" for constants
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]  # indices of arguments that are multiples of 16
    options: tuple[tuple[str, object], ...]  # num_warps, num_stages, ...


@dataclass(frozen=True)
class Resources:
    """What ptxas made of one launch."""

    registers: int  # of a thread
    spilled_bytes: int  # the stack frame of a thread; kernels have no arrays of their own
    shared_bytes: int  # of a block


def cases(words: Iterable[str] = ()) -> list[Case]:
    """Returns the cases of all modules whose label has all of these words."""
    found = [case for name in MODULES for case in importlib.import_module(name).aot_cases()]
    return [case for case in found if all(word in case.label for word in words)]


def launches(case: Case, target: int) -> list[Launch]:
    """Returns the different launches that a case makes on an architecture."""
    recorded: dict[Launch, None] = {}
    with _recording(recorded), _target(target):
        case.run()
    return list(recorded)


def compile_launch(launch: Launch, target: int) -> Resources:
    """Returns the resources of a launch compiled for sm_<target>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(index,): [["tt.divisibility", 16]] for index in launch.divisible}
    source = ASTSource(
        launch.kernel, dict(launch.signature), dict(launch.constants), attrs=attributes
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options=dict(launch.options)
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (
        max(int(number) for number in re.findall(rf"\b{name}:(\d+)", usage))
        for name in ("REG", "STACK")
    )
    return Resources(registers, stack, compiled.metadata.shared)


@contextmanager
def _target(target: int) -> Iterator[None]:
    _triton.aot_target = target
    try:
        yield
    finally:
        _triton.aot_target = None


@contextmanager
def _recording(recorded: dict[Launch, None]) -> Iterator[None]:
    # kernel[grid](...) calls JITFunction.run, which would start a driver.
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *arguments: object, grid: object, warmup: bool, **named: object) -> None:
        recorded.setdefault(_launch(kernel, arguments, named))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
}


def _launch(kernel: Any, arguments: tuple[object, ...], keywords: dict[str, object]) -> Launch:
    # Types and specialisations as Triton chooses them at a launch.
    options = dict(keywords)
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    constexpr = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, constants, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = values.get(name, parameter.default)
        if isinstance(value, Tensor):
            signature.append((name, f"*{_TYPES[value.dtype]}"))
            divisible.append(index)
        elif name in constexpr or value is None or value == 1:
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, int):
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                divisible.append(index)
        else:
            raise TypeError(f"{kernel.arg_names[index]}: no type for {value!r} in a kernel")
    return Launch(
        kernel, tuple(signature), tuple(constants), tuple(divisible), tuple(sorted(options.items()))
    )


def main(words: list[str]) -> int:
    """Compiles the cases that have these words in their label; returns the exit status."""
    if reason := _triton.MISSING:
        print(f"triton: {reason}; no kernel compiled")
        return 0
    failures = 0
    seen: set[tuple[Launch, int]] = set()  # cases share launches
    for case in cases(words):
        for target in TARGETS:
            for launch in launches(case, target):
                if (launch, target) in seen:
                    continue
                seen.add((launch, target))
                used = compile_launch(launch, target)
                fits = used.shared_bytes <= SHARED_LIMIT[target]
                good = fits and (case.may_spill or used.spilled_bytes == 0)
                failures += not good
                print(
                    f"sm_{target} {launch.kernel.__name__:<28} {used.registers:>3} registers, "
                    f"{used.spilled_bytes:>4} B spilled, {used.shared_bytes / 1024:>5.1f} KiB "
                    f"shared  {case.label}{'' if good else '  FAILS'}"
                )
    print(f"triton: {len(seen)} launches compiled, {failures} spill or do not fit")
    return int(failures > 0)


if __name__ == "__main__":
    # A kernel defined for the interpreter cannot be compiled.
    os.environ.pop(_triton.INTERPRETER_VARIABLE, None)
    # By its name: run as a script, this file is a second module, whose Case is another class.
    sys.exit(importlib.import_module("himo_kernels.aot").main(sys.argv[1:]))
