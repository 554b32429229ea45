"""What himo_kernels.aot reads from the compiler, and which launches fail."""

import dataclasses
from types import SimpleNamespace

import pytest
from fresh_process import run_python

from himo_kernels import aot

LISTING = """
	Function : _kernel
 Function _kernel:
  REG:40 STACK:0 SHARED:0 LOCAL:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64], P1 ;
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R4+0x800], desc[UR6][R2.64], P1 ;
        /*0030*/              @UP0 LDG.E.64 R8, desc[UR6][R6.64] ;
        /*0040*/                   LDG.E R9, desc[UR6][R6.64] ;
        /*0050*/                   LDG.E.U16 R9, desc[UR6][R6.64] ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   FFMA R3, R3, R3, R3 ;
        /*0080*/                   FFMA R3, R3, R3, R3 ;
"""


def test_instructions_of_a_listing():
    assert aot.instructions(LISTING) == ("HGMMA.64x128x16.F32.BF16", 16)
    without = "\n".join(line for line in LISTING.splitlines() if "HGMMA" not in line)
    assert aot.instructions(without) == ("FFMA", 16)
    # 80 bytes in 4-byte loads outweigh 32 in 16-byte loads.
    assert aot.instructions(without + 20 * "\n /*00*/ LDG.E R9 ;")[1] == 4
    assert aot.instructions("") == ("", 0)


@pytest.mark.parametrize(
    ("registers", "warps", "shared_kib", "target", "programs"),
    [
        (255, 8, 96, 90, 1),  # 8 warps of 256 x 32 registers use all registers
        (128, 8, 96, 90, 2),  # registers and memory both allow two
        (128, 8, 96, 80, 1),  # memory allows one
        (129, 4, 0, 90, 3),  # 136 registers per thread: 15 warps, rounded down to 12
        (32, 1, 0, 90, 32),  # limited by blocks
        (32, 4, 0, 90, 16),  # limited by warps
        (32, 4, 228, 90, 0),  # more than exists
    ],
)
def test_programs_of_a_multiprocessor(registers, warps, shared_kib, target, programs):
    assert aot.programs_at_once(registers, warps, shared_kib * 1024, target) == programs


def launch(precision: str | None, sums: str = "fp32", pointers: tuple[str, ...] = ("*bf16",) * 2):
    signature = tuple((f"x{index}", kind) for index, kind in enumerate(pointers))
    constants = (("SUMS", sums), ("PRECISION", precision))
    return aot.Launch(None, signature, constants, (), ())


KEPT = aot.Resources(100, 0, 1024, 4, "HGMMA.64x64x16.F32.BF16", 16)


@pytest.mark.parametrize(
    ("recorded", "target", "changes", "broken"),
    [
        (launch("tf32"), 90, {}, ""),
        (launch("tf32"), 90, {"spilled_bytes": 8}, "SPILLS"),
        (launch(None), 90, {"programs": 0}, "DOES NOT FIT"),
        (launch("tf32"), 90, {"multiplies": "HMMA.16816.F32.BF16"}, "NO HGMMA"),
        (launch("tf32"), 80, {"multiplies": "HMMA.16816.F32.BF16"}, ""),
        (launch("tf32x3", "fp32"), 80, {"multiplies": "FFMA"}, "NO HMMA"),
        (launch("ieee", "fp64"), 90, {"multiplies": "DMMA.16x8x16"}, ""),
        (launch("ieee", "fp64"), 90, {"multiplies": "DFMA"}, "NO DMMA"),
        (launch("ieee"), 90, {"multiplies": "FFMA"}, ""),
        (launch("tf32"), 90, {"in_loop": False}, "NO LOOP AROUND HGMMA"),
        (launch("tf32"), 90, {"load_bytes": 4}, "NARROW LOADS"),
        (launch("tf32", pointers=("*fp32", "*bf16")), 90, {"load_bytes": 4}, ""),
        (launch(None), 90, {"multiplies": "", "load_bytes": 0}, ""),
    ],
)
def test_what_breaks_a_promise(recorded, target, changes, broken):
    used = dataclasses.replace(KEPT, **changes)
    assert aot.broken_promise(aot.Case("", lambda: None), recorded, target, used) == broken


def test_an_epilogue_has_a_largest_length_on_large_tiles():
    most = aot.MOST_OUTSIDE["statistics_kernel"]
    kernel = SimpleNamespace(__name__="statistics_kernel")

    def broken(outside: int, columns: int = 128, target: int = 90) -> str:
        tile = (("BLOCK_ROWS", 128), ("BLOCK_COLUMNS", columns))
        recorded = launch("tf32")
        recorded = dataclasses.replace(recorded, kernel=kernel, constants=recorded.constants + tile)
        used = dataclasses.replace(KEPT, outside=outside)
        if target < 90:
            used = dataclasses.replace(used, multiplies="HMMA.16816.F32.BF16")
        return aot.broken_promise(aot.Case("", lambda: None), recorded, target, used)

    assert broken(most) == ""
    assert broken(most + 7) == "7 INSTRUCTIONS TOO MANY OUTSIDE THE LOOP"
    assert broken(most + 7, columns=256) == broken(most + 7, target=80) == ""


def test_a_case_may_spill_and_may_load_less():
    bad = dataclasses.replace(KEPT, spilled_bytes=8, load_bytes=2)
    case = aot.Case("", lambda: None, may_spill=True, ragged=True)
    assert aot.broken_promise(case, launch("tf32"), 90, bad) == ""


@pytest.mark.slow
def test_the_same_is_compiled_where_the_interpreter_is_asked_for():
    pytest.importorskip("triton")
    command = ("-m", "himo_kernels.aot", "normalize", "float64", "4096")
    compiled = run_python(*command, TRITON_INTERPRET="0")
    assert "4 launches compiled, 0 break a promise" in compiled
    assert run_python(*command, TRITON_INTERPRET="1") == compiled
