"""The Triton kernels of InfoNCE on small shapes, in Triton's interpreter if there is no GPU.

The interpreter's tile is 16 x 32, so 40 rows are ragged and take several blocks of rows, several
tiles of columns and, in steps of 32, several steps of the inner dimension.
"""

import itertools
import math
import sys
from collections.abc import Callable

import pytest
import torch
from fresh_process import run_python
from guarded_memory import between_nan, guarded_allocations
from info_nce_cases import (
    NAMES,
    Inputs,
    Target,
    assert_result_within_budget,
    eager_losses,
    in_float64,
    losses_and_gradients,
    make_inputs,
)
from torch import Tensor

from himo_kernels import _triton, dual_info_nce_low_rank, info_nce
from himo_kernels.testing import confident_positives, equal_rows, power_law, relative_error

if _triton.MISSING:
    pytest.skip(_triton.MISSING, allow_module_level=True)

from himo_kernels.info_nce.compose import Settings, Statistics
from himo_kernels.info_nce.triton import grad_logits, tiles, tune
from himo_kernels.info_nce.triton import gradients as pass_2
from himo_kernels.info_nce.triton import losses as pass_1
from himo_kernels.info_nce.triton.logits import features_branch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)

pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    # Masked lanes hold arbitrary values, about which NumPy warns and a GPU does not.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.skipif(
        DEVICE == "cpu" and not _triton.INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1"
    ),
]
per_operator = pytest.mark.parametrize("operator", NAMES)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def target(operator: str) -> Target:
    return Target(operator, "triton", DEVICE)


def inputs_of(operator: str, *shape: int, **options: object) -> Inputs:
    return make_inputs(operator, *shape, device=DEVICE, **options)


def arguments_of(inputs: Inputs) -> list[Tensor]:
    """The kernels' arguments: those of the public function, with rank before logit_scale."""
    *features, scale = (value.detach() for value in inputs.values())
    if "basis" in inputs:
        batch, inner = inputs["basis"].shape[:-2], inputs["basis"].shape[-2]
        features.append(torch.full(batch, inner, device=DEVICE))
    return [*features, scale]


