"""What PyTorch requires of every operator and backend: schema, compile, autocast, autograd's modes.

The folders of the operators test their values. Equal means bitwise equal, unless stated.
"""

import copy
import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_devices import devices_of
from fresh_process import run_python
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import himo_kernels
from himo_kernels import nn
from himo_kernels.dispatch import OPERATORS
from himo_kernels.testing import power_law

SIZES = {"6x4": (6, 4), "2x4x6": (2, 4, 6)}  # D < N; N < D with a batch dimension
FACTORS = 3  # inner dimension of the low-rank components


def _project_reconstruct(
    x: Tensor, mean: Tensor, components: Tensor, rank: Tensor, backend: str
) -> Any:
    pca = himo_kernels.PCA(mean, mean, components, rank, mean)  # only these are read
    return himo_kernels.project_reconstruct(x, pca, backend=backend)


def _low_rank(*tensors: Tensor, backend: str) -> Any:
    *tensors, rank = tensors
    return himo_kernels.dual_info_nce_low_rank(*tensors, rank=rank, backend=backend)


def _pairs(*tensors: Tensor, backend: str) -> Any:
    *tensors, positives, row_labels, column_labels = tensors
    return himo_kernels.info_nce(
        *tensors,
        positives=positives,
        labels=(row_labels, column_labels),
        same_label="exclude",
        label_smoothing=0.1,
        backend=backend,
    )


def _loss(preset: str) -> Callable[..., Any]:
    def call(*tensors: Tensor, backend: str) -> Any:
        return tuple(nn.HiMoLoss(preset, backend=backend)(*tensors, output_dict=True).values())

    return call


CALLS: dict[str, Callable[..., Any]] = {
    "covariance": himo_kernels.covariance,
    "gram": himo_kernels.gram,
    "pca": himo_kernels.pca,
    "project_reconstruct": _project_reconstruct,
    "pca_reconstruct": himo_kernels.pca_reconstruct,
    "normalize": himo_kernels.normalize,
    "info_nce": himo_kernels.info_nce,
    "info_nce_pairs": _pairs,
    "dual_info_nce": himo_kernels.dual_info_nce,
    "dual_info_nce_low_rank": _low_rank,
    "sigmoid_loss": himo_kernels.sigmoid_loss,
    "himo_loss": himo_kernels.himo_loss,
    "HiMoLoss paper": _loss("paper"),
    "HiMoLoss official": _loss("official"),
}


class Run:
    """One operator or module on one backend: its inputs, and a call that returns flat outputs."""

    def __init__(self, name: str, backend: str, device: str, seed: int) -> None:
        self.name, self.backend, self.device, self.seed = name, backend, device, seed

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = CALLS[self.name](*inputs, backend=self.backend)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def inputs(
        self, *size: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
    ) -> list[Tensor]:
        """Tensors of the call for features [*batch, N, D]; all but rank require a gradient."""
        *batch, samples, features = size
        generator = torch.Generator().manual_seed(self.seed)

        def rows(count: int = samples, width: int = features) -> Tensor:
            settings = {"dtype": dtype, "device": self.device, "generator": generator}
            return power_law(count, width, batch=tuple(batch), **settings)

        pca = himo_kernels.pca(rows(), backend="reference")
        scale = torch.tensor(5.0, dtype=pca.mean.dtype, device=self.device)
        tensors = {
            "project_reconstruct": lambda: [rows(), pca.mean, pca.components, pca.rank],
            "info_nce": lambda: [rows(), rows(), scale],
            "info_nce_pairs": lambda: [
                rows(),
                rows(2 * samples),
                scale,
                torch.arange(samples, device=self.device).expand(*batch, samples).clone(),
                torch.arange(samples, device=self.device) // 2,
                torch.arange(2 * samples, device=self.device) // 3,
            ],
            "dual_info_nce": lambda: [rows(), rows(), rows(), scale],
            "dual_info_nce_low_rank": lambda: [
                rows(),
                rows(),
                rows(samples, FACTORS),
                rows(FACTORS, features),
                scale,
                torch.full(batch, FACTORS - 1, device=self.device),
            ],
            "sigmoid_loss": lambda: [rows(), rows(), scale, -scale],
            "himo_loss": lambda: [rows(), rows(), scale],
            "HiMoLoss paper": lambda: [rows(), rows(), scale],
            "HiMoLoss official": lambda: [rows(), rows(), scale],
        }.get(self.name, lambda: [rows()])()
        return [_laid_out(tensor, layout) for tensor in tensors]


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    # The same values as a leaf with this layout, which requires a gradient if possible.
    tensor = tensor.detach()
    if tensor.dim() >= 2 and layout == "transposed":
        tensor = tensor.mT.contiguous().mT
    elif tensor.dim() >= 2 and layout == "sliced":
        tensor = torch.stack([tensor, -tensor], -1).flatten(-2)[..., ::2]
    else:
        tensor = tensor.clone()
    return tensor.requires_grad_(tensor.is_floating_point())


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # With incoming gradients that differ between entries and are not ones.
    outputs = [output for output in outputs if output.requires_grad]
    weights = [
        torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device)
        for output in outputs
    ]
    weights = [w.view_as(output) for w, output in zip(weights, outputs, strict=True)]
    return torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], weights)


