"""The forms of info_nce other than the square one, and nt_xent, against dense formulas."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from pairs_cases import (
    assert_equal_to_dense,
    dense,
    features,
    loss_and_gradients,
    masks,
)
from torch import Tensor

import himo_kernels
from himo_kernels.testing import confident_positives, relative_error, runnable_backends

EXACT = 1e-12
# float64 throughout; Triton's kernels, which do not take it, have test_info_nce_pairs_triton.py.
BACKENDS = runnable_backends("info_nce_pairs", interpreted=False)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
few_examples = hypothesis.settings(max_examples=60, deadline=None)

# (N, M): one pair, one key, one row, more keys than rows, and more than one tile.
SHAPES = [(1, 1), (4, 1), (1, 4), (5, 9), (70, 300)]


def drawn(rows: int, columns: int, generator: torch.Generator) -> dict[str, dict[str, object]]:
    """Returns arguments of every form, by name."""

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    positives = integers(columns, rows)
    classes = max(2, rows // 3)
    labels = (7 - 3 * integers(classes, rows), 7 - 3 * integers(classes, columns))
    weights = (
        torch.rand(rows, generator=generator),
        torch.rand(columns, generator=generator, dtype=torch.float64),
    )
    return {
        "positives": {"positives": positives},
        "int32 positives, not itself": {"positives": positives.int(), "exclude_self": True},
        "labels": {"labels": labels},
        "int32 labels, not itself": {
            "labels": (labels[0].int(), labels[1].int()),
            "exclude_self": True,
        },
        "one label": {"labels": (labels[0] * 0, labels[1] * 0)},
        "no label in common": {"labels": (labels[0], labels[1] + 1)},
        "exclusions": {"positives": positives, "labels": labels, "same_label": "exclude"},
        "all others excluded": {
            "positives": positives,
            "labels": (labels[0] * 0, labels[1] * 0),
            "same_label": "exclude",
        },
        "nothing excluded": {
            "positives": positives,
            "labels": (labels[0], labels[1] + 1),
            "same_label": "exclude",
        },
        "exclusions, not itself, weights": {
            "positives": positives,
            "labels": labels,
            "same_label": "exclude",
            "exclude_self": True,
            "weights": weights,
        },
        "labels, weights": {"labels": labels, "weights": weights},
    }


FORMS = list(drawn(2, 2, torch.Generator()))


class TestAgainstTheDenseFormula:
    @each_backend
    @pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("directions", ["both", "rows", "columns"])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0], ids="smoothing={}".format)
    @pytest.mark.sample
    def test_loss_and_gradients(
        self,
        backend: str,
        shape: tuple[int, int],
        form: str,
        directions: str,
        label_smoothing: float,
        generator: torch.Generator,
    ) -> None:
        options = drawn(*shape, generator)[form]
        assert_equal_to_dense(
            backend,
            features(*shape, generator=generator),
            directions=directions,
            label_smoothing=label_smoothing,
            **options,
        )

    @each_backend
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("differentiate_keys", [True, False], ids=["keys", "constant-keys"])
    @pytest.mark.sample
    def test_reductions(
        self,
        backend: str,
        form: str,
        reduction: str,
        differentiate_keys: bool,
        generator: torch.Generator,
    ) -> None:
        inputs, options = features(7, 7, generator=generator), drawn(7, 7, generator)[form]
        for directions in ("both", "rows", "columns"):
            assert_equal_to_dense(
                backend,
                inputs,
                directions=directions,
                reduction=reduction,
                differentiate_keys=differentiate_keys,
                label_smoothing=0.1,
                **options,
            )

    @each_backend
    @few_examples
    @hypothesis.given(
        st.integers(1, 9),
        st.integers(1, 9),
        st.integers(1, 4),
        st.sampled_from(["both", "rows", "columns"]),
        st.sampled_from(["positives", "positive", "exclude"]),
        st.booleans(),
        st.floats(0, 1),
        st.floats(-30, 100),
        st.integers(0, 2**31 - 1),
    )
    def test_any_problem(
        self, backend, rows, columns, width, directions, pairs, exclude_self, eps, scale, seed
    ):
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, object] = {"exclude_self": exclude_self, "directions": directions}
        if pairs != "positive":
            options["positives"] = torch.randint(columns, (rows,), generator=generator)
        if pairs != "positives":
            classes = int(torch.randint(1, 6, (), generator=generator))
            options["labels"] = tuple(
                torch.randint(-classes, classes, (size,), generator=generator)
                for size in (rows, columns)
            )
            options["same_label"] = pairs
        inputs = features(rows, columns, width, scale=scale, generator=generator)
        assert_equal_to_dense(backend, inputs, 1e-11, label_smoothing=eps, **options)


@each_backend
def test_leading_dimensions_are_independent_problems(
    backend: str, generator: torch.Generator
) -> None:
    batch = (2, 3)
    inputs = features(5, 8, batch=batch, generator=generator)
    positives = torch.randint(8, (*batch, 5), generator=generator)
    labels = (
        torch.randint(3, (5,), generator=generator),  # the same of every problem
        torch.randint(3, (*batch, 8), generator=generator),
    )
    weights = torch.rand(*batch, 5, generator=generator)
    options = {"same_label": "exclude", "directions": "rows", "label_smoothing": 0.1}
    loss, gradients = loss_and_gradients(
        himo_kernels.info_nce,
        inputs,
        backend=backend,
        positives=positives,
        labels=labels,
        weights=weights,
        **options,
    )
    assert loss.shape == batch
    incoming = torch.linspace(1, 2, 6, dtype=torch.float64).view(batch)
    total = 0.0
    for a, b in torch.ones(batch).nonzero().tolist():
        one = {
            "image_features": inputs["image_features"][a, b],
            "text_features": inputs["text_features"][a, b],
            "logit_scale": inputs["logit_scale"],
        }
        expected, exact = loss_and_gradients(
            dense,
            one,
            positives=positives[a, b],
            labels=(labels[0], labels[1][a, b]),
            weights=weights[a, b],
            **options,
        )
        assert loss[a, b].item() == pytest.approx(expected.item(), rel=EXACT)
        for name in ("image_features", "text_features"):
            torch.testing.assert_close(
                gradients[name][a, b], incoming[a, b] * exact[name], rtol=EXACT, atol=EXACT
            )
        total = total + incoming[a, b] * exact["logit_scale"]
    torch.testing.assert_close(gradients["logit_scale"], total, rtol=EXACT, atol=EXACT)


@each_backend
def test_no_problems(backend: str) -> None:
    inputs = features(3, 4, batch=(0,))
    loss = himo_kernels.info_nce(**inputs, backend=backend, directions="rows")
    assert loss.shape == (0,)


class TestDefaults:
    @each_backend
    def test_one_direction_is_cross_entropy(self, backend: str, generator: torch.Generator) -> None:
        inputs = features(6, 6, generator=generator)
        logits = inputs["logit_scale"] * inputs["image_features"] @ inputs["text_features"].T
        labels = torch.arange(6)
        for directions, table in (("rows", logits), ("columns", logits.T)):
            loss = himo_kernels.info_nce(**inputs, directions=directions, backend=backend)
            assert loss.item() == pytest.approx(F.cross_entropy(table, labels).item(), rel=EXACT)

    @each_backend
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_square_forms_agree(
        self, backend: str, reduction: str, generator: torch.Generator
    ) -> None:
        # The default is computed by the operator of the square form, except without a reduction.
        inputs = features(6, 6, generator=generator)
        options = {"reduction": reduction, "label_smoothing": 0.1, "backend": backend}
        loss, gradients = loss_and_gradients(himo_kernels.info_nce, inputs, **options)
        other, others = loss_and_gradients(
            himo_kernels.info_nce, inputs, positives=torch.arange(6), **options
        )
        torch.testing.assert_close(loss, other, rtol=EXACT, atol=EXACT)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=EXACT, atol=EXACT)

    @each_backend
    def test_more_keys_than_rows_are_negatives(
        self, backend: str, generator: torch.Generator
    ) -> None:
        # A hard negative has no loss of its own, in either direction.
        inputs = features(4, 9, generator=generator)
        assert_equal_to_dense(backend, inputs, directions="rows")
        assert_equal_to_dense(backend, inputs, directions="columns")
        assert_equal_to_dense(backend, inputs, positives=torch.arange(4))

    def test_labels_without_repeats_exclude_nothing(self, generator: torch.Generator) -> None:
        inputs = features(6, 6, generator=generator)
        plain = himo_kernels.info_nce(**inputs)
        labels = torch.randperm(6, generator=generator) - 3
        for same_label in ("positive", "exclude"):
            loss = himo_kernels.info_nce(**inputs, labels=labels, same_label=same_label)
            assert loss.item() == pytest.approx(plain.item(), rel=EXACT)


class TestWithoutPositives:
    @each_backend
    def test_rows_without_a_match_have_no_loss_and_no_gradient(
        self, backend: str, generator: torch.Generator
    ) -> None:
        inputs = features(3, 4, generator=generator)
        labels = (torch.tensor([0, 5, 1]), torch.tensor([0, 1, 1, 9]))
        options = {"labels": labels, "directions": "rows", "reduction": "none"}
        loss, gradients = loss_and_gradients(
            himo_kernels.info_nce, inputs, backend=backend, **options
        )
        assert loss[1] == 0 and loss[0] > 0 and loss[2] > 0
        assert (gradients["image_features"][1] == 0).all()
        assert (gradients["text_features"] != 0).any(1).all()

    @each_backend
    @pytest.mark.parametrize("directions", ["both", "rows", "columns"])
    @pytest.mark.parametrize("exclude_self", [True, False])
    def test_nothing_left(
        self, backend: str, directions: str, exclude_self: bool, generator: torch.Generator
    ) -> None:
        # Not even a pair, or no positive pair.
        for inputs, labels in (
            (features(1, 1, generator=generator), torch.zeros(1, dtype=torch.int64)),
            (features(4, 4, generator=generator), torch.arange(4)),
        ):
            pair = labels if exclude_self else (labels, labels + 100)
            loss, gradients = loss_and_gradients(
                himo_kernels.info_nce,
                inputs,
                labels=pair,
                exclude_self=exclude_self,
                directions=directions,
                label_smoothing=0.1,
                backend=backend,
            )
            assert loss == 0
            assert all((gradient == 0).all() for gradient in gradients.values())

    @each_backend
    def test_a_mean_counts_what_has_a_positive(
        self, backend: str, generator: torch.Generator
    ) -> None:
        inputs = features(3, 5, generator=generator)
        options = {"positives": torch.tensor([2, 2, 4]), "directions": "columns"}
        mean = himo_kernels.info_nce(**inputs, backend=backend, **options)
        each = himo_kernels.info_nce(**inputs, backend=backend, reduction="none", **options)
        assert (each != 0).tolist() == [False, False, True, False, True]
        assert mean.item() == pytest.approx(each.sum().item() / 2, rel=EXACT)

    @each_backend
    def test_weights_of_zero(self, backend: str, generator: torch.Generator) -> None:
        inputs = features(3, 3, generator=generator)
        weights = torch.zeros(3)
        loss = himo_kernels.info_nce(**inputs, weights=weights, backend=backend)
        assert loss == 0


def test_weights_are_differentiable(generator: torch.Generator) -> None:
    inputs = features(3, 3, generator=generator)
    weights = torch.rand(3, generator=generator, dtype=torch.float64).requires_grad_()
    options = {"directions": "rows", "reduction": "sum"}
    himo_kernels.info_nce(**inputs, weights=weights, **options).backward()
    each = himo_kernels.info_nce(**inputs, directions="rows", reduction="none")
    torch.testing.assert_close(weights.grad, each, rtol=EXACT, atol=EXACT)


class TestNtXent:
    @staticmethod
    def dense(x: Tensor, y: Tensor, logit_scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """SimCLR's loss with the self pairs removed from the table, row by row."""
        z = torch.cat([x, y])
        count = len(z)
        logits = logit_scale * z @ z.T
        others = logits[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
        places = torch.arange(count)
        partner = (places + len(x)) % count
        place = partner - (partner > places).long()  # without column i
        return F.cross_entropy(others, place, label_smoothing=label_smoothing)

    @each_backend
    @pytest.mark.parametrize("samples", [1, 2, 7, 90])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_loss_and_gradients(
        self, backend: str, samples: int, label_smoothing: float, generator: torch.Generator
    ) -> None:
        found = features(samples, samples, generator=generator)
        inputs = dict(zip(("x", "y", "logit_scale"), found.values(), strict=True))
        options = {"label_smoothing": label_smoothing}
        loss, gradients = loss_and_gradients(
            himo_kernels.nt_xent, inputs, backend=backend, **options
        )
        expected, exact = loss_and_gradients(self.dense, inputs, **options)
        torch.testing.assert_close(loss, expected, rtol=EXACT, atol=EXACT)
        for name, gradient in exact.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=EXACT, atol=EXACT)

    @pytest.mark.parametrize(
        ("y", "text"),
        [
            (torch.ones(2, 2), "y of shape [3, 2], got [2, 2]"),
            (torch.ones(3, 2).double(), "y of dtype torch.float32 (as x), got torch.float64"),
            (torch.full((3, 2), math.nan), "y to be finite, got nan at [0, 0]"),
        ],
        ids=["shape", "dtype", "NaN"],
    )
    def test_refused(self, y: Tensor, text: str) -> None:
        with pytest.raises((ValueError, TypeError)) as caught:
            himo_kernels.nt_xent(torch.ones(3, 2), y, 1.0, check_finite=True)
        assert str(caught.value) == f"nt_xent: expected {text}"

    @each_backend
    def test_reduction(self, backend: str, generator: torch.Generator) -> None:
        x, y, scale = features(3, 3, batch=(2,), generator=generator).values()
        each = himo_kernels.nt_xent(x, y, scale, reduction="none", backend=backend)
        assert each.shape == (2, 6)
        mean = himo_kernels.nt_xent(x, y, scale, backend=backend)
        torch.testing.assert_close(mean, each.mean(-1), rtol=EXACT, atol=EXACT)


