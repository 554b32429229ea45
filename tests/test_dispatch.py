"""Which backend a call takes: the table, "auto", a named backend, the environment variable."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fresh_process import run_python
from torch import Tensor

import himo_kernels
from himo_kernels import dispatch, info
from himo_kernels.covariance import reference
from himo_kernels.dispatch import OPERATORS, Backend, backend_names

COVARIANCE = OPERATORS["covariance"]
BACKENDS = tuple(backend_names())
OTHERS = [name for name in BACKENDS if name != "reference"]
NEW = "new"  # a backend that the tests insert first in a table
SMALL = "import torch, himo_kernels; x = torch.eye(3)\n"  # start of the scripts below


@pytest.fixture(autouse=True)
def _no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    # The suite may run under HIMO_KERNELS_BACKEND.
    monkeypatch.setattr(dispatch, "_default_backend", "auto")


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(5, 3, generator=generator)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Registers a covariance backend that wraps the reference and records its passes."""

    def register(name: str, **settings: Any) -> list[str]:
        passes: list[str] = []

        def fwd(*arguments: Any) -> Any:
            passes.append("fwd")
            return reference.covariance_fwd(*arguments)

        def bwd(*arguments: Any) -> Any:
            passes.append("bwd")
            return reference.covariance_bwd(*arguments)

        backend = Backend({"fwd": fwd, "bwd": bwd}, **settings)
        table = COVARIANCE.backends | {name: backend}
        order = [other for other in (NEW, *BACKENDS) if other in table]
        monkeypatch.setattr(COVARIANCE, "backends", {other: table[other] for other in order})
        return passes

    return register