def _forward_and_backward(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> list[Tensor]:
    outputs = function(*inputs)
    return [*outputs, *_gradients(outputs, inputs)]


def _assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=0, equal_nan=True)


def _detached(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in inputs]


_no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = {"cpu": (), "cuda": (_no_cuda, pytest.mark.gpu)}
_OPERATORS = [
    pytest.param((name, backend, device), id=f"{name}-{backend}-{device}", marks=marks)
    for name, operator in OPERATORS.items()
    for backend in operator.backends
    for device in devices_of(backend)
    for marks in [DEVICES[device]]
]
_MODULES = [
    pytest.param((name, "auto", device), id=f"{name}-{device}".replace(" ", "-"), marks=marks)
    for name in CALLS
    if name not in OPERATORS
    for device, marks in DEVICES.items()
]
each_operator = pytest.mark.parametrize("run", _OPERATORS, indirect=True)
each_operator_and_module = pytest.mark.parametrize("run", _OPERATORS + _MODULES, indirect=True)
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


@pytest.fixture
def run(request: pytest.FixtureRequest, generator: torch.Generator) -> Run:
    """The operator or module, backend and device of this test."""
    run = Run(*request.param, seed=generator.initial_seed())
    if run.name in OPERATORS:
        reason = OPERATORS[run.name].why_not(run.backend, *run.inputs(2, 2))
        if reason is not None:
            pytest.skip(f"{run.backend}: {reason}")
    return run


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forgets compiled graphs, so that each test compiles its own."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_operator_is_tested_here() -> None:
    assert set(OPERATORS) <= set(CALLS)


class _Recorder(TorchDispatchMode):
    # Records calls of this library's torch.ops with their arguments.
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "himo_kernels":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


