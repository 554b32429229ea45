"""Reads SASS, the machine code of NVIDIA GPUs, from cuobjdump's listing, and predicts its latency.

The prediction is for one warp that issues in order. It follows the stall counts and scoreboards in
each instruction, and assumes a latency where only a scoreboard waits. A warp that shares its
scheduler with others may be bound by issue instead. Expect errors of 40 %: the latencies are
rounded, and contention for functional units is ignored.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

SCHEDULERS = 4  # of a multiprocessor; each issues one instruction a cycle
# Cycles until a result can be read. Global loads are assumed to hit the first-level cache.
LATENCY = {
    **dict.fromkeys(("DFMA", "DADD", "DMUL", "DSETP"), 18),
    **dict.fromkeys(("SHFL", "MUFU", "REDUX", "I2F"), 24),
    **dict.fromkeys(("LDS", "S2R", "LDC"), 30),
    **dict.fromkeys(("LDG", "LD"), 38),
    **dict.fromkeys(("LDSM", "DMMA"), 34),
    "BAR": 30,
    "ATOMS": 60,
    "LDGSTS": 600,
}
OTHER_LATENCY = 20  # conversions, stores, votes
READ_LATENCY = 14  # until a store or load has read its registers
# Cycles for which an instruction of one warp occupies its scheduler's share of a unit: 16 lanes for
# float64, 8 for special functions, shared memory and shuffles.
OCCUPANCY = {
    **dict.fromkeys(("DFMA", "DADD", "DMUL", "DSETP"), 2),
    **dict.fromkeys(("SHFL", "MUFU", "LDS", "LDG", "STS"), 4),
}

UNITS = ("DFMA", "DADD", "DMUL", "DSETP"), ("SHFL", "LDS", "LDG", "STS"), ("MUFU",)
# Multiply-adds of a scheduler's tensor core in a cycle, on sm_90 with 16-bit operands, and float64.
# NVIDIA H100 Tensor Core GPU Architecture: 1024 and 128 for a multiprocessor.
MULTIPLIES = {"HGMMA": 256, "HMMA": 256, "DMMA": 32}

_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?P<operands>[^;]*);\s*/\*\s*0x[0-9a-f]+\s*\*/\s*\n\s*/\*\s*0x(?P<control>[0-9a-f]+)\s*\*/",
    re.M,
)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    address: int
    guarded: bool  # runs only where a predicate holds
    opcode: str  # with its modifiers, such as LDG.E.128
    operands: str
    control: int  # the high 64 bits of the encoding

    @property
    def family(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch continues at."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.family == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def stall(self) -> int:
        return self.control >> 41 & 15

    @property
    def sets(self) -> tuple[int, int]:
        """The scoreboards released when its result is written, and when its operands are read."""
        return self.control >> 46 & 7, self.control >> 49 & 7

    @property
    def waits(self) -> tuple[int, ...]:
        """The scoreboards it waits for."""
        return tuple(board for board in range(6) if self.control >> 52 + board & 1)


def kernels(listing: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each function of a listing by `cuobjdump -sass`."""
    parts = re.split(r"^\s*Function : (\S+)", listing, flags=re.M)
    return {name: parse(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def parse(listing: str) -> list[Instruction]:
    """Returns the instructions of one function."""
    return [
        Instruction(
            int(found["address"], 16),
            found["guard"] is not None,
            found["opcode"],
            found["operands"],
            int(found["control"], 16),
        )
        for found in _INSTRUCTION.finditer(listing)
    ]


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Returns first and last address of each loop: where a branch goes back, outer ones first."""
    found = {(i.target, i.address) for i in code if i.target is not None and i.target < i.address}
    return sorted(found, key=lambda loop: (loop[0], -loop[1]))


def body(code: Sequence[Instruction], loop: tuple[int, int]) -> list[Instruction]:
    """Returns one iteration of a loop, with nested loops once and without paths for rare values.

    A guarded branch forward is taken if it leaves a call out, as the slow path of a division.
    """
    first, last = loop
    index = {instruction.address: i for i, instruction in enumerate(code)}
    path, at = [], index[first]
    while True:
        instruction = code[at]
        path.append(instruction)
        if instruction.address >= last:
            return path
        target = instruction.target
        forward = target is not None and instruction.address < target <= last and target in index
        if forward and target is not None:
            skipped = code[at + 1 : index[target]]
            if not instruction.guarded or any(i.family == "CALL" for i in skipped):
                at = index[target]
                continue
        at += 1


def latency(path: Sequence[Instruction], repeats: int = 6) -> int:
    """Returns the cycles of one pass of one warp over a path that it repeats."""
    clock, last = 0, 0
    boards = [0] * 8
    for _ in range(repeats):
        last = clock
        for instruction in path:
            clock = max([clock, *(boards[board] for board in instruction.waits)])
            written, read = instruction.sets
            after = LATENCY.get(instruction.family, OTHER_LATENCY)
            boards[written] = max(boards[written], clock + after)
            boards[read] = max(boards[read], clock + READ_LATENCY)
            boards[7] = 0  # 7 means none
            clock += max(1, instruction.stall)
            if instruction.family == "BAR":
                clock += LATENCY["BAR"]
    return clock - last


def issue(path: Sequence[Instruction], warps: int) -> int:
    """Returns the cycles that a scheduler needs to issue a path of this many warps of an SM.

    This is the largest of one cycle per instruction and the cycles that each unit is occupied.
    """
    each = -(-warps // SCHEDULERS)
    occupied = [sum(OCCUPANCY.get(i.family, 0) for i in path if i.family in u) for u in UNITS]
    matrix = sum(multiplies(i) / MULTIPLIES.get(i.family, 1) for i in path)
    return math.ceil(each * max(len(path), *occupied, matrix))


def multiplies(instruction: Instruction) -> float:
    """Returns the multiply-adds that one warp contributes to a matrix instruction, or 0."""
    if instruction.family == "HGMMA":  # of a group of four warps
        found = re.search(r"(\d+)x(\d+)x(\d+)", instruction.opcode)
        return math.prod(map(int, found.groups())) / 4 if found else 0
    found = re.search(r"\.(8|16)(8)(4|8|16)\b", instruction.opcode)
    return math.prod(map(int, found.groups())) if found and is_matrix(instruction) else 0


def is_matrix(instruction: Instruction) -> bool:
    """Returns whether this is an instruction of the tensor cores."""
    return instruction.family in MULTIPLIES


def matrix_nest(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Returns the loops around the innermost one with a matrix instruction, outermost first."""
    addresses = [i.address for i in code if is_matrix(i)]
    around = [(a, b) for a, b in loops(code) if any(a <= address <= b for address in addresses)]
    if not around:
        return []
    first, last = min(around, key=lambda loop: loop[1] - loop[0])
    return [(a, b) for a, b in around if a <= first and last <= b]


def cycles(code: Sequence[Instruction], trips: Sequence[int], warps: int) -> int:
    """Returns the predicted cycles of a program whose matrix nest makes these trips.

    warps are those that share the multiprocessor. Each part of the nest takes its latency or its
    issue, whichever is longer.
    """

    def cost(loop: tuple[int, int]) -> int:
        path = body(code, loop)
        return max(latency(path), issue(path, warps))

    nest = [(code[0].address, code[-1].address), *matrix_nest(code)]
    costs = [cost(loop) for loop in nest]
    total, runs = 0, 1
    for level, runs_inside in enumerate([1, *trips]):
        runs *= runs_inside
        inner = costs[level + 1] if level + 1 < len(costs) else 0
        total += runs * max(0, costs[level] - inner)
    return total