@each_backend
def test_supervised_contrastive_loss(backend: str, generator: torch.Generator) -> None:
    # Khosla et al. (arXiv 2004.11362), eq. (2), written out: z against itself without itself.
    z = features(8, 8, generator=generator)["image_features"]
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3, 3])
    logits = 5 * z @ z.T
    losses = []
    for i in range(8):
        others = [a for a in range(8) if a != i]
        own = [p for p in others if labels[p] == labels[i]]
        if own:
            total = torch.logsumexp(logits[i, others], 0)
            losses.append(-sum(logits[i, p] - total for p in own) / len(own))
    loss = himo_kernels.info_nce(
        z, z, 5.0, labels=labels, exclude_self=True, directions="rows", backend=backend
    )
    assert len(losses) == 7
    assert loss.item() == pytest.approx((sum(losses) / len(losses)).item(), rel=EXACT)


class TestPrecision:
    @each_backend
    def test_a_confident_positive_keeps_its_digits(
        self, backend: str, generator: torch.Generator
    ) -> None:
        images, texts = confident_positives(64, 48, probability=1 - 1e-6, generator=generator)
        inputs = {
            "image_features": images,
            "text_features": torch.cat([texts, -texts[:9]]),
            "logit_scale": torch.tensor(100.0),
        }
        wide = {name: value.double() for name, value in inputs.items()}
        options = {"positives": torch.arange(64), "directions": "rows"}
        loss, gradients = loss_and_gradients(
            himo_kernels.info_nce, inputs, backend=backend, **options
        )
        exact, expected = loss_and_gradients(dense, wide, **options)
        # The budget of README.md: (1 + s / 4) u sqrt(terms).
        budget = (1 + 100 / 4) * torch.finfo(torch.float32).eps * 73**0.5
        assert relative_error(loss, exact) < budget
        for name in ("image_features", "text_features"):
            assert relative_error(gradients[name], expected[name]) < budget, name

    @each_backend
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.sample
    def test_within_the_budget(
        self, backend: str, form: str, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        rows, columns, width, scale = 80, 300, 24, 20.0
        inputs = features(rows, columns, width, scale=scale, dtype=dtype, generator=generator)
        options = drawn(rows, columns, generator)[form]
        wide = {name: value.double() for name, value in inputs.items()}
        loss, gradients = loss_and_gradients(
            himo_kernels.info_nce, inputs, backend=backend, label_smoothing=0.1, **options
        )
        exact, expected = loss_and_gradients(dense, wide, label_smoothing=0.1, **options)
        assert loss.dtype == torch.float32
        budget = (1 + scale / 4) * torch.finfo(torch.float32).eps * columns**0.5
        assert relative_error(loss, exact, least_norm=1) <= budget
        for name, gradient in gradients.items():
            assert gradient.dtype == inputs[name].dtype
            # What rounding the gradient to its dtype costs.
            rounding = torch.finfo(gradient.dtype).eps
            error = relative_error(gradient, expected[name], least_norm=1e-2)
            assert error <= budget + rounding, name


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_its_loss(backend: str, bad: float, generator: torch.Generator) -> None:
    inputs = features(4, 6, generator=generator)
    inputs["image_features"][2, 1] = bad
    options = {"directions": "rows", "reduction": "none", "backend": backend}
    for labels in (None, (torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 0, 1]))):
        losses = himo_kernels.info_nce(**inputs, labels=labels, **options)
        assert losses.isfinite().tolist() == [True, True, False, True]


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_positive_without_negatives_spoils_its_loss(
    backend: str, bad: float, generator: torch.Generator
) -> None:
    inputs = features(3, 3, generator=generator)
    inputs["image_features"][1, 1] = bad
    options = {"labels": torch.zeros(3, dtype=torch.int64), "same_label": "exclude"}
    options |= {"reduction": "none", "backend": backend}
    for directions in ("rows", "columns"):
        losses = himo_kernels.info_nce(**inputs, **options, directions=directions)
        assert losses[1].isnan() and losses[::2].tolist() == [0, 0]