class TestAgainstEager:
    # (N, D) and options: ragged in every way, tile-even, ragged without smoothing, few pairs.
    CASES = (
        ((40, 35), {"label_smoothing": 0.1}),
        ((32, 64), {}),
        ((17, 5), {"differentiate_keys": False, "label_smoothing": 0.1}),
        ((1, 16), {"label_smoothing": 0.1}),
        ((2, 3), {"differentiate_keys": False}),
    )

    @per_operator
    @per_dtype
    @pytest.mark.sample(2)
    def test_within_the_budget(
        self, operator: str, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        for shape, options in self.CASES:
            for scale in (10.0, 100.0) if shape[0] == 40 else (10.0,):
                inputs = inputs_of(
                    operator, *shape, inner=20, scale=scale, dtype=dtype, generator=generator
                )
                assert_result_within_budget(target(operator), inputs, **options)

    @per_operator
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    @pytest.mark.sample
    def test_rounded_gradients_of_the_logits(
        self,
        operator: str,
        dtype: torch.dtype,
        differentiate_keys: bool,
        generator: torch.Generator,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # From 128 samples on, dS has the features' dtype. This adds less than the rounding of the
        # gradients, whose mean square is at most eps^2 / 12.
        monkeypatch.setattr(grad_logits, "ROUNDED_FROM", 1)
        inputs = inputs_of(operator, 40, 35, inner=20, dtype=dtype, generator=generator)
        options = {"differentiate_keys": differentiate_keys}
        assert_result_within_budget(target(operator), inputs, **options)
        _, gradients = losses_and_gradients(target(operator), inputs, **options)
        _, exact = losses_and_gradients(eager_losses, in_float64(inputs), **options)
        for name in set(inputs) - {"logit_scale"}:
            error = relative_error(gradients[name], exact[name])
            assert error <= torch.finfo(dtype).eps / 2, name

    @per_operator
    def test_leading_dimensions(self, operator: str, generator: torch.Generator) -> None:
        inputs = inputs_of(operator, 19, 6, batch=(2, 2), dtype=torch.float32, generator=generator)
        weights = tuple(
            torch.randn(2, 2, generator=generator).to(DEVICE) for _ in target(operator)(**inputs)
        )
        options = {"label_smoothing": 0.1}
        losses, gradients = losses_and_gradients(target(operator), inputs, weights, **options)
        exact = losses_and_gradients(
            eager_losses, in_float64(inputs), tuple(w.double() for w in weights), **options
        )
        for loss, truth in zip(losses, exact[0], strict=True):
            assert relative_error(loss, truth) <= 1e-6
        for name, gradient in gradients.items():
            assert relative_error(gradient, exact[1][name]) <= 1e-5, name

    @per_operator
    def test_no_problem_at_all(self, operator: str) -> None:
        inputs = inputs_of(operator, 5, 4, batch=(0,), dtype=torch.float32)
        losses, gradients = losses_and_gradients(target(operator), inputs)
        assert all(loss.shape == (0,) for loss in losses)
        assert not any(gradient.any() for gradient in gradients.values())

    def test_float64_is_refused(self) -> None:
        x = torch.eye(3, dtype=torch.float64, device=DEVICE)
        reason = "triton: needs float16, bfloat16 or float32, got float64"
        with pytest.raises(NotImplementedError, match=reason):
            info_nce(x, x, 1.0, backend="triton")


class TestChunks:
    @per_operator
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    @pytest.mark.sample(2)
    def test_more_launches_give_the_same(
        self,
        operator: str,
        differentiate_keys: bool,
        generator: torch.Generator,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        rows = tiles.tile_for(torch.empty(0, device=DEVICE), 2, 40, 40).rows
        samples = 2 * rows + 8  # three blocks of rows, the last one ragged
        inputs = inputs_of(
            operator, samples, 10, batch=(2,), dtype=torch.float32, generator=generator
        )
        options = {"label_smoothing": 0.1, "differentiate_keys": differentiate_keys}
        whole = losses_and_gradients(target(operator), inputs, **options)
        monkeypatch.setattr(pass_1, "ROW_BLOCKS_AT_ONCE", 2)
        monkeypatch.setattr(grad_logits, "WORKSPACE_BYTES", 0)  # one block of rows at a time
        chunked = losses_and_gradients(target(operator), inputs, **options)
        for loss, other in zip(whole[0], chunked[0], strict=True):
            torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
        for name, gradient in whole[1].items():
            assert relative_error(chunked[1][name], gradient) <= 1e-6, name

    def test_workspaces_do_not_grow_with_the_square_of_the_samples(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # On meta tensors, as for an H200; kernels and matmuls are not run.
        modules = {
            pass_1: ("statistics_kernel", "fold_kernel", "nll_kernel"),
            grad_logits: ("positives_kernel", "grad_logits_kernel"),
            pass_2: ("gradient_kernel", "scale_gradient_kernel"),
        }

        class Ignored:
            def __getitem__(self, grid: object) -> Callable[..., None]:
                return lambda *arguments, **options: None

        for module, kernels in modules.items():
            for kernel in kernels:
                monkeypatch.setattr(module, kernel, Ignored())
        monkeypatch.setattr(pass_2, "multiply", lambda *arguments, **options: None)
        monkeypatch.setattr(_triton, "aot_target", 90)
        sizes: list[int] = []
        empty = torch.empty

        def counted(*arguments: object, **options: object) -> Tensor:
            sizes.append(empty(*arguments, **options).nbytes)
            return empty(*arguments, **options)

        features = 768
        for samples in (4096, 32768 + 37, 131072):
            x = empty(samples, features, dtype=torch.bfloat16, device="meta")
            branch = features_branch(x, x, empty((), device="meta"))
            sizes.clear()
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", counted)
                _, *nlls = pass_1.losses(branch, 0.0)
                forward = sum(sizes)
                sizes.clear()
                needs = pass_2.Needs(left=True, right=True, scale=True)
                statistics = Statistics(*nlls, empty(1, device="meta"))
                pass_2.gradients(branch, statistics, Settings(label_smoothing=0.0), needs)
            # The README's formulas: partials of at most 128 blocks of rows, some splits and
            # folded launches; dS within its budget, dX in float32, dY as it is and in float32, and
            # the chunks of dX's matmul, which reuse memory but are counted separately.
            assert forward <= 8 * samples * (128 + 256 + samples // 16384 + 1) + 64 * samples
            scale_partials = 4 * (samples // 128 + 1) ** 2
            gradients = (4 + 2 + 4 + 4) * samples * features
            assert (
                sum(sizes)
                <= grad_logits.WORKSPACE_BYTES + gradients + scale_partials + 64 * samples
            )


class TestRank:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    @pytest.mark.sample(1)
    def test_what_is_past_the_rank_is_ignored(
        self, dtype: torch.dtype, differentiate_keys: bool, generator: torch.Generator
    ) -> None:
        # None, some, a whole vector of 16, all, and more than there are.
        rank = torch.tensor([0, 3, 16, 19, 99], device=DEVICE)
        inputs = inputs_of(
            "dual_info_nce_low_rank", 18, 7, batch=(5,), inner=19, dtype=dtype, generator=generator
        )
        past = torch.arange(19, device=DEVICE) >= rank[:, None]
        inputs["coefficients"].mT[past] = math.nan
        inputs["basis"][past] = math.nan
        results = {}
        for backend in ("triton", "reference"):
            results[backend] = losses_and_gradients(
                Target("dual_info_nce_low_rank", backend, DEVICE),
                inputs,
                rank=rank,
                label_smoothing=0.1,
                differentiate_keys=differentiate_keys,
            )
        (losses, gradients), (expected, expected_gradients) = results.values()
        for loss, truth in zip(losses, expected, strict=True):
            torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            rounded = gradient.dtype in HALVES
            tolerance = torch.finfo(gradient.dtype).eps * (1 if rounded else 50)
            assert relative_error(gradient, expected_gradients[name]) <= tolerance, name
        assert not gradients["coefficients"].mT[past].any()
        assert not gradients["basis"][past].any()

    def test_terms_of_16_bits_keep_the_digits_of_the_logits(
        self, generator: torch.Generator
    ) -> None:
        # A full bfloat16 matmul would leave three digits of the loss.
        inputs = inputs_of(
            "dual_info_nce_low_rank",
            24,
            40,
            inner=20,
            scale=100.0,
            dtype=torch.bfloat16,
            generator=generator,
        )
        _, component = dual_info_nce_low_rank(*inputs.values(), backend="triton")
        _, exact = eager_losses(**in_float64(inputs))
        assert relative_error(component, exact) <= 2e-6


class TestValues:
    def test_confident_positives_keep_their_digits(self, generator: torch.Generator) -> None:
        image, text = confident_positives(
            48, 64, probability=0.99999, device=DEVICE, generator=generator
        )
        inputs = {
            "image_features": image,
            "text_features": text,
            "logit_scale": torch.tensor(100.0, device=DEVICE),
        }
        (loss,), gradients = losses_and_gradients(target("info_nce"), inputs)
        (exact,), exact_gradients = losses_and_gradients(eager_losses, in_float64(inputs))
        rounding = 2 * 100 * torch.finfo(torch.float32).eps  # of a difference of logits near 100
        assert relative_error(loss, exact) <= 2 * rounding
        for name, gradient in gradients.items():
            assert relative_error(gradient, exact_gradients[name]) <= 2 * rounding, name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_identical_rows_give_log_n_and_no_gradient(
        self, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        rows = equal_rows(40, 48, dtype=dtype, device=DEVICE, generator=generator)
        scale = torch.tensor(100.0, device=DEVICE)
        inputs = {"image_features": rows, "text_features": rows, "logit_scale": scale}
        (loss,), gradients = losses_and_gradients(target("info_nce"), inputs)
        assert loss.item() == pytest.approx(math.log(40), rel=1e-6)
        for name, gradient in gradients.items():
            assert gradient.abs().max() <= 1e-5, name

    def test_duplicate_pairs_share_their_probability(self, generator: torch.Generator) -> None:
        image = power_law(36, 32, mean_offset=0.0, generator=generator).to(DEVICE)
        image[35] = image[0]  # in another block of rows and columns
        scale = torch.tensor(1e4, device=DEVICE)
        _, row_nll, column_nll = target("info_nce").kernel("fwd")(
            image, image, scale, 0.0, "triton"
        )
        for nll in (row_nll, column_nll):
            torch.testing.assert_close(nll[[0, 35]], torch.full((2,), math.log(2), device=DEVICE))
            assert not nll[1:35].any()

    @per_operator
    @pytest.mark.parametrize("scale", [0.0, 1e4, -100.0], ids="scale={:g}".format)
    def test_every_scale_is_finite_and_right(
        self, operator: str, scale: float, generator: torch.Generator
    ) -> None:
        inputs = inputs_of(operator, 20, 16, scale=scale, dtype=torch.bfloat16, generator=generator)
        losses, gradients = losses_and_gradients(target(operator), inputs)
        exact, exact_gradients = losses_and_gradients(eager_losses, in_float64(inputs))
        for loss, truth in zip(losses, exact, strict=True):
            assert relative_error(loss, truth) <= 1e-5
        for name in set(gradients) - {"logit_scale"}:
            tolerance = abs(scale) * 1e-6 + torch.finfo(torch.bfloat16).eps
            assert relative_error(gradients[name], exact_gradients[name]) <= tolerance, name
        assert gradients["logit_scale"].isfinite()

    @per_operator
    def test_nan_in_gives_nan_out(self, operator: str, generator: torch.Generator) -> None:
        for samples in (1, 20):  # a single pair has no negative that could propagate it
            inputs = inputs_of(operator, samples, 4, dtype=torch.float32, generator=generator)
            inputs["image_features"][-1, 0] = math.nan
            losses, gradients = losses_and_gradients(target(operator), inputs)
            assert all(loss.isnan() for loss in losses)
            assert all(gradient.isnan().any() for gradient in gradients.values())


class TestAutograd:
    @per_operator
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    @pytest.mark.sample(1)
    def test_every_subset_of_gradients(
        self, operator: str, differentiate_keys: bool, generator: torch.Generator
    ) -> None:
        inputs = inputs_of(operator, 9, 6, dtype=torch.float32, generator=generator)
        inputs["logit_scale"] = inputs["logit_scale"].double()
        arguments = arguments_of(inputs)
        outputs = target(operator).kernel("fwd")(*arguments, 0.1, "triton")
        nlls = [output for index, output in enumerate(outputs) if index % 3]

        def gradients(needs_grad: tuple[bool, ...]) -> tuple[Tensor, ...]:
            settings = (0.1, differentiate_keys, list(needs_grad), "triton")
            return target(operator).kernel("bwd")(*outputs[::3], *arguments, *nlls, *settings)

        full = gradients((True,) * len(inputs))
        for gradient, value in zip(full, inputs.values(), strict=True):
            assert (gradient.shape, gradient.dtype) == (value.shape, value.dtype)
        for needs_grad in itertools.product([False, True], repeat=len(inputs)):
            for needed, gradient, wanted in zip(
                needs_grad, gradients(needs_grad), full, strict=True
            ):
                assert torch.equal(gradient, wanted) if needed else gradient.numel() == 0

    @per_operator
    def test_any_backward_takes_any_forward(
        self, operator: str, generator: torch.Generator
    ) -> None:
        inputs = inputs_of(operator, 20, 17, dtype=torch.float32, generator=generator)
        arguments = arguments_of(inputs)
        _, exact = losses_and_gradients(eager_losses, in_float64(inputs), label_smoothing=0.1)
        for forward, backward in (("triton", "reference"), ("reference", "triton")):
            outputs = target(operator).kernel("fwd")(*arguments, 0.1, forward)
            nlls = [output for index, output in enumerate(outputs) if index % 3]
            ones = [torch.ones_like(loss) for loss in outputs[::3]]
            settings = (0.1, True, [True] * len(inputs), backward)
            gradients = target(operator).kernel("bwd")(*ones, *arguments, *nlls, *settings)
            for name, gradient in zip(inputs, gradients, strict=True):
                assert relative_error(gradient, exact[name]) <= 1e-5, f"{forward}: {name}"

    @per_operator
    @pytest.mark.parametrize("layout", ["transposed", "sliced"])
    def test_strides_do_not_matter(
        self, operator: str, layout: str, generator: torch.Generator
    ) -> None:
        def laid_out(x: Tensor) -> Tensor:
            if x.dim() < 2:
                return x
            if layout == "transposed":
                return x.mT.contiguous().mT
            return torch.stack([x, -x], -1).flatten(-2)[..., ::2]

        inputs = inputs_of(operator, 20, 17, dtype=torch.float32, generator=generator)
        strided = {name: laid_out(value) for name, value in inputs.items()}
        before = {name: value.clone() for name, value in strided.items()}
        plain, plain_gradients = losses_and_gradients(target(operator), inputs)
        losses, gradients = losses_and_gradients(target(operator), strided)
        assert all(map(torch.equal, losses, plain))
        for name, gradient in gradients.items():
            assert torch.equal(gradient, plain_gradients[name]), name
            assert torch.equal(strided[name], before[name]), name

    @per_operator
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.sample(1)
    def test_runs_are_bitwise_equal(
        self, operator: str, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        inputs = inputs_of(operator, 40, 20, scale=100.0, dtype=dtype, generator=generator)
        losses, gradients = losses_and_gradients(target(operator), inputs, label_smoothing=0.1)
        for _ in range(2):
            again, gradients_again = losses_and_gradients(
                target(operator), inputs, label_smoothing=0.1
            )
            assert all(map(torch.equal, again, losses))
            for name, gradient in gradients.items():
                assert torch.equal(gradients_again[name], gradient), name

    @per_operator
    @pytest.mark.sample(1)
    def test_opcheck(self, operator: str, generator: torch.Generator) -> None:
        inputs = inputs_of(operator, 6, 4, batch=(2,), dtype=torch.float32, generator=generator)
        arguments = (*arguments_of(inputs), 0.1, "triton")
        fwd, bwd = (target(operator).kernel(direction).default for direction in ("fwd", "bwd"))
        torch.library.opcheck(fwd, arguments)
        outputs = fwd(*arguments)
        nlls = [output for index, output in enumerate(outputs) if index % 3]
        needs_grad = [True, False] * 3
        settings = (0.1, False, needs_grad[: len(inputs)], "triton")
        torch.library.opcheck(bwd, (*outputs[::3], *arguments[:-2], *nlls, *settings))


@per_operator
@pytest.mark.parametrize("shape", [(17, 5), (40, 35)], ids=str)
@pytest.mark.sample(2)
def test_nothing_is_touched_outside_of_an_allocation(
    operator: str, shape: tuple[int, int], generator: torch.Generator
) -> None:
    inputs = inputs_of(operator, *shape, inner=5, dtype=torch.float32, generator=generator)
    expected = losses_and_gradients(target(operator), inputs, label_smoothing=0.1)
    between = {name: between_nan(value.to(DEVICE)) for name, value in inputs.items()}
    with guarded_allocations(least=6):
        losses, gradients = losses_and_gradients(target(operator), between, label_smoothing=0.1)
    assert all(map(torch.equal, losses, expected[0]))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[1][name]), name


def test_a_tile_holds_the_diagonal_of_its_rows() -> None:
    found = [value for value in vars(tiles).values() if isinstance(value, tiles.Tile)]
    for table in (tiles._LARGE, tiles._SMALL, tiles._LARGE_OF_TERMS):
        found += table.values()
    assert len(found) >= 12
    assert all(tile.columns % tile.rows == 0 for tile in found)


@pytest.mark.slow
def test_launches_are_recorded_for_the_compiler() -> None:
    # In a fresh process: kernels defined for the interpreter cannot be compiled.
    script = (
        "from himo_kernels import aot\n"
        "for target in aot.TARGETS:\n"
        "    for case in aot.cases(['info_nce', 'bfloat16', 'low rank']):\n"
        "        launches = aot.launches(case, target)\n"
        "        print(case.label, {launch.kernel.__name__ for launch in launches})"
    )
    lines = run_python("-c", script, TRITON_INTERPRET="0").splitlines()
    assert len(lines) == 4  # two sizes on two architectures
    for line in lines:
        for kernel in (
            "statistics",
            "nll",
            "positives",
            "grad_logits",
            "gradient",
            "bounded_product",
        ):
            assert f"'{kernel}_kernel'" in line


@pytest.mark.slow
def test_the_tuning_command_prints_a_row_for_each_tile() -> None:
    output = run_python(
        "-m",
        "himo_kernels.info_nce.triton.tune",
        *("--samples", "20", "--features", "8", "--dtype", "float32", "--repeats", "1"),
        *("--tiles", "16x16x16:4:1", "16x32x16:4:1"),
    )
    rows = [line for line in output.splitlines() if line.startswith("Tile(")]
    assert len(rows) == 2 and all(" ms" in row for row in rows)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU to tune for")
def test_the_tuning_command_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tune: error: needs CUDA tensors")
