"""What himo_kernels.sass reads from a listing, and its model of latency, on a hand-made one."""

import pytest

from himo_kernels import predict, sass


def line(address: int, text: str, *, stall=1, sets=7, releases=7, waits=()) -> str:
    control = stall << 41 | sets << 46 | releases << 49 | sum(1 << 52 + board for board in waits)
    return (
        f"        /*{address:04x}*/                   {text} ;  /* 0x0000000000007919 */\n"
        f"                                            /* 0x{control:016x} */\n"
    )


# A loop of loads and products inside one of exponentials.
LISTING = "".join(
    (
        "\tFunction : first\n",
        line(0x00, "S2R R0, SR_CTAID.X", sets=0),
        line(0x10, "MUFU.EX2 R1, R0", sets=1, waits=(0,)),
        line(0x20, "LDG.E.128 R4, desc[UR6][R2.64]", sets=2),
        line(0x30, "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", waits=(2,), stall=3),
        line(0x40, "@P0 BRA 0x20", stall=5),
        line(0x50, "@!P1 BRA 0x10", waits=(1,), stall=5),
        line(0x60, "EXIT", stall=5),
        "\tFunction : second\n",
        line(0x00, "DFMA R0, R0, R0, R0", sets=0, waits=(0,)),
        line(0x10, "@P0 BRA 0x00", stall=1),
    )
)
CODE = sass.kernels(LISTING)["first"]


def test_functions_of_a_listing():
    assert {name: len(code) for name, code in sass.kernels(LISTING).items()} == {
        "first": 7,
        "second": 2,
    }


def test_fields_of_an_instruction():
    load = CODE[2]
    assert (load.address, load.opcode, load.family) == (0x20, "LDG.E.128", "LDG")
    assert (load.stall, load.sets, load.waits) == (1, (2, 7), ())
    assert CODE[3].waits == (2,) and CODE[3].stall == 3
    assert CODE[4].target == 0x20 and CODE[4].guarded and not load.guarded


def test_loops_and_the_nest_of_the_matrix_instruction():
    assert sass.loops(CODE) == [(0x10, 0x50), (0x20, 0x40)]
    assert sass.matrix_nest(CODE) == [(0x10, 0x50), (0x20, 0x40)]
    assert sass.matrix_nest(sass.kernels(LISTING)["second"]) == []


def test_the_latency_of_a_chain_is_that_of_its_unit():
    chain = sass.kernels(LISTING)["second"]
    assert sass.latency(sass.body(chain, (0x00, 0x10))) == sass.LATENCY["DFMA"]
    # A load, 38 cycles, then the stalls of what waits for it.
    assert sass.latency(sass.body(CODE, (0x20, 0x40))) == sass.LATENCY["LDG"] + 3 + 5


def test_slow_paths_are_left_out():
    code = sass.parse(
        line(0x00, "MUFU.RCP64H R0, R1")
        + line(0x10, "@P0 BRA 0x40")
        + line(0x20, "MOV R2, 0x30")
        + line(0x30, "CALL.REL.NOINC 0x100")
        + line(0x40, "@P1 BRA 0x00")
    )
    assert [i.address for i in sass.body(code, (0x00, 0x40))] == [0x00, 0x10, 0x40]


def test_warps_of_a_scheduler_share_its_units():
    path = sass.body(CODE, (0x20, 0x40))
    product = 64 * 128 * 16 / 1024  # cycles of a multiprocessor's tensor cores
    assert sass.issue(path, 4) == product
    assert sass.issue(path, 8) == 2 * product
    assert sass.issue(CODE[:3], 4) == 4  # a load occupies its unit for four cycles


def test_a_nest_multiplies_its_trips():
    one, inner, outer = (sass.cycles(CODE, trips, 4) for trips in ((1, 1), (1, 2), (2, 1)))
    product = 64 * 128 * 16 // 1024
    assert inner - one == product
    assert sass.cycles(CODE, (3, 5), 4) - one == 2 * (outer - one) + 3 * 4 * product


def test_a_launch_takes_whole_waves():
    values = {
        "width": 768,
        "BLOCK_INNER": 64,
        "column_count": 256,
        "BLOCK_COLUMNS": 128,
        "splits": 1,
    }
    one, two, known = (
        predict.microseconds("statistics_kernel", values, CODE, programs, 4, 2)
        for programs in (1, 2 * predict.SMS + 1, 2 * predict.SMS)
    )
    assert one == known > 0
    assert two == 2 * one
    assert one == sass.cycles(CODE, (2, 12), 8) / (1e3 * predict.CLOCK_GHZ)


@pytest.mark.parametrize("kernel", ["another_kernel", "grad_logits_kernel"])
def test_no_time_is_predicted_where_the_trips_are_not_known(kernel):
    # The listing has a nest of two loops, grad_logits_kernel a nest of one.
    values = {"width": 768, "BLOCK_INNER": 64}
    assert predict.microseconds(kernel, values, CODE, 1, 4, 1) == 0