def test_the_masks_of_the_oracle() -> None:
    # By hand: the rule that the other tests rest on.
    labels = (torch.tensor([1, 2]), torch.tensor([2, 1, 1]))
    positive, allowed = masks(2, 3, labels=labels)
    assert positive.int().tolist() == [[0, 1, 1], [1, 0, 0]]
    assert allowed.all()
    positive, allowed = masks(
        2, 3, torch.tensor([2, 2]), labels=labels, same_label="exclude", exclude_self=True
    )
    assert positive.int().tolist() == [[0, 0, 1], [0, 0, 1]]
    assert allowed.int().tolist() == [[0, 0, 1], [0, 0, 1]]


Z = torch.ones(3, 2)
KEYS = torch.ones(4, 2)
INTEGERS = "to be an int64 or int32 tensor"
REFUSED = {
    "directions to be one of ['both', 'rows', 'columns'], got 'row'": {"directions": "row"},
    "same_label to be one of ['positive', 'exclude'], got 'mask'": {"same_label": "mask"},
    "reduction to be one of ['mean', 'sum', 'none'], got 'max'": {"reduction": "max"},
    "exclude_self to be True or False, got int": {"exclude_self": 1},
    f"positives {INTEGERS}, got list": {"positives": [0, 1, 2]},
    f"positives {INTEGERS}, got torch.float32": {"positives": torch.zeros(3)},
    f"labels {INTEGERS}, got torch.bool": {"labels": torch.ones(3).bool(), "keys": Z},
    f"labels[1] {INTEGERS}, got NoneType": {"labels": (torch.arange(3), None)},
    "labels to be one tensor or two, got '3 of them'": {"labels": (torch.arange(3),) * 3},
    "labels to be a pair, of 3 rows and 4 columns, got Tensor": {"labels": torch.arange(3)},
    "labels[1] of shape [4], got [3]": {"labels": (torch.arange(3),) * 2},
    "weights to be a pair, of 3 rows and 4 columns, got Tensor": {
        "weights": torch.ones(3),
        "positives": torch.arange(3),
    },
    "weights of dtype float16, bfloat16, float32 or float64, got torch.int64": {
        "weights": torch.arange(3),
        "directions": "rows",
    },
    "positives of shape [3], got [4]": {"positives": torch.arange(4)},
    "positives in [0, 4), got 4 at [1]": {"positives": torch.tensor([0, 4, 1])},
    "positives in [0, 4), got -1 at [2]": {"positives": torch.tensor([0, 3, -1])},
    "positives on cpu (as the features), got meta": {"positives": torch.arange(3).to("meta")},
    "same_label to be 'exclude' with positives, which leave labels none to choose, "
    "got 'positive'": {"positives": torch.arange(3), "labels": (torch.arange(3), torch.arange(4))},
    "exclude_self to be False where each row's positive is its own column, got True": {
        "exclude_self": True,
        "directions": "rows",
    },
    "directions to be 'rows' or 'columns' for losses without a reduction and M != N, got 'both'": {
        "reduction": "none"
    },
    "text_features of shape [3, 2], got [2, 2]": {"keys": Z[:2], "directions": "rows"},
    "text_features of shape [3, 2], got [4, 2]": {},
    "text_features of shape [4, 2], got [4, 3]": {"keys": torch.ones(4, 3)},
    "weights to be finite, got nan at [1]": {
        "weights": torch.tensor([1, math.nan, 1]),
        "directions": "rows",
        "check_finite": True,
    },
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    options = dict(REFUSED[text])
    keys = options.pop("keys", KEYS)
    with pytest.raises((ValueError, TypeError)) as caught:
        himo_kernels.info_nce(Z, keys, 1.0, **options)
    assert str(caught.value) == f"info_nce: expected {text}"