@each_operator
@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.sample
def test_opcheck(run: Run, size: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = run.inputs(*size, dtype=dtype)
    if len(size) > 2:  # here only one input needs a gradient
        inputs = [inputs[0], *_detached(inputs[1:])]
    with _Recorder() as recorder:
        _forward_and_backward(run, inputs)
    names = [op.name() for op, _ in recorder.calls]
    # All have a forward and a backward, but the sigmoid loss, whose forward gives the gradients.
    directions = ("fwd",) if run.name == "sigmoid_loss" else ("fwd", "bwd")
    assert names == [f"himo_kernels::{run.name}_{direction}" for direction in directions]
    for op, arguments in recorder.calls:
        detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        torch.library.opcheck(op, detached)


@each_operator
@each_size
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.sample
def test_fake_outputs_have_the_strides_of_real_ones(
    run: Run, size: tuple[int, ...], layout: str
) -> None:
    inputs = run.inputs(*size, layout=layout)
    real = _forward_and_backward(run, inputs)
    with FakeTensorMode() as mode:
        fake = _forward_and_backward(run, [mode.from_tensor(tensor) for tensor in inputs])
    for actual, expected in zip(fake, real, strict=True):
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride()
        assert (actual.dtype, actual.device) == (expected.dtype, expected.device)
        assert actual.requires_grad == expected.requires_grad


@each_operator
@each_size
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.sample
def test_inputs_are_unchanged_and_outputs_contiguous(
    run: Run, size: tuple[int, ...], layout: str
) -> None:
    inputs = run.inputs(*size, layout=layout)
    before = [tensor.detach().clone() for tensor in inputs]
    results = _forward_and_backward(run, inputs)
    _assert_equal(_detached(inputs), before)
    assert all(tensor._version == 0 for tensor in inputs)
    assert all(result.is_contiguous() for result in results)
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert all(result.untyped_storage().data_ptr() not in storages for result in results)


def test_the_loss_hands_its_backend_to_every_operator(generator: torch.Generator) -> None:
    run = Run("HiMoLoss paper", "reference", "cpu", generator.initial_seed())
    inputs = run.inputs(6, 4)
    with _Recorder() as recorder:
        _forward_and_backward(run, inputs)
    names = [op.name().removeprefix("himo_kernels::") for op, _ in recorder.calls]
    forward = [*["normalize_fwd"] * 2, "himo_loss_fwd"]
    assert names[:3] == forward
    assert sorted(names[3:]) == sorted(name.replace("fwd", "bwd") for name in forward)
    assert {arguments[-1] for _, arguments in recorder.calls} == {"reference"}


@each_operator_and_module
@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_profiler_lists_the_passes(run: Run, needs_grad: bool) -> None:
    # A call that nothing observes skips torch's dispatcher, where the profiler gets its names.
    inputs = run.inputs(6, 4)
    with torch.profiler.profile() as profile:
        if needs_grad:
            _forward_and_backward(run, inputs)
        else:
            run(*_detached(inputs))
    names = {event.key for event in profile.key_averages()}
    ours = {name.removeprefix("himo_kernels::") for name in names if "himo_kernels::" in name}
    passes = {name.rpartition("_")[2] for name in ours}
    own = OPERATORS.get(run.name)  # None: a module
    with_backward = needs_grad and (own is None or "bwd" in own.backends["reference"].kernels)
    assert passes == ({"fwd", "bwd"} if with_backward else {"fwd"})


def test_tensors_of_a_subclass_reach_the_dispatcher(generator: torch.Generator) -> None:
    real = power_law(6, 4, generator=generator)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(real)
    loss = himo_kernels.info_nce(fake, fake, fake[0, 0])  # outside of the mode
    assert type(loss) is type(fake)
    assert (loss.shape, loss.dtype) == ((), torch.float32)


@each_operator
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True], ids=["dynamic=None", "dynamic=True"])
@pytest.mark.sample(9)
def test_a_full_graph_equals_eager(run: Run, dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    graphs = set()
    for size in ((6, 4), (9, 5)):
        inputs = run.inputs(*size)
        _assert_equal(_forward_and_backward(compiled, inputs), _forward_and_backward(run, inputs))
        graphs.add(counter.frame_count)
    if dynamic:
        assert len(graphs) == 1  # the first size's graph serves the second


_LABELS = torch.tensor([0, 1, 1, 2, 2, 0])
SAME_TENSOR_TWICE = {
    "info_nce": lambda x, s: himo_kernels.info_nce(x, x, s),
    "SupCon": lambda x, s: himo_kernels.info_nce(
        x, x, s, labels=_LABELS, exclude_self=True, directions="rows"
    ),
    "nt_xent": lambda x, s: himo_kernels.nt_xent(x, x, s),
    "dual_info_nce": lambda x, s: torch.stack(himo_kernels.dual_info_nce(x, x, x, s)),
    "sigmoid_loss": lambda x, s: himo_kernels.sigmoid_loss(x, x, s, -s),
    "himo_loss": lambda x, s: torch.stack([*himo_kernels.himo_loss(x, x, s)][:2]),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("call", SAME_TENSOR_TWICE.values(), ids=list(SAME_TENSOR_TWICE))
def test_a_full_graph_takes_the_same_tensor_twice(
    call: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator
) -> None:
    x = power_law(6, 4, generator=generator).requires_grad_()
    scale = torch.tensor(3.0, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, call):
        value = function(x, scale)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), (x, scale))])
    _assert_equal(*results)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "device", [pytest.param(device, marks=marks) for device, marks in DEVICES.items()]
)
def test_the_loss_compiled_by_inductor_equals_eager(
    device: str, generator: torch.Generator
) -> None:
    run = Run("HiMoLoss paper", "auto", device, generator.initial_seed())
    compiled = torch.compile(run, fullgraph=True)
    for size in ((16, 8), (12, 20)):
        inputs = run.inputs(*size)
        expected = _forward_and_backward(run, inputs)
        _assert_equal(_forward_and_backward(compiled, inputs), expected)


@each_operator_and_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.sample
def test_autocast_changes_nothing(run: Run, dtype: torch.dtype) -> None:
    inputs = run.inputs(16, 8, dtype=dtype)
    expected = _forward_and_backward(run, inputs)
    with torch.autocast(run.device, torch.bfloat16):
        outputs = run(*inputs)
        inside = [*outputs, *_gradients(outputs, inputs)]
        outputs = run(*inputs)
    outside = [*outputs, *_gradients(outputs, inputs)]
    _assert_equal(inside, expected)
    _assert_equal(outside, expected)


