"""Process-wide settings: after calls that overlap in any way, the user's setting is restored."""

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fresh_process import run_python
from test_operators import CALLS, Run, _forward_and_backward
from torch import Tensor

import himo_kernels
from himo_kernels.process_state import Borrowed, full_float32
from himo_kernels.testing import power_law

LEVELS = (("generic", "all"), ("mkldnn", "all"), ("mkldnn", "matmul"))
LEVELS_OF_CUDA = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"))
PRODUCTS = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}


def in_force(*level: str) -> str:
    return torch._C._get_fp32_precision_getter(*level)


def put(level: tuple[str, str], precision: str) -> None:
    torch._C._set_fp32_precision_setter(*level, precision)


def settings(levels: Sequence[tuple[str, str]] = LEVELS) -> list[str]:
    """The setting of each level, from the top; "none" inherits from the level above.

    Only the value in effect can be read. So each level is read with all above it set to "none".
    """
    found = []
    for level in levels:
        found.append(in_force(*level))
        put(level, "none")
    for level, precision in zip(levels, found, strict=True):
        put(level, precision)
    return found


@pytest.fixture(autouse=True)
def _settings_as_found() -> Iterator[None]:
    legacy = torch.get_float32_matmul_precision()
    before = {levels: settings(levels) for levels in (LEVELS, LEVELS_OF_CUDA)}
    yield
    torch.set_float32_matmul_precision(legacy)
    for levels, precisions in before.items():
        for level, precision in zip(levels, precisions, strict=True):
            put(level, precision)


def in_threads(*work: Callable[[], object]) -> list[object]:
    """Runs all concurrently with the shortest switch interval; returns their results, or raises."""
    start, turn = threading.Barrier(len(work)), sys.getswitchinterval()

    def run(one: Callable[[], object]) -> object:
        start.wait()
        return one()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(work)) as pool:
            return list(pool.map(run, work))
    finally:
        sys.setswitchinterval(turn)


@pytest.mark.parametrize(
    ("device", "levels", "values"),
    [
        ("cpu", LEVELS, ("none", "ieee", "tf32", "bf16")),
        ("cuda", LEVELS_OF_CUDA, ("none", "ieee", "tf32")),
    ],
    ids=["cpu", "cuda"],
)
def test_products_are_exact_inside_and_every_level_is_as_set_outside(device, levels, values):
    # autocast warns if the device is missing; the setting needs no device.
    for chosen in itertools.product(values, repeat=3):
        for level, precision in zip(levels, chosen, strict=True):
            put(level, precision)
        with full_float32(device), full_float32(device):
            assert PRODUCTS[device].fp32_precision in ("ieee", "none"), chosen
        assert settings(levels) == list(chosen)


def test_a_setting_that_cuda_does_not_know_is_left_alone():
    put(("generic", "all"), "bf16")  # affects CPUs; CUDA matmuls stay full float32
    with full_float32("cuda"):
        assert PRODUCTS["cuda"].fp32_precision == "none"
    assert settings(LEVELS_OF_CUDA) == ["bf16", "none", "none"]


def test_a_call_writes_no_setting_that_is_exact(monkeypatch):
    written = []
    monkeypatch.setattr(
        torch._C, "_set_fp32_precision_setter", lambda *setting: written.append(setting)
    )
    himo_kernels.pca_reconstruct(torch.eye(8), 0.9)
    assert written == []


def test_products_follow_the_users_later_settings_as_without_a_call():
    torch.backends.fp32_precision = "tf32"
    himo_kernels.pca_reconstruct(torch.eye(8), 0.9)
    torch.backends.fp32_precision = "ieee"
    assert [products.fp32_precision for products in PRODUCTS.values()] == ["ieee", "ieee"]
    assert settings() == ["ieee", "none", "none"]


@pytest.mark.parametrize("legacy", ["high", "medium"])
def test_the_older_settings_are_still_read_after_a_call(legacy):
    torch.set_float32_matmul_precision(legacy)
    himo_kernels.pca_reconstruct(torch.eye(8), 0.9)
    assert torch.get_float32_matmul_precision() == legacy
    assert torch.backends.cuda.matmul.allow_tf32 is True


def test_calls_that_overlap_in_any_order_keep_products_exact_to_the_last():
    PRODUCTS["cpu"].fp32_precision = "tf32"
    for order in itertools.permutations(range(3)):
        calls = [full_float32("cpu") for _ in range(3)]
        for call in calls:
            call.__enter__()
        for number in order:
            assert PRODUCTS["cpu"].fp32_precision == "ieee"
            calls[number].__exit__(None, None, None)
        assert PRODUCTS["cpu"].fp32_precision == "tf32"


