"""Logits that the forms of info_nce keep for the backward, against recomputed ones."""

import pytest
import torch
from pairs_cases import dense, features, loss_and_gradients
from test_info_nce_pairs import BACKENDS, FORMS, drawn, each_backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import himo_kernels
from himo_kernels import extension
from himo_kernels.info_nce.op import CACHING_BACKENDS
from himo_kernels.info_nce.pairs import op
from himo_kernels.memory import cache_for

KEPT, RECOMPUTED = 64.0, 0.0  # MiB
each_caching_backend = pytest.mark.parametrize(
    "backend", [backend for backend in BACKENDS if backend in CACHING_BACKENDS]
)
needs_extension = pytest.mark.skipif(
    extension.why_not() is not None, reason=extension.why_not() or ""
)


class Calls(TorchDispatchMode):
    """Records the calls of the operator: its arguments, and the logits that a call was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, tuple[object, ...], dict[str, object]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "info_nce_pairs" in function.name():
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def products(self) -> list[Tensor | None]:
        return [kwargs.get("products") for _, _, kwargs in self.calls]


def saved_by(inputs: dict[str, Tensor], **options: object) -> list[torch.Size]:
    """Returns the shapes that a call saves for its backward, of tables only."""
    shapes: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        himo_kernels.info_nce(**leaves, **options)
    given = [value.shape for value in inputs.values()]
    dimensions = inputs["image_features"].dim()
    return [shape for shape in shapes if len(shape) == dimensions and shape not in given]


def assert_equal_to_dense(
    backend: str, inputs: dict[str, Tensor], budget: float, **options: object
) -> None:
    """Asserts float64 loss and gradients equal to those of the dense formula."""
    loss, gradients = loss_and_gradients(
        himo_kernels.info_nce, inputs, backend=backend, keep_logits_mib=budget, **options
    )
    expected, exact = loss_and_gradients(dense, inputs, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for name, gradient in exact.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-12, atol=1e-12)


class TestWhatIsKept:
    # 32 rows and 64 columns of float32 take 8 KiB.
    ONE = 32 * 64 * 4 / 2**20

    @each_backend
    @pytest.mark.parametrize("directions", ["rows", "columns", "both"])
    @pytest.mark.parametrize("fits", [True, False])
    def test_logits_are_saved_only_within_their_budget(
        self, backend: str, directions: str, fits: bool, generator: torch.Generator
    ) -> None:
        inputs = features(32, 64, 5, dtype=torch.float32, generator=generator)
        options = drawn(32, 64, generator)["exclusions"]
        budget = self.ONE if fits else self.ONE * 0.999
        shapes = saved_by(
            inputs, backend=backend, directions=directions, keep_logits_mib=budget, **options
        )
        # Columns alone are the rows of their problem.
        expected = [(64, 32) if directions == "columns" else (32, 64)]
        assert shapes == (expected if fits and backend in CACHING_BACKENDS else [])

    @each_backend
    @pytest.mark.parametrize("fits", [True, False])
    def test_two_calls_share_a_budget(
        self, backend: str, fits: bool, generator: torch.Generator
    ) -> None:
        # Constant keys in both directions: a call of the rows and one of the columns.
        inputs = features(32, 64, 5, dtype=torch.float32, generator=generator)
        shapes = saved_by(
            inputs,
            backend=backend,
            positives=torch.arange(32),
            differentiate_keys=False,
            keep_logits_mib=self.ONE * (2 if fits else 1.999),
        )
        assert shapes == ([(32, 64), (64, 32)] if fits and backend in CACHING_BACKENDS else [])

    @each_backend
    def test_views_keep_theirs_within_the_same_budget(
        self, backend: str, generator: torch.Generator
    ) -> None:
        x, y, scale = features(8, 8, dtype=torch.float32, generator=generator).values()
        x.requires_grad_()
        for budget, kept in ((16 * 16 * 4 / 2**20, True), (0, False)):
            with Calls() as mode:
                himo_kernels.nt_xent(x, y, scale, keep_logits_mib=budget, backend=backend)
            (products,) = mode.products()
            assert (products is not None) == (kept and backend in CACHING_BACKENDS)

    @each_backend
    def test_without_a_gradient_nothing_is_kept(
        self, backend: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Tensor | None] = []

        def noted(*arguments: object, **options: object) -> Tensor | None:
            made.append(cache_for(*arguments, **options))
            return made[-1]

        monkeypatch.setattr(op, "cache_for", noted)
        inputs = features(6, 9, generator=generator)
        options = {"directions": "rows", "keep_logits_mib": KEPT, "backend": backend}
        himo_kernels.info_nce(**inputs, **options)
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        with torch.no_grad():
            himo_kernels.info_nce(**leaves, **options)
        assert made == []
        himo_kernels.info_nce(**leaves, **options)
        assert len(made) == (backend in CACHING_BACKENDS)

    @each_caching_backend
    def test_a_batch_of_problems(self, backend: str, generator: torch.Generator) -> None:
        inputs = features(6, 9, batch=(2, 3), generator=generator)
        options = {"directions": "rows", "keep_logits_mib": KEPT, "backend": backend}
        assert saved_by(inputs, **options) == [(2, 3, 6, 9)]


class TestKeptAgainstRecomputed:
    @each_caching_backend
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("directions", ["both", "rows", "columns"])
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
    )
    @pytest.mark.parametrize("shape", [(1, 1), (70, 300), (300, 70)], ids="{0[0]}x{0[1]}".format)
    @pytest.mark.sample
    def test_the_same_bits(
        self,
        backend: str,
        form: str,
        directions: str,
        dtype: torch.dtype,
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        inputs = features(*shape, 24, batch=(2,), dtype=dtype, generator=generator)
        options = drawn(*shape, generator)[form]
        for name in ("positives", "labels", "weights"):  # the same of both problems
            if name in options:
                pair = options[name] if isinstance(options[name], tuple) else (options[name],)
                expanded = tuple(value.expand(2, *value.shape) for value in pair)
                options[name] = expanded if len(expanded) > 1 else expanded[0]
        results = []
        for budget in (KEPT, RECOMPUTED):
            loss, gradients = loss_and_gradients(
                himo_kernels.info_nce,
                inputs,
                backend=backend,
                directions=directions,
                label_smoothing=0.1,
                keep_logits_mib=budget,
                **options,
            )
            results.append([loss, *gradients.values()])
        assert all(map(torch.equal, *results))

    @each_caching_backend
    def test_constant_keys(self, backend: str, generator: torch.Generator) -> None:
        inputs = features(70, 90, generator=generator)
        options = {"positives": torch.arange(70), "differentiate_keys": False}
        for budget in (KEPT, RECOMPUTED):
            assert_equal_to_dense(backend, inputs, budget, **options)


@each_caching_backend
@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED], ids=["kept", "recomputed"])
@pytest.mark.parametrize("form", ["labels", "exclusions"])
def test_more_rows_than_a_chunk_of_the_backward(
    backend: str, budget: float, form: str, generator: torch.Generator
) -> None:
    # The cpu backend multiplies 512 rows at a time, or two blocks of 64 for each thread.
    rows = max(512, 2 * 64 * torch.get_num_threads()) + 77
    options = drawn(rows, 40, generator)[form]
    inputs = features(rows, 40, generator=generator)
    assert_equal_to_dense(backend, inputs, budget, **options)


class TestGraph:
    @each_backend
    @pytest.mark.parametrize("budget", [KEPT, RECOMPUTED], ids=["kept", "recomputed"])
    @pytest.mark.parametrize("directions", ["both", "rows", "columns"])
    def test_gradcheck(
        self, backend: str, budget: float, directions: str, generator: torch.Generator
    ) -> None:
        inputs = features(3, 5, 4, generator=generator)
        options = drawn(3, 5, generator)["labels, weights"]

        def function(*values: Tensor) -> Tensor:
            return himo_kernels.info_nce(
                *values,
                directions=directions,
                keep_logits_mib=budget,
                label_smoothing=0.1,
                backend=backend,
                **options,
            )

        leaves = tuple(value.clone().requires_grad_() for value in inputs.values())
        assert torch.autograd.gradcheck(function, leaves, atol=1e-6, rtol=1e-5)

    @each_backend
    @pytest.mark.parametrize("budget", [KEPT, RECOMPUTED], ids=["kept", "recomputed"])
    def test_a_retained_graph_gives_the_same_gradient_again(
        self, backend: str, budget: float, generator: torch.Generator
    ) -> None:
        inputs = features(70, 300, dtype=torch.float32, generator=generator)
        leaves = [value.requires_grad_() for value in inputs.values()]
        loss = himo_kernels.info_nce(
            *leaves, directions="rows", keep_logits_mib=budget, backend=backend
        )
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(map(torch.equal, first, second))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, leaves)

    @each_caching_backend
    @pytest.mark.parametrize("directions", ["both", "columns"])
    def test_opcheck(self, backend: str, directions: str, generator: torch.Generator) -> None:
        inputs = features(6, 9, generator=generator)
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        with Calls() as mode:
            himo_kernels.info_nce(
                **leaves,
                directions=directions,
                positives=torch.arange(6),
                keep_logits_mib=KEPT,
                backend=backend,
            ).backward()
        assert [products is not None for products in mode.products()] == [True, True]
        for function, args, kwargs in mode.calls:
            detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
            torch.library.opcheck(function, detached, kwargs)

    @each_caching_backend
    def test_compiled(self, backend: str, generator: torch.Generator) -> None:
        inputs = features(20, 30, dtype=torch.float32, generator=generator)

        def kept(*values: Tensor) -> Tensor:
            return himo_kernels.info_nce(
                *values, directions="rows", keep_logits_mib=KEPT, backend=backend
            )

        results = []
        for function in (kept, torch.compile(kept, fullgraph=True, backend="aot_eager")):
            leaves = [value.clone().requires_grad_() for value in inputs.values()]
            loss = function(*leaves)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        assert all(map(torch.equal, *results))


def bad_products() -> dict[str, Tensor]:
    good = torch.empty(6, 9)
    return {
        "one row more": torch.empty(7, 9),
        "transposed": torch.empty(9, 6).T,
        "float64": good.double(),
    }


@needs_extension
@pytest.mark.parametrize("name", bad_products())
def test_logits_of_another_shape_or_dtype_are_refused(
    name: str, generator: torch.Generator
) -> None:
    # A direct call of the operator: the kernel must not write out of bounds.
    image, text, scale = features(6, 9, dtype=torch.float32, generator=generator).values()
    arguments = (image, text, scale, torch.arange(6), None, None, False, True, False, 0.0, "cpu")
    with pytest.raises((ValueError, TypeError), match="info_nce_pairs: expected products"):
        torch.ops.himo_kernels.info_nce_pairs_fwd.default(*arguments, products=bad_products()[name])