REFUSAL = (
    "expected a first-order gradient, got create_graph=True (double backward is not supported)"
)


def _refuser(run: Run) -> str:
    return run.name if run.name in OPERATORS else "himo_loss"  # the module's last operator


@each_operator_and_module
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_double_backward_is_refused(run: Run) -> None:
    inputs = run.inputs(6, 4)
    total = sum(output.sum() for output in run(*inputs) if output.requires_grad)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(total, wanted, create_graph=True)
    assert str(caught.value) == f"{_refuser(run)}: {REFUSAL}"
    with pytest.raises(RuntimeError) as caught:
        total.backward(create_graph=True)
    assert str(caught.value) == f"{_refuser(run)}: {REFUSAL}"
    assert all(tensor.grad is None for tensor in inputs)


@each_operator
@pytest.mark.usefixtures("fresh_compiler")
def test_double_backward_of_a_compiled_graph_raises(run: Run) -> None:
    inputs = run.inputs(6, 4)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    total = sum(output.sum() for output in outputs if output.requires_grad)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(total, inputs[0], create_graph=True)
        torch.autograd.grad(grad.sum(), inputs[0])


def _total_of_first(run: Run, rest: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda first: sum(o.sum() for o in run(first, *rest) if o.is_floating_point())


def _forward_mode(run: Run, first: Tensor, rest: Sequence[Tensor]) -> Any:
    with forward_ad.dual_level():
        return run(forward_ad.make_dual(first, torch.ones_like(first)), *rest)


TRANSFORMS: dict[str, Callable[[Run, Tensor, Sequence[Tensor]], Any]] = {
    "forward mode": _forward_mode,
    "func.jvp": lambda run, first, rest: torch.func.jvp(
        _total_of_first(run, rest), (first,), (first,)
    ),
    "func.grad": lambda run, first, rest: torch.func.grad(_total_of_first(run, rest))(first),
    "func.vjp": lambda run, first, rest: torch.func.vjp(_total_of_first(run, rest), first),
    "func.jacrev": lambda run, first, rest: torch.func.jacrev(_total_of_first(run, rest))(first),
    "func.hessian": lambda run, first, rest: torch.func.hessian(_total_of_first(run, rest))(first),
    "vmap": lambda run, first, rest: torch.vmap(run)(
        *(tensor.expand(2, *tensor.shape) for tensor in (first, *rest))
    ),
    "vmap of a gradient": lambda run, first, rest: torch.vmap(
        torch.func.grad(_total_of_first(run, rest))
    )(first.expand(2, *first.shape)),
}


@each_operator_and_module
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.sample
def test_function_transforms_raise(run: Run, transform: str) -> None:
    first, *rest = _detached(run.inputs(6, 4))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"autograd\.Function"):
        TRANSFORMS[transform](run, first, rest)


@each_operator
def test_batched_incoming_gradients_are_taken_one_by_one(run: Run) -> None:
    # The only transform that reaches a backward without the forward.
    inputs = run.inputs(6, 4)
    output = next(output for output in run(*inputs)[::-1] if output.requires_grad)
    weights = torch.stack([torch.ones_like(output), torch.full_like(output, -2)])
    (batched,) = torch.autograd.grad(
        output, inputs[0], weights, is_grads_batched=True, retain_graph=True
    )
    single = [torch.autograd.grad(output, inputs[0], w, retain_graph=True)[0] for w in weights]
    torch.testing.assert_close(batched, torch.stack(single))


@each_operator_and_module
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_outputs_are_the_same(run: Run, mode: Any) -> None:
    inputs = run.inputs(6, 4)
    expected = run(*inputs)
    with mode():
        outputs = run(*inputs)
    assert not any(output.requires_grad for output in outputs)
    _assert_equal(outputs, _detached(expected))
    assert not any(output.requires_grad for output in run(*_detached(inputs)))


@each_operator_and_module
def test_a_gradient_flows_only_where_it_is_asked_for(run: Run) -> None:
    inputs = run.inputs(6, 4)
    wanted = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
    expected = dict(zip(wanted, _gradients(run(*inputs), inputs), strict=True))
    for index in wanted:
        alone = _detached(inputs)
        alone[index].requires_grad_()
        outputs = run(*alone)
        sum(output.sum() for output in outputs if output.requires_grad).backward()
        assert [i for i, tensor in enumerate(alone) if tensor.grad is not None] == [index]
        assert all(o.requires_grad == o.is_floating_point() for o in run(*inputs))
        _assert_equal(_gradients(run(*alone), alone), [expected[index]])