@pytest.fixture
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves covariance only its reference, so that "auto" is the same on every machine."""
    monkeypatch.setattr(COVARIANCE, "backends", {"reference": COVARIANCE.backends["reference"]})


def _forward_and_backward(x: Tensor, backend: str) -> list[Tensor]:
    x = x.detach().requires_grad_()
    mean, covariance = himo_kernels.covariance(x, backend=backend)
    return [mean, covariance, *torch.autograd.grad(covariance.sum() + mean.sum(), x)]


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_reference_that_takes_everything(name: str) -> None:
    operator = OPERATORS[name]
    assert operator.name == name
    assert operator.backends["reference"].auto
    for device in ("cpu", "meta", "cuda"):
        # Only resolved, not run: a fake tensor may have any device.
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(2, 3, device=device)
        assert operator.why_not("reference", x) is None


# Operators whose forward returns the gradients too.
PASSES = {"sigmoid_loss": {"fwd"}}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_backend_has_a_forward_and_a_backward(name: str) -> None:
    for backend in OPERATORS[name].backends.values():
        assert set(backend.kernels) == PASSES.get(name, {"fwd", "bwd"})
        assert all(callable(kernel) for kernel in backend.kernels.values())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_the_schema_ends_in_the_backend_and_changes_no_input(name: str, direction: str) -> None:
    if direction not in PASSES.get(name, {direction}):
        assert not hasattr(torch.ops.himo_kernels, f"{name}_{direction}")
        return
    schema = getattr(torch.ops.himo_kernels, f"{name}_{direction}").default._schema
    *positional, last = [argument for argument in schema.arguments if not argument.kwarg_only]
    assert last.name == "backend"
    assert str(last.type) == "str"
    assert not any(argument.alias_info for argument in positional)
    # Additional outputs of a forward, the cached logits and factors, are keyword arguments.
    written = [argument.name for argument in schema.arguments if argument.alias_info]
    assert written in ([], ["products"], ["products", "factors"])
    assert all(result.alias_info is None for result in schema.returns)


@pytest.mark.usefixtures("only_reference")
def test_auto_asks_the_backends_in_the_order_of_the_table(
    x: Tensor, register: Callable[..., list[str]]
) -> None:
    for name in (*reversed(OTHERS), NEW):
        register(name)
        assert COVARIANCE.preferred(x) == COVARIANCE.resolve("auto", x) == name
    assert backend_names() == [NEW, *BACKENDS]


@pytest.mark.usefixtures("only_reference")
def test_auto_passes_over_a_backend_that_cannot(
    x: Tensor, register: Callable[..., list[str]]
) -> None:
    asked = []

    def why_not(*tensors: Tensor) -> str | None:
        asked.append(tensors)
        return None if tensors[0].shape[-1] > 3 else "needs more than 3 columns"

    new, triton = (
        register(NEW, why_not=lambda *tensors: "none"),
        register("triton", why_not=why_not),
    )
    _forward_and_backward(x, "auto")
    assert (new, triton) == ([], [])
    _forward_and_backward(torch.cat([x, x], -1), "auto")
    assert (new, triton) == ([], ["fwd", "bwd"])
    assert all(isinstance(tensor, Tensor) for tensors in asked for tensor in tensors)


@pytest.mark.usefixtures("only_reference")
def test_auto_leaves_an_unproven_backend_that_runs_by_name(
    x: Tensor, register: Callable[..., list[str]]
) -> None:
    passes = register("triton", auto=False)
    expected = _forward_and_backward(x, "auto")
    assert passes == []
    actual = _forward_and_backward(x, "triton")
    assert passes == ["fwd", "bwd"]
    assert all(map(torch.equal, actual, expected))


@pytest.mark.usefixtures("only_reference")
def test_auto_takes_a_backend_for_the_shapes_that_suit_it(
    x: Tensor, register: Callable[..., list[str]]
) -> None:
    passes = register("cpu", auto=lambda x: x.shape[-1] > 3)
    _forward_and_backward(x, "auto")
    assert passes == []
    _forward_and_backward(torch.cat([x, x], -1), "auto")
    _forward_and_backward(x, "cpu")  # when named, it takes every shape
    assert passes == ["fwd", "bwd"] * 2


def test_auto_with_nothing_left_lists_the_reasons(
    x: Tensor, register: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(COVARIANCE, "backends", {})
    register("triton", auto=False)
    register("cpu", why_not=lambda *tensors: "left out of this build")
    with pytest.raises(NotImplementedError) as caught:
        himo_kernels.covariance(x)
    first, *states = str(caught.value).splitlines()
    assert first == "covariance: backend 'auto' cannot take [5, 3] torch.float32 on cpu"
    assert "  triton: can run by name" in states and "  cpu: left out of this build" in states
    assert "  reference: covariance has no reference kernel" in states


@pytest.mark.usefixtures("only_reference")
@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_backend_is_the_one_that_runs(
    x: Tensor, register: Callable[..., list[str]], name: str
) -> None:
    passes = {other: register(other) for other in BACKENDS}
    _forward_and_backward(x, name)
    assert passes == {other: ["fwd", "bwd"] if other == name else [] for other in BACKENDS}


@pytest.mark.usefixtures("only_reference")
def test_a_named_backend_never_falls_back(x: Tensor, register: Callable[..., list[str]]) -> None:
    others = [register(NEW), register("cpu")]
    refused = register("triton", why_not=lambda *tensors: f"needs {len(tensors)} CUDA tensors")
    with pytest.raises(NotImplementedError) as caught:
        himo_kernels.covariance(x, backend="triton")
    first, *states = str(caught.value).splitlines()
    assert first == "covariance: backend 'triton' cannot take [5, 3] torch.float32 on cpu"
    assert [state.split(":")[0].strip() for state in states] == [NEW, *BACKENDS]
    expected = {NEW: "can run", "triton": "needs 1 CUDA tensors", "cpu": "can run"}
    assert {f"  {name}: {state}" for name, state in expected.items()} <= set(states)
    assert [refused, *others] == [[], [], []]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_run_says_why_for_every_backend(name: str, backend: str, x: Tensor) -> None:
    operator = OPERATORS[name]
    reason = operator.why_not(backend, x)
    if reason is None:
        assert operator.resolve(backend, x) == backend
        return
    with pytest.raises(NotImplementedError) as caught:
        operator.resolve(backend, x)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{name}: backend {backend!r} cannot take [5, 3] torch.float32 on cpu"
    assert [line.split(":")[0] for line in lines] == [f"  {other}" for other in BACKENDS]
    assert f"  {backend}: {reason}" in lines


@pytest.mark.usefixtures("only_reference")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_an_error_inside_a_backend_reaches_the_caller(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    class LaunchError(Exception):
        pass

    def fails(*arguments: Any) -> Any:
        raise LaunchError("out of registers")

    def install(fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        monkeypatch.setattr(COVARIANCE, "backends", {"triton": Backend({"fwd": fwd, "bwd": bwd})})

    install(fails, fails)
    with pytest.raises(LaunchError, match=r"^out of registers$"):
        himo_kernels.covariance(x, backend=backend)
    install(reference.covariance_fwd, fails)
    with pytest.raises(LaunchError, match=r"^out of registers$"):
        _forward_and_backward(x, backend)


@pytest.mark.usefixtures("only_reference")
def test_a_backend_need_not_return_contiguous_outputs_nor_turn_autocast_off(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def transposed(tensor: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return tensor.mT.contiguous().mT

    def fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
        mean, covariance = reference.covariance_fwd(*arguments)
        return mean, transposed(covariance)

    def bwd(*arguments: Any) -> Tensor:
        return transposed(reference.covariance_bwd(*arguments))

    monkeypatch.setitem(COVARIANCE.backends, "cpu", Backend({"fwd": fwd, "bwd": bwd}))
    with torch.autocast("cpu", torch.bfloat16):
        actual = _forward_and_backward(x, "cpu")
    assert all(tensor.is_contiguous() for tensor in actual)
    assert all(map(torch.equal, actual, _forward_and_backward(x, "reference")))
    assert seen == [(False, False)] * 2


# Whatever backends are chosen above, this is what a user sees who has no extension.
USES = """
import sys, warnings
sys.modules["himo_kernels._C"] = None
import torch, himo_kernels
from himo_kernels import info
x = torch.eye(128, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {uses}
print(len(caught), *(f"{{w.category.__name__}}: {{w.message}}" for w in caught))
"""
USE = "himo_kernels.normalize(x).sum().backward()"


@pytest.mark.parametrize(
    ("uses", "count"),
    [
        (f"{USE}; {USE}; himo_kernels.info_nce(x, x, 1.0)", 1),
        (f"torch.compile(himo_kernels.normalize, backend='eager', fullgraph=True)(x); {USE}", 1),
        ("himo_kernels.normalize(x, backend='reference')", 0),
        (f"info.report(); {USE}", 0),  # it was told
    ],
    ids=["auto", "compiled", "named", "after-info"],
)
def test_auto_warns_once_that_the_extension_is_missing(uses: str, count: int) -> None:
    settings = {"HIMO_KERNELS_BACKEND": "auto", "HIMO_KERNELS_NO_EXTENSION": "0"}
    found, *warned = run_python("-c", USES.format(uses=uses), **settings).split(" ", 1)
    assert int(found) == count
    for message in warned:
        assert message.startswith("RuntimeWarning: himo_kernels: operators on a CPU run in plain ")
        assert "the extension is not built (" in message and "--force-reinstall SOURCES" in message


def test_auto_says_nothing_of_an_extension_that_was_switched_off() -> None:
    settings = {"HIMO_KERNELS_BACKEND": "auto", "HIMO_KERNELS_NO_EXTENSION": "1"}
    assert run_python("-c", USES.format(uses=USE), **settings) == "0"


def test_the_variable_is_read_once_at_import_and_is_auto_where_unset() -> None:
    script = (
        "import os; os.environ.pop('HIMO_KERNELS_BACKEND', None)\n"
        "import torch, himo_kernels; os.environ['HIMO_KERNELS_BACKEND'] = 'triton'\n"
        "print(himo_kernels.dispatch.default_backend(), himo_kernels.gram(torch.eye(3))[0].shape)"
    )
    assert run_python("-c", script) == "auto torch.Size([3])"


def test_the_variable_is_what_auto_stands_for() -> None:
    script = SMALL + (
        "from himo_kernels import dispatch, info\n"
        "chosen = {o.resolve('auto', x) for o in dispatch.OPERATORS.values()}\n"
        "print(dispatch.default_backend(), *chosen)\n"
        "himo_kernels.nn.HiMoLoss()(x, x, 10.0)\n"
        "print(info.report())"
    )
    chosen, report = run_python("-c", script, HIMO_KERNELS_BACKEND="reference").split("\n", 1)
    assert chosen == "reference reference"
    _assert_complete(report)
    assert set(re.findall(r"auto takes (.*)", report)) == {"reference"}


def test_a_backend_in_the_variable_that_an_operator_lacks_is_an_error() -> None:
    script = SMALL + (
        "from himo_kernels.dispatch import OPERATORS\n"
        "OPERATORS['gram'].backends['new'] = OPERATORS['gram'].backends['reference']\n"
        "print(himo_kernels.covariance(x, backend='reference')[0].shape)  # the argument wins\n"
        "try: himo_kernels.info_nce(x, x, 1.0)\n"
        "except NotImplementedError as error: print(error)"
    )
    shape, first, *reasons = run_python("-c", script, HIMO_KERNELS_BACKEND=NEW).splitlines()
    assert shape == "torch.Size([3])"
    assert first.startswith("info_nce: backend 'new' cannot take [3, 3] torch.float32 on cpu, ")
    assert len(reasons) == len(BACKENDS) + 1


def test_an_unknown_name_in_the_variable_is_an_error_at_the_first_call() -> None:
    script = SMALL + (
        "from himo_kernels import info\n"
        "try: himo_kernels.pca(x)\n"
        "except ValueError as error: print(error)\n"
        "print(info.report())"
    )
    text, report = run_python("-c", script, HIMO_KERNELS_BACKEND="tritn").split("\n", 1)
    expected = f"to be one of {['auto', *BACKENDS]}, got 'tritn'"
    assert text == f"pca: expected HIMO_KERNELS_BACKEND {expected}"
    _assert_complete(report)
    assert f"  pca: auto takes nothing: {text}\n" in report


def test_info_lists_versions_and_every_operator_with_every_backend() -> None:
    report = run_python("-m", "himo_kernels.info", HIMO_KERNELS_BACKEND="auto")
    _assert_complete(report)
    x = torch.empty(512, 512)
    for name, operator in OPERATORS.items():
        assert f"  {name}: auto takes {operator.preferred(x)}\n" in report


def test_info_says_of_a_gated_backend_what_it_waits_for(
    register: Callable[..., list[str]],
) -> None:
    register(NEW, auto=False)
    section = info.report().split("\n  covariance: ")[1]
    assert re.search(rf"(?m)^    {NEW} +by name only$", section)
    if OPERATORS["covariance"].why_not("triton", torch.empty(512, 512)) is None:
        assert re.search(r"(?m)^    triton +by name only: not yet run on hardware$", section)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_backend_without_a_source_is_an_unknown_name(name: str, x: Tensor) -> None:
    with pytest.raises(ValueError) as caught:
        OPERATORS[name].resolve("cuda", x)
    expected = f"to be one of {['auto', *BACKENDS]}, got 'cuda'"
    assert str(caught.value) == f"{name}: expected backend {expected}"


def _assert_complete(report: str) -> None:
    for line in (
        f"himo_kernels {himo_kernels.__version__}",
        r"python +\d+\.\d+",
        f"torch +{re.escape(torch.__version__)}",
        r"triton +\S+",
        r"extension +\S+",
        r"cpu +\S+, \d+ threads",
        r"HIMO_KERNELS_BACKEND = \S+",
        r"operators on cpu \(float32, 512 x 512\)",
    ):
        assert re.search(f"(?m)^{line}", report), f"{line} is not in\n{report}"
    on_cpu = report.split("operators on cpu")[1].split("\n\n")[0]
    _, *sections = re.split(r"\n  (?=\w+: auto takes)", on_cpu)
    assert [section.split(":")[0] for section in sections] == list(OPERATORS)
    pattern = r"\w+ +(yes|no: \S+|by name only(: \S+)?)"
    for section in sections:
        _, *rows = section.split("\n    ")
        assert [row.split()[0] for row in rows] == list(BACKENDS)
        assert all(re.match(pattern, row) for row in rows), section


def test_eigensolvers_stay_out_of_cuda_graphs():
    # Only triton's eigensolver, for sides up to 128, does not wait for the host.
    ops = torch.ops.himo_kernels
    kernels = [f"{name}_fwd" for name in OPERATORS]
    unsafe = torch.Tag.cudagraph_unsafe
    tagged = {name for name in kernels if unsafe in getattr(ops, name).default.tags}
    assert tagged == {"pca_fwd", "pca_reconstruct_fwd", "himo_loss_fwd"}
