"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU, and checks what ptxas reports.

python -m himo_kernels.aot [word ...]     only the cases whose label contains all of these words

It compiles exactly what the launchers launch: each case runs them on meta tensors, and each launch
is recorded, with its types, constants and options, instead of executed. One line per launch shows
registers, spills and the programs that fit on a multiprocessor; for matmuls also the matrix
instruction, the bytes per load, the instructions outside the loop of the matrix instruction, and on
sm_90 the time that sass.py predicts. A launch that fails a check (broken_promise) fails the run.
"""

import importlib
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from himo_kernels import _triton, predict, sass

TARGETS = (80, 90)  # A100, H100 and H200

# Per multiprocessor: CUDA C++ Programming Guide, compute capabilities, technical specifications.
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
SHARED_RESERVED = 1024  # per block, by the system; a block can request the rest
REGISTERS = 64 * 1024
WARPS, BLOCKS = 64, 32
# Registers are allocated in multiples of 256 per warp, warps in fours: CUDA occupancy calculator.
REGISTER_GRANULARITY, WARP_GRANULARITY = 256, 4

# Kernels whose epilogue takes as long as their matrix instructions: the largest number of
# instructions outside the loop of these that 128 x 128 tiles of 16 bits may have on sm_90.
MOST_OUTSIDE = {"statistics_kernel": 3400, "grad_logits_kernel": 2750}

# Modules with a function aot_cases() -> Iterable[Case].
MODULES: tuple[str, ...] = (
    "himo_kernels.covariance.triton",
    "himo_kernels.normalize.triton",
    "himo_kernels.pca.triton",
    "himo_kernels.info_nce.triton",
    "himo_kernels.info_nce.triton.pairs",
    "himo_kernels.sigmoid_loss.triton",
)


@dataclass(frozen=True)
class Case:
    """One way of calling launchers: run() calls them on meta tensors."""

    label: str
    run: Callable[[], object]
    may_spill: bool = False
    ragged: bool = False  # sizes that are not multiples of 16, which force narrow loads


@dataclass(frozen=True)
class Call:
    """One launch of a kernel."""

    kernel: Any
    arguments: tuple[object, ...]
    named: dict[str, object]  # arguments and options
    programs: int


@dataclass(frozen=True)
class Launch:
    """What the compiler needs to know about one recorded launch."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]  # (argument, type), "constexpr" for constants
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]  # indices of arguments that are multiples of 16
    options: tuple[tuple[str, object], ...]  # num_warps, num_stages, ...
    # Of the first launch with all of the above:
    programs: int = field(default=0, compare=False)
    sizes: tuple[tuple[str, int], ...] = field(default=(), compare=False)  # integer arguments


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one launch."""

    registers: int  # per thread
    spilled_bytes: int  # stack frame per thread; kernels have no local arrays
    shared_bytes: int  # per block
    programs: int  # that fit on a multiprocessor at once
    # For a launch with matmuls; "" and 0 otherwise:
    multiplies: str  # the matrix instruction, or else the fused multiply-add
    load_bytes: int  # per thread and global load, at the width that loads the most bytes
    outside: int = 0  # instructions outside the loop of the matrix instruction; all without a loop
    in_loop: bool = True  # whether a matrix instruction is in a loop
    microseconds: float = 0  # predicted for the launch; 0 if unknown


def why_not() -> str | None:
    """Returns why there are no kernels to compile, or None."""
    return _triton.MISSING


def interpreted() -> str | None:
    """Returns the error of a process whose kernels are interpreted, not compiled, or None."""
    return f"expected no {_triton.INTERPRETER_VARIABLE}=1" if _triton.INTERPRETED else None


def cases(words: Iterable[str] = ()) -> list[Case]:
    """Returns the cases of all modules whose label contains all of these words."""
    found = [case for name in MODULES for case in importlib.import_module(name).aot_cases()]
    return [case for case in found if all(word in case.label for word in words)]


def calls(case: Case, target: int) -> list[Call]:
    """Returns the launches of a case on an architecture, in order, with their arguments."""
    recorded: list[Call] = []
    with _recording(recorded.append), _target(target):
        case.run()
    return recorded


def launches(case: Case, target: int) -> list[Launch]:
    """Returns the distinct launches of a case on an architecture."""
    return list(dict.fromkeys(_launch(call) for call in calls(case, target)))


def device_launches(call: Callable[[], object]) -> Counter[str]:
    """Returns how often each Triton kernel and torch operator would launch work on the device.

    call runs launchers on meta tensors, which have no values: reading a value raises. Views and
    empty allocations launch nothing. An operator counts once, although torch.linalg.eigh, for
    example, launches several kernels. Not available in Triton's interpreter, which runs kernels.
    """
    if error := interpreted():
        raise RuntimeError(f"device_launches: {error}")
    counted: Counter[str] = Counter()

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(
            self, operator: Any, types: Any, arguments: Any = (), named: Any = None
        ) -> Any:
            allocates = operator.overloadpacket.__name__ in _ALLOCATIONS
            if not (operator.is_view or allocates):
                counted[str(operator)] += 1
            return operator(*arguments, **(named or {}))

    def record(call: Call) -> None:
        counted[call.kernel.__name__] += 1

    with _recording(record), Operators():
        call()
    return counted


_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


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
        if _precision(launch) is not None:
            command.insert(1, "-sass")  # 0.15 s
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (
        max(int(number) for number in re.findall(rf"\b{name}:(\d+)", listing))
        for name in ("REG", "STACK")
    )
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    programs = programs_at_once(registers, warps, shared, target)
    used = Resources(registers, stack, shared, programs, *instructions(listing))
    code = sass.parse(listing)
    nest = sass.matrix_nest(code)
    first, last = nest[-1] if nest else (0, -1)
    outside = sum(not first <= instruction.address <= last for instruction in code)
    microseconds = 0.0
    if target == 90:
        values = {**dict(launch.constants), **dict(launch.sizes)}
        name, grid = launch.kernel.__name__, launch.programs
        microseconds = predict.microseconds(name, values, code, grid, warps, programs)
    return replace(used, outside=outside, in_loop=bool(nest), microseconds=microseconds)


def programs_at_once(registers: int, warps: int, shared_bytes: int, target: int) -> int:
    """Returns how many programs of this size fit on a multiprocessor of sm_<target>."""
    per_warp = -(-32 * registers // REGISTER_GRANULARITY) * REGISTER_GRANULARITY
    with_registers = REGISTERS // per_warp // WARP_GRANULARITY * WARP_GRANULARITY
    with_memory = SHARED_BYTES[target] // (shared_bytes + SHARED_RESERVED)
    return min(with_registers // warps, WARPS // warps, BLOCKS, with_memory)


def instructions(listing: str) -> tuple[str, int]:
    """Returns Resources' `multiplies` and `load_bytes` from cuobjdump's SASS listing."""
    counts = Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", listing, re.M))
    multiplies = ""
    for family in (r"HGMMA|HMMA|DMMA", r"FFMA|DFMA"):
        found = {name: n for name, n in counts.items() if re.match(rf"({family})\b", name)}
        if found:
            multiplies = max(found, key=lambda name: found[name])
            break
    carried: Counter[int] = Counter()
    for name, count in counts.items():
        if re.match(r"(LDG|LDGSTS)\b", name):
            bits = re.search(r"\.[US]?(8|16|64|128)\b", name)
            width = int(bits[1]) // 8 if bits else 4
            carried[width] += width * count
    return multiplies, max(carried, key=lambda width: carried[width], default=0)


def _precision(launch: Launch) -> object:
    # The precision of tl.dot, an argument of every kernel that calls it; otherwise None.
    return dict(launch.constants).get("PRECISION")


def broken_promise(case: Case, launch: Launch, target: int, used: Resources) -> str:
    """Returns which check a launch fails, or "".

    The checks: no spills; shared memory fits; float64 matmuls use DMMA, all others but full float32
    use HGMMA or HMMA, in a loop; 16-bit operands are loaded 16 bytes at a time; epilogues are not
    longer than MOST_OUTSIDE.
    """
    if used.spilled_bytes and not case.may_spill:
        return "SPILLS"
    if not used.programs:
        return "DOES NOT FIT"
    precision = _precision(launch)
    if str(dict(launch.constants).get("SUMS")) == "fp64":
        instruction = "DMMA"
    elif precision in (None, "ieee"):
        return ""
    else:
        instruction = "HGMMA" if target >= 90 else "HMMA"
    if not used.multiplies.startswith(instruction):
        return f"NO {instruction}"
    if not used.in_loop:
        return f"NO LOOP AROUND {instruction}"
    pointers = [kind for _, kind in launch.signature if kind.startswith("*")]
    narrow = sum(kind in ("*fp16", "*bf16") for kind in pointers) >= 2
    if narrow and not case.ragged and used.load_bytes < 16:
        return "NARROW LOADS"
    constants = dict(launch.constants)
    large = constants.get("BLOCK_ROWS") == constants.get("BLOCK_COLUMNS") == 128
    most = MOST_OUTSIDE.get(launch.kernel.__name__) if large and narrow and target == 90 else None
    if most is not None and used.outside > most:
        return f"{used.outside - most} INSTRUCTIONS TOO MANY OUTSIDE THE LOOP"
    return ""


@contextmanager
def _target(target: int) -> Iterator[None]:
    _triton.aot_target = target
    try:
        yield
    finally:
        _triton.aot_target = None


@contextmanager
def _recording(record: Callable[[Call], None]) -> Iterator[None]:
    # kernel[grid](...) calls JITFunction.run, which would load the CUDA driver.
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *arguments: object, grid: object, warmup: bool, **named: object) -> None:
        programs = cast(tuple[int, ...], grid(named) if callable(grid) else grid)
        record(Call(kernel, arguments, named, math.prod(programs)))

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


def _launch(call: Call) -> Launch:
    # The types and specialisations that Triton chooses at a launch.
    kernel, options = call.kernel, dict(call.named)
    values = dict(zip(kernel.arg_names, call.arguments, strict=False))
    values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    constexpr = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, constants, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = values.get(name, parameter.default)
        specialises = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature.append((name, f"*{_TYPES[value.dtype]}"))
            divisible.append(index)
        elif name in constexpr or value is None or (value == 1 and specialises):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, int):
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and specialises:
                divisible.append(index)
        else:
            raise TypeError(f"{kernel.arg_names[index]}: no type for {value!r} in a kernel")
    sizes = tuple((name, value) for name, value in values.items() if isinstance(value, int))
    return Launch(
        kernel,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        tuple(sorted(options.items())),
        call.programs,
        sizes,
    )


def main(words: list[str]) -> int:
    """Compiles the cases whose label contains these words; returns the exit status."""
    if reason := why_not():
        print(f"triton: {reason}; no kernel compiled")
        return 0
    work: dict[tuple[Launch, int], Case] = {}  # several cases may make the same launch
    for case in cases(words):
        for target in TARGETS:
            for launch in launches(case, target):
                work.setdefault((launch, target), case)
    _work[:] = [(case, *key) for key, case in work.items()]
    failures = 0
    # Forked, because kernels cannot be pickled.
    with multiprocessing.get_context("fork").Pool() as pool:
        for (case, launch, target), used in zip(
            _work, pool.imap(_compile_at, range(len(_work))), strict=True
        ):
            broken = broken_promise(case, launch, target, used)
            failures += bool(broken)
            product = ""
            if used.load_bytes:
                product = (
                    f", {used.load_bytes:>2} B loads, {used.multiplies}, {used.outside} outside"
                )
            if used.microseconds:
                product += f", {used.microseconds:.0f} us predicted"
            print(
                f"sm_{target} {launch.kernel.__name__:<26} {used.registers:>3} registers, "
                f"{used.programs:>2} at once, {used.spilled_bytes:>3} B spilled, "
                f"{used.shared_bytes / 1024:>5.1f} KiB shared{product:<70}  {case.label}  {broken}",
                flush=True,
            )
    print(f"triton: {len(_work)} launches compiled, {failures} break a promise")
    return int(failures > 0)


_work: list[tuple[Case, Launch, int]] = []  # filled by main for its forked processes


def _compile_at(index: int) -> Resources:
    _, launch, target = _work[index]
    return compile_launch(launch, target)


if __name__ == "__main__":
    if _triton.INTERPRETED:  # kernels and tiles for the interpreter cannot be compiled: begin anew
        del os.environ[_triton.INTERPRETER_VARIABLE]
        os.execv(sys.executable, [sys.executable, "-m", "himo_kernels.aot", *sys.argv[1:]])
    # Import by name: as a script, this file is a second module with another class Case.
    sys.exit(importlib.import_module("himo_kernels.aot").main(sys.argv[1:]))