@each_operator_and_module
def test_a_retained_graph_gives_the_same_gradient_again(run: Run) -> None:
    inputs = run.inputs(6, 4)
    outputs = run(*inputs)
    total = sum(output.sum() for output in outputs if output.requires_grad)
    total.backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in inputs if tensor.requires_grad]
    total.backward()
    _assert_equal(
        [tensor.grad for tensor in inputs if tensor.requires_grad], [2 * g for g in first]
    )


@each_operator_and_module
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-hooks", "reentrant"])
@pytest.mark.sample
def test_checkpointing_changes_nothing(run: Run, use_reentrant: bool) -> None:
    inputs = run.inputs(6, 4)

    def checkpointed(*tensors: Tensor) -> tuple[Tensor, ...]:
        return checkpoint(run, *tensors, use_reentrant=use_reentrant)

    if not use_reentrant:
        expected = _forward_and_backward(run, inputs)
        _assert_equal(_forward_and_backward(checkpointed, inputs), expected)
        return
    results = []  # reentrant checkpointing works with backward() alone
    for function in (run, checkpointed):
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        outputs = function(*leaves)
        sum(output.sum() for output in outputs if output.requires_grad).backward()
        results.append([*_detached(outputs), *(t.grad for t in leaves if t.requires_grad)])
    _assert_equal(*results)


@each_operator
def test_no_problem_at_all_is_not_an_error(run: Run) -> None:
    for result in _forward_and_backward(run, run.inputs(0, 6, 4)):
        assert (
            result.numel() == 0 or not result.any()
        )  # logit_scale is not batched: its gradient is 0


def digest(seed: int) -> str:
    """Returns a hash of every output and gradient on the CPU, for inputs of this seed."""
    state = hashlib.sha256()
    for name in CALLS:
        run = Run(name, "auto", "cpu", seed)
        for result in _forward_and_backward(run, run.inputs(64, 48)):
            state.update(result.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@each_operator_and_module
def test_a_hundred_runs_give_the_same_bits(run: Run) -> None:
    inputs = run.inputs(32, 24)
    expected = _forward_and_backward(run, inputs)
    for _ in range(99):
        assert all(map(torch.equal, _forward_and_backward(run, inputs), expected))


def test_another_process_gives_the_same_bits(generator: torch.Generator) -> None:
    folder, seed = str(Path(__file__).parent), generator.initial_seed()
    script = (
        f"import sys; sys.path.insert(0, {folder!r})\n"
        f"import test_operators; print(test_operators.digest({seed}))"
    )
    assert run_python("-c", script) == digest(seed)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("name", ["HiDe", "HiMoLoss"])
def test_a_copied_module_computes_the_same(
    name: str, copied: Callable[..., Any], used: bool, generator: torch.Generator
) -> None:
    image, text = power_law(2, 6, batch=(4,), generator=generator).unbind(-2)
    if name == "HiDe":
        module, inputs = nn.HiDe(0.8, gap_eps=1e-3, differentiate_basis=False), (text,)
    else:
        module, inputs = nn.HiMoLoss("official", backend="reference"), (image, text, 10.0)
    if used:
        module(*inputs)  # the loss keeps the rank of its last batch
    again = copied(module)
    assert repr(again) == repr(module) and again.state_dict() == {}
    assert vars(again).keys() == vars(module).keys()
    torch.testing.assert_close(again(*inputs), module(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("flag", ["high", "medium"])
def test_the_precision_flag_of_matrix_products_changes_no_bit(flag, generator):
    # "medium" allows bfloat16 in float32 matmuls, also on CPUs that support it.
    image, text = (torch.randn(64, 96, generator=generator) for _ in range(2))
    calls = {
        "info_nce": lambda: himo_kernels.info_nce(image, text, 50.0),
        "sigmoid_loss": lambda: himo_kernels.sigmoid_loss(image, text, 50.0, -10.0),
        "covariance": lambda: himo_kernels.covariance(image)[1],
        "pca_reconstruct": lambda: himo_kernels.pca_reconstruct(text)[0],
    }
    expected = {name: call() for name, call in calls.items()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(flag)
    try:
        actual = {name: call() for name, call in calls.items()}
        assert torch.get_float32_matmul_precision() == flag  # the caller's setting is restored
    finally:
        torch.set_float32_matmul_precision(before)
        for library in ("cuda", "mkldnn"):  # the older setting is one of matmul itself
            torch._C._set_fp32_precision_setter(library, "matmul", "none")
    for name in calls:
        assert torch.equal(actual[name], expected[name]), name