def test_a_call_on_another_device_is_exact_while_one_looks_whose_setting_it_is(monkeypatch):
    torch.backends.fp32_precision = "tf32"
    write, entered, look = torch._C._set_fp32_precision_setter, threading.Event(), threading.Event()

    def call() -> str:
        with full_float32("cuda"):
            entered.set()
            look.wait()
            return PRODUCTS["cuda"].fp32_precision

    with ThreadPoolExecutor(1) as pool:
        other = []

        def watch(*setting: str) -> None:
            write(*setting)
            if setting == ("generic", "all", "ieee"):  # temporary; the other thread enters here
                other.append(pool.submit(call))
                entered.wait(0.2)

        monkeypatch.setattr(torch._C, "_set_fp32_precision_setter", watch)
        with full_float32("cpu"):
            monkeypatch.undo()
            look.set()
            assert other[0].result() == "ieee"
    assert settings() == ["tf32", "none", "none"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_inside_puts_the_setting_back_once_the_last_call_ends(error):
    PRODUCTS["cpu"].fp32_precision = "bf16"
    with full_float32("cpu"):
        with pytest.raises(error), full_float32("cpu"):
            raise error
        assert PRODUCTS["cpu"].fp32_precision == "ieee"
    assert PRODUCTS["cpu"].fp32_precision == "bf16"


def test_refused_input_in_eight_threads_leaves_the_settings():
    torch.backends.fp32_precision = "tf32"

    def refused() -> None:
        for _ in range(50):
            with pytest.raises(ValueError):
                himo_kernels.pca_reconstruct(torch.eye(8), 2.0)
            himo_kernels.pca_reconstruct(torch.eye(8), 0.9)

    in_threads(*[refused] * 8)
    assert settings() == ["tf32", "none", "none"]


# In a fresh process: an interrupt may also leave torch's grad mode or autocast changed.
INTERRUPTED = """
import signal, torch, himo_kernels

def interrupt(*_):
    raise KeyboardInterrupt

products, x = torch.backends.mkldnn.matmul, torch.eye(8)
products.fp32_precision = "tf32"
signal.signal(signal.SIGALRM, interrupt)
for number in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4 + number * 3e-6)
        while True:
            himo_kernels.covariance(x, backend="reference")
    except KeyboardInterrupt:
        pass
    himo_kernels.covariance(x)  # the last call to end
    assert products.fp32_precision == "tf32", number
"""


@pytest.mark.slow
def test_an_interrupt_at_any_moment_leaves_the_settings():
    run_python("-c", INTERRUPTED)


def test_what_the_user_sets_while_a_call_is_inside_holds():
    PRODUCTS["cpu"].fp32_precision = "tf32"
    with full_float32("cpu"):
        PRODUCTS["cpu"].fp32_precision = "bf16"
    assert settings() == ["none", "none", "bf16"]
    with full_float32("cpu"):
        PRODUCTS["cpu"].fp32_precision = "tf32"
        with full_float32("cpu"):  # a new call is full float32 under the new setting
            assert PRODUCTS["cpu"].fp32_precision == "ieee"
    assert settings() == ["none", "none", "tf32"]
    with full_float32("cpu"):
        torch.backends.fp32_precision = "bf16"  # another level: matmul keeps its own setting
        assert PRODUCTS["cpu"].fp32_precision == "ieee"
    assert settings() == ["bf16", "none", "tf32"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_is_inside_has_the_users_setting():
    PRODUCTS["cpu"].fp32_precision = "tf32"
    inside, over = threading.Event(), threading.Event()

    def call() -> None:
        with full_float32("cpu"):
            inside.set()
            over.wait()

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait()
    if (child := os.fork()) == 0:  # no thread of the child would restore the setting
        after = PRODUCTS["cpu"].fp32_precision
        with full_float32("cpu"):
            during = PRODUCTS["cpu"].fp32_precision
        os._exit((after, during, PRODUCTS["cpu"].fp32_precision) != ("tf32", "ieee", "tf32"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert PRODUCTS["cpu"].fp32_precision == "ieee"  # here the call is still active
    over.set()
    thread.join()
    assert PRODUCTS["cpu"].fp32_precision == "tf32"


def test_compiled_calls_in_threads_leave_the_settings(generator):
    torch.set_float32_matmul_precision("medium")
    image, text = power_law(2, 24, batch=(32,), generator=generator).unbind(-2)
    expected = himo_kernels.info_nce(image, text, 10.0)
    # Without fullgraph, whose check in torch 2.13 counts the frames of all threads together.
    compiled = torch.compile(lambda: himo_kernels.info_nce(image, text, 10.0), backend="aot_eager")
    compiled()

    def losses() -> list[Tensor]:
        return [compiled() for _ in range(20)]

    for loss in itertools.chain.from_iterable(in_threads(*[losses] * 4)):
        assert torch.equal(loss, expected)
    assert settings() == ["none", "none", "bf16"]


@pytest.mark.parametrize("calls", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_threads_compute_the_bits_of_one_and_leave_the_settings(calls: int, seed: int):
    # 24 x 24 x 24 is large enough for a CPU with bfloat16 to use it if allowed.
    runs = [Run(name, "auto", "cpu", seed) for name in CALLS]
    inputs = [run.inputs(24, 24) for run in runs]
    expected = [_forward_and_backward(run, own) for run, own in zip(runs, inputs, strict=True)]
    torch.set_float32_matmul_precision("medium")
    torch.backends.fp32_precision = "tf32"
    before = settings(), settings(LEVELS_OF_CUDA)

    def work(first: int) -> list[str]:
        wrong = []
        for number in range(calls * len(runs)):
            index = (first + number) % len(runs)
            leaves = [
                tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs[index]
            ]
            results = _forward_and_backward(runs[index], leaves)
            if not all(map(torch.equal, results, expected[index])):
                wrong.append(runs[index].name)
        return wrong

    found = in_threads(*[lambda first=first: work(first) for first in range(8)])
    assert found == [[]] * 8
    assert (settings(), settings(LEVELS_OF_CUDA)) == before


def test_any_setting_can_be_borrowed():
    state = {"value": "loose"}
    borrowed = Borrowed(
        "strict",
        lambda: state["value"],
        lambda value: state.update(value=value),
        serves=lambda value: value == "strict",
    )

    def work() -> int:
        loose = 0
        for _ in range(300):
            with borrowed.lent():
                loose += state["value"] != "strict"
        return loose

    assert in_threads(*[work] * 8) == [0] * 8
    assert state == {"value": "loose"}
