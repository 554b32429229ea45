"""Invalid calls of every public function: a typed error with the place, the expected and the given.

Each row of the tables makes one argument of a valid call invalid. Every message has the form
`operator: expected argument ..., got ...`; TEXTS has some of them in full.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import himo_kernels
from himo_kernels import dispatch, nn
from himo_kernels.dispatch import Backend, Operator, backend_names

INF, NAN = float("inf"), float("nan")
TOO_LARGE = 10**400  # an int that no float can hold


def _tensor(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).sin().reshape(shape)


X = _tensor(5, 3)
PCA = himo_kernels.pca(X)
FEATURES = {"image_features": X, "text_features": X.flip(0)}
SCALE = {"logit_scale": torch.tensor(10.0)}
BIAS = {"logit_bias": torch.tensor(-10.0)}


class Entry(NamedTuple):
    """A public function, a valid call of it, and the names in its messages.

    A module hands its arguments on to operators, which report them under their own names.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    operators: tuple[str, ...]
    names: Mapping[str, str] = MappingProxyType({})

    def call(self, **changed: Any) -> Any:
        return self.function(**{**self.arguments, **changed})


def _module(make: Callable[..., torch.nn.Module], *inputs: str) -> Callable[..., Any]:
    # As one function of the module's settings and forward's inputs.
    def function(**keywords: Any) -> Any:
        values = [keywords.pop(name) for name in inputs]
        return make(**keywords)(*values)

    return function


ENTRIES = {
    "covariance": Entry(himo_kernels.covariance, {"x": X}, ("covariance",)),
    "gram": Entry(himo_kernels.gram, {"x": X}, ("gram",)),
    "pca": Entry(himo_kernels.pca, {"x": X}, ("pca",)),
    "project_reconstruct": Entry(
        himo_kernels.project_reconstruct, {"x": X, "pca": PCA}, ("project_reconstruct",)
    ),
    "pca_reconstruct": Entry(himo_kernels.pca_reconstruct, {"x": X}, ("pca_reconstruct",)),
    "normalize": Entry(himo_kernels.normalize, {"features": X}, ("normalize",)),
    "info_nce": Entry(himo_kernels.info_nce, {**FEATURES, **SCALE}, ("info_nce",)),
    "dual_info_nce": Entry(
        himo_kernels.dual_info_nce,
        {**FEATURES, "component_features": X.roll(1, 0), **SCALE},
        ("dual_info_nce",),
    ),
    "dual_info_nce_low_rank": Entry(
        himo_kernels.dual_info_nce_low_rank,
        {**FEATURES, "coefficients": _tensor(5, 2), "basis": _tensor(2, 3), **SCALE},
        ("dual_info_nce_low_rank",),
    ),
    "sigmoid_loss": Entry(
        himo_kernels.sigmoid_loss, {**FEATURES, **SCALE, **BIAS}, ("sigmoid_loss",)
    ),
    "himo_loss": Entry(himo_kernels.himo_loss, {**FEATURES, **SCALE}, ("himo_loss",)),
    "HiDe": Entry(
        _module(nn.HiDe, "text_features"),
        {"text_features": X},
        ("HiDe", "pca_reconstruct"),
        {"text_features": "x"},
    ),
    "HiMoLoss": Entry(
        _module(nn.HiMoLoss, "image_features", "text_features", "logit_scale"),
        {**FEATURES, **SCALE},
        ("HiMoLoss", "HiDe", "normalize", "himo_loss"),
        {"text_features": "x"},
    ),
}
FEATURE_ARGUMENTS = [
    (name, argument)
    for name, entry in ENTRIES.items()
    for argument, value in entry.arguments.items()
    if isinstance(value, Tensor) and argument not in ("logit_scale", "logit_bias")
]
LOSSES = ("info_nce", "dual_info_nce", "dual_info_nce_low_rank", "himo_loss", "HiMoLoss")


class Mistake(NamedTuple):
    """The value replacing a valid argument, the exception, and what its message says it got."""

    spoil: Callable[[Any], Any]
    error: type[Exception]
    got: str


def _instead(value: object, error: type[Exception], got: str) -> Mistake:
    return Mistake(lambda good: value, error, got)


def _with(good: Tensor, value: float) -> Tensor:
    spoiled = good.clone()
    spoiled.view(-1)[-1] = value
    return spoiled


NOT_TENSORS = {
    "list": Mistake(lambda good: good.tolist(), TypeError, "list"),
    "array": Mistake(lambda good: good.numpy(), TypeError, "ndarray"),
    "None": _instead(None, TypeError, "NoneType"),
    "number": _instead(1.0, TypeError, "float"),
}
DTYPES = {
    str(dtype): Mistake(lambda good, dtype=dtype: good.to(dtype), TypeError, str(dtype))
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
}
LAYOUTS = {
    "sparse": Mistake(lambda good: good.to_sparse(), TypeError, "torch.sparse_coo"),
    "sparse rows": Mistake(lambda good: good.to_sparse_csr(), TypeError, "torch.sparse_csr"),
    "mkldnn": Mistake(lambda good: good.to_mkldnn(), TypeError, "torch._mkldnn"),
    "nested": Mistake(
        lambda good: torch.nested.nested_tensor([good, good]), TypeError, "a nested tensor"
    ),
    "jagged": Mistake(
        lambda good: torch.nested.nested_tensor([good, good], layout=torch.jagged),
        TypeError,
        "a nested tensor",
    ),
    "quantised": Mistake(
        lambda good: torch.quantize_per_tensor(good, 0.1, 0, torch.qint8), TypeError, "torch.qint8"
    ),
}
SHAPES = {
    "0-d": Mistake(lambda good: good[0, 0], ValueError, "[]"),
    "1-d": Mistake(lambda good: good[:2, 0], ValueError, "[2]"),
    "no rows": Mistake(lambda good: good[:0], ValueError, "[0, "),
    "no columns": Mistake(lambda good: good[:, :0], ValueError, ", 0]"),
    "batch without rows": Mistake(lambda good: good.new_empty(4, 0, 3), ValueError, "[4, 0, 3]"),
}
FEATURE_MISTAKES = {**NOT_TENSORS, **DTYPES, **LAYOUTS, **SHAPES}

# Features that do not match others: a function's first argument determines the rest.
PAIR_MISTAKES = {
    "other dtype": Mistake(lambda good: good.double(), TypeError, "torch.float64"),
    "other device": Mistake(lambda good: good.to("meta"), ValueError, "meta"),
    "one row more": Mistake(lambda good: torch.cat([good, good[:1]]), ValueError, "["),
    "one column more": Mistake(lambda good: torch.cat([good, good[:, :1]], 1), ValueError, "["),
    "batch of one": Mistake(lambda good: good.unsqueeze(0), ValueError, "[1, "),
}
NOT_FINITE = {
    # If normalised before the check, features with an inf would become NaN.
    "NaN": Mistake(lambda good: _with(good, NAN), ValueError, "nan"),
    "inf": Mistake(lambda good: _with(good, INF), ValueError, ""),
    "-inf": Mistake(lambda good: _with(good, -INF), ValueError, ""),
}
SCALE_MISTAKES = {
    "string": _instead("10", TypeError, "str"),
    "bool": _instead(True, TypeError, "bool"),
    "list": _instead([10.0], TypeError, "list"),
    "None": _instead(None, TypeError, "NoneType"),
    "complex": _instead(10j, TypeError, "complex"),
    "int64 tensor": Mistake(lambda good: good.long(), TypeError, "torch.int64"),
    "complex64 tensor": Mistake(lambda good: good * 1j, TypeError, "torch.complex64"),
    "sparse tensor": Mistake(lambda good: good.to_sparse(), TypeError, "torch.sparse_coo"),
    "two elements": Mistake(lambda good: good.expand(2), ValueError, "[2]"),
    "no element": Mistake(lambda good: good.new_empty(0), ValueError, "[0]"),
    "other device": Mistake(lambda good: good.to("meta"), ValueError, "meta"),
    "too large": _instead(TOO_LARGE, ValueError, "a larger integer"),
    **{
        f"beyond float32, {type(value).__name__}": _instead(value, ValueError, "1e+39")
        for value in (1e39, 10**39, numpy.float64(1e39), -1e39)
    },
}
RANK_MISTAKES = {
    "number": _instead(1, TypeError, "int"),
    "list": _instead([1], TypeError, "list"),
    "float32": _instead(torch.tensor(1.0), TypeError, "torch.float32"),
    "int32": _instead(torch.tensor(1, dtype=torch.int32), TypeError, "torch.int32"),
    "bool": _instead(torch.tensor(True), TypeError, "torch.bool"),
    "1-d": _instead(torch.tensor([1]), ValueError, "[1]"),
    "other device": _instead(torch.tensor(1, device="meta"), ValueError, "meta"),
}


def _part(name: str, mistake: Mistake) -> Mistake:
    # One field of a PCA is invalid.
    def spoil(good: himo_kernels.PCA) -> himo_kernels.PCA:
        return good._replace(**{name: mistake.spoil(getattr(good, name))})

    return Mistake(spoil, mistake.error, mistake.got)


PCA_MISTAKES = {
    "pca": {
        "None": _instead(None, TypeError, "NoneType"),
        "tensor": _instead(X, TypeError, "Tensor"),
        "plain tuple": _instead(tuple(PCA), TypeError, "tuple"),
        "dict": _instead(PCA._asdict(), TypeError, "dict"),
    },
    "pca.mean": {
        **{name: _part("mean", mistake) for name, mistake in NOT_TENSORS.items()},
        "other dtype": _part("mean", PAIR_MISTAKES["other dtype"]),
        "lower dtype": _part("mean", Mistake(lambda good: good.half(), TypeError, "torch.float16")),
        "other device": _part("mean", PAIR_MISTAKES["other device"]),
        "one less": _part("mean", Mistake(lambda good: good[1:], ValueError, "[2]")),
        "kept dimension": _part("mean", Mistake(lambda good: good[None], ValueError, "[1, 3]")),
    },
    "pca.components": {
        **{name: _part("components", mistake) for name, mistake in NOT_TENSORS.items()},
        "other dtype": _part("components", PAIR_MISTAKES["other dtype"]),
        "other device": _part("components", PAIR_MISTAKES["other device"]),
        "one column more": _part("components", PAIR_MISTAKES["one column more"]),
        "batch of one": _part("components", PAIR_MISTAKES["batch of one"]),
    },
    "pca.rank": {name: _part("rank", mistake) for name, mistake in RANK_MISTAKES.items()},
}

NUMBERS = {
    "string": _instead("0.5", TypeError, "str"),
    "bool": _instead(True, TypeError, "bool"),
    "tensor": _instead(torch.tensor(0.5), TypeError, "Tensor"),
    "list": _instead([0.5], TypeError, "list"),
    "complex": _instead(0.5j, TypeError, "complex"),
    "too large": _instead(TOO_LARGE, ValueError, "a larger integer"),
    **{repr(value): _instead(value, ValueError, repr(value)) for value in (NAN, INF, -0.5)},
}
FLAGS = {
    "one": _instead(1, TypeError, "int"),
    "string": _instead("False", TypeError, "str"),
    "tensor": _instead(torch.tensor(True), TypeError, "Tensor"),
}
CHOICES = {
    "unknown": _instead("all", ValueError, "'all'"),
    "None": _instead(None, TypeError, "NoneType"),
    "list": _instead(["rows"], TypeError, "list"),
    "dict": _instead({"rows": 1}, TypeError, "dict"),
    "array": _instead(numpy.ones(2), TypeError, "ndarray"),
}
INTEGERS = {
    "number": _instead(1, TypeError, "int"),
    "float32": _instead(torch.ones(5), TypeError, "torch.float32"),
    "bool": _instead(torch.ones(5).bool(), TypeError, "torch.bool"),
    "one more": _instead(torch.arange(6), ValueError, "[6]"),
    "0-d": _instead(torch.tensor(1), ValueError, "[]"),
    "other device": _instead(torch.arange(5, device="meta"), ValueError, "meta"),
}
ALL, PCAS = tuple(ENTRIES), ("pca", "pca_reconstruct", "himo_loss", "HiDe", "HiMoLoss")
SETTING_MISTAKES = {
    "variance_threshold": (
        PCAS,
        {
            **NUMBERS,
            "0": _instead(0.0, ValueError, "0.0"),
            "above 1": _instead(1 + 1e-9, ValueError, "1.000000001"),
        },
    ),
    "variance_floor": (
        PCAS,
        {**NUMBERS, "string": _instead("1e-8", ValueError, "'1e-8'")},
    ),
    "gap_eps": (PCAS, {**NUMBERS, "None": _instead(None, TypeError, "NoneType")}),
    "label_smoothing": (LOSSES, {**NUMBERS, "above 1": _instead(1.5, ValueError, "1.5")}),
    "contrastive_weight": (("HiMoLoss",), NUMBERS),
    "component_weight": (("HiMoLoss",), NUMBERS),
    # inf keeps all logits.
    "keep_logits_mib": (
        ("info_nce", "dual_info_nce", "dual_info_nce_low_rank"),
        {name: mistake for name, mistake in NUMBERS.items() if name != "inf"},
    ),
    "exclude_self": (("info_nce",), FLAGS),
    "directions": (("info_nce",), CHOICES),
    "same_label": (("info_nce",), CHOICES),
    "reduction": (("info_nce",), CHOICES),
    "positives": (
        ("info_nce",),
        {
            **INTEGERS,
            "out of range": _instead(torch.tensor([0, 1, 2, 3, 5]), ValueError, "5 at [4]"),
        },
    ),
    "labels": (("info_nce",), INTEGERS),
    "weights": (
        ("info_nce",),
        {
            "list": _instead([1.0] * 5, ValueError, "5 of them"),
            "int64": _instead(torch.arange(5), TypeError, "torch.int64"),
            "one more": _instead(torch.ones(6), ValueError, "[6]"),
            "other device": _instead(torch.ones(5, device="meta"), ValueError, "meta"),
        },
    ),
    "differentiate_basis": (("pca_reconstruct", "himo_loss", "HiDe", "HiMoLoss"), FLAGS),
    "differentiate_keys": (LOSSES[:-1], FLAGS),
    "normalize_features": (("HiMoLoss",), FLAGS),
    "normalize_components": (("himo_loss", "HiMoLoss"), FLAGS),
    "decompose_images": (("HiMoLoss",), FLAGS),
    "gather_with_grad": (("HiMoLoss",), FLAGS),
    "check_ranks": (("HiMoLoss",), FLAGS),
    "check_finite": (ALL, {**FLAGS, "None": _instead(None, TypeError, "NoneType")}),
    "dtype": (
        ("covariance", "gram"),
        {
            "float16": _instead(torch.float16, TypeError, "torch.float16"),
            "int64": _instead(torch.int64, TypeError, "torch.int64"),
            "string": _instead("float32", TypeError, "float32"),
            "type": _instead(float, TypeError, "<class 'float'>"),
        },
    ),
    "backend": (
        ALL,
        {
            "unknown": _instead("nothing", ValueError, "'nothing'"),
            "capital": _instead("Reference", ValueError, "'Reference'"),
            "empty": _instead("", ValueError, "''"),
            "None": _instead(None, TypeError, "NoneType"),
            "number": _instead(0, TypeError, "int"),
            "list": _instead(["reference"], TypeError, "list"),
            "dict": _instead({"reference": 1}, TypeError, "dict"),
        },
    ),
    "preset": (("HiMoLoss",), CHOICES),
    # None is the preset's.
    "pca_scope": (
        ("HiMoLoss",),
        {name: mistake for name, mistake in CHOICES.items() if name != "None"},
    ),
    "strategy": (("HiMoLoss",), CHOICES),
}


class Row(NamedTuple):
    """One invalid call. `named` is the argument's name in the message."""

    entry: str
    argument: str
    named: str
    mistake: Mistake
    settings: Mapping[str, Any] = MappingProxyType({})


def _rows() -> Iterator[tuple[str, Row]]:
    for entry, argument in FEATURE_ARGUMENTS:
        for name, mistake in FEATURE_MISTAKES.items():
            yield name, Row(entry, argument, argument, mistake)
        for name, mistake in NOT_FINITE.items():
            yield name, Row(entry, argument, argument, mistake, {"check_finite": True})
        if argument != next(iter(ENTRIES[entry].arguments)):
            for name, mistake in PAIR_MISTAKES.items():
                # The columns of coefficients are what the rows of basis must match.
                named = argument
                if (argument, name) == ("coefficients", "one column more"):
                    named = "basis"
                yield name, Row(entry, argument, named, mistake)
    scalars = [(entry, "logit_scale") for entry in (*LOSSES, "sigmoid_loss")]
    for entry, argument in (*scalars, ("sigmoid_loss", "logit_bias")):
        for name, mistake in SCALE_MISTAKES.items():
            yield name, Row(entry, argument, argument, mistake)
        not_finite = _instead(NAN, ValueError, "nan")
        yield "NaN", Row(entry, argument, argument, not_finite, {"check_finite": True})
    for name, mistake in RANK_MISTAKES.items():
        yield name, Row("dual_info_nce_low_rank", "rank", "rank", mistake)
    for named, mistakes in PCA_MISTAKES.items():
        for name, mistake in mistakes.items():
            yield name, Row("project_reconstruct", "pca", named, mistake)
    for part in ("mean", "components"):
        mistake = _part(part, NOT_FINITE["NaN"])
        settings = {"check_finite": True}
        yield "NaN", Row("project_reconstruct", "pca", f"pca.{part}", mistake, settings)
    for argument, (entries, mistakes) in SETTING_MISTAKES.items():
        for entry in entries:
            for name, mistake in mistakes.items():
                yield name, Row(entry, argument, argument, mistake)


ROWS = [pytest.param(row, id=f"{row.entry}-{row.named}-{name}") for name, row in _rows()]


def _assert_names_all(error: BaseException, entry: Entry, named: str, got: str) -> None:
    names = "|".join(map(re.escape, {named, entry.names.get(named, named)}))
    message = rf"({'|'.join(entry.operators)}): expected ({names}) .+, got .*{re.escape(got)}.*"
    assert re.fullmatch(message, str(error)), f"{error}\ndoes not match\n{message}"


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|quantize_per_tensor)")
@pytest.mark.parametrize("row", ROWS)
def test_the_error_names_operator_argument_expected_and_got(row: Row) -> None:
    entry = ENTRIES[row.entry]
    spoiled = row.mistake.spoil(entry.arguments.get(row.argument))
    with pytest.raises((ValueError, TypeError)) as caught:
        entry.call(**{row.argument: spoiled}, **row.settings)
    assert type(caught.value) is row.mistake.error
    _assert_names_all(caught.value, entry, row.named, row.mistake.got)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_good_call_of_each_table_is_accepted(name: str) -> None:
    ENTRIES[name].call()
    ENTRIES[name].call(check_finite=True)


@pytest.mark.parametrize("number", [1, numpy.float32(0.5), numpy.float64(0.5), Fraction(1, 2)])
def test_a_number_need_not_be_a_float(number: Any) -> None:
    reconstruction, rank = RECONSTRUCT.call(variance_threshold=number, gap_eps=number)
    expected, expected_rank = RECONSTRUCT.call(variance_threshold=float(number))
    assert torch.equal(reconstruction, expected) and rank == expected_rank
    loss = INFO_NCE.call(logit_scale=number, label_smoothing=number)
    expected = INFO_NCE.call(logit_scale=float(number), label_smoothing=float(number))
    assert torch.equal(loss, expected)


def test_a_number_beyond_float32_is_taken_where_float64_can_hold_it() -> None:
    features = {name: x.double() for name, x in FEATURES.items()}
    assert himo_kernels.info_nce(**features, logit_scale=1e39) > 1e38
    # This bias does not change the softmax.
    loss = nn.HiMoLoss()
    assert torch.equal(loss(X, X, 10.0, 1e39), loss(X, X, 10.0, 1.0))


@pytest.mark.parametrize("name", ENTRIES)
def test_a_backend_that_cannot_take_the_tensors_is_refused_with_every_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_ALL", list(dispatch._ALL))
    Operator("other", {"new": Backend({})}, public=False)  # registers the name
    with pytest.raises(NotImplementedError) as caught:
        ENTRIES[name].call(backend="new")
    first, *reasons = str(caught.value).splitlines()
    operators = "|".join(ENTRIES[name].operators)
    assert re.match(
        rf"({operators}): backend 'new' cannot take \[5, 3\] torch.float32 on cpu", first
    )
    assert [line.split(":")[0].strip() for line in reasons] == backend_names()


INFO_NCE, LOW_RANK = ENTRIES["info_nce"], ENTRIES["dual_info_nce_low_rank"]
COVARIANCE, RECONSTRUCT = ENTRIES["covariance"], ENTRIES["pca_reconstruct"]
PROJECT, LOSS = ENTRIES["project_reconstruct"], ENTRIES["HiMoLoss"]
DTYPE_TEXT = "of dtype float16, bfloat16, float32 or float64"
TEXTS = {
    "covariance: expected x to be a torch.Tensor, got list": (
        TypeError,
        lambda: COVARIANCE.call(x=[[1.0]]),
    ),
    f"covariance: expected x {DTYPE_TEXT}, got torch.int64": (
        TypeError,
        lambda: COVARIANCE.call(x=X.long()),
    ),
    "covariance: expected x of shape [*, N, D], got [3]": (
        ValueError,
        lambda: COVARIANCE.call(x=X[0]),
    ),
    "covariance: expected x of shape [*, N, D] with at least one row and one column, got [0, 3]": (
        ValueError,
        lambda: COVARIANCE.call(x=X[:0]),
    ),
    "covariance: expected dtype to be None, torch.float32 or torch.float64, got torch.int32": (
        TypeError,
        lambda: COVARIANCE.call(dtype=torch.int32),
    ),
    "gram: expected x to be a dense (strided) tensor, got torch.sparse_coo": (
        TypeError,
        lambda: ENTRIES["gram"].call(x=X.to_sparse()),
    ),
    "gram: expected x to be finite, got nan at [4, 2]": (
        ValueError,
        lambda: ENTRIES["gram"].call(x=_with(X, NAN), check_finite=True),
    ),
    "gram: expected check_finite to be False for x on meta, which has no values, got True": (
        ValueError,
        lambda: ENTRIES["gram"].call(x=X.to("meta"), check_finite=True),
    ),
    "pca: expected variance_threshold in (0, 1], got 1.5": (
        ValueError,
        lambda: ENTRIES["pca"].call(variance_threshold=1.5),
    ),
    "pca: expected variance_threshold to be a number, got str": (
        TypeError,
        lambda: ENTRIES["pca"].call(variance_threshold="0.9"),
    ),
    "pca_reconstruct: expected gap_eps to be finite and >= 0, got -1e-06": (
        ValueError,
        lambda: RECONSTRUCT.call(gap_eps=-1e-6),
    ),
    "info_nce: expected logit_scale at most 3.4e+38 in size (torch.float32), got 1e+39": (
        ValueError,
        lambda: INFO_NCE.call(logit_scale=1e39),
    ),
    "pca_reconstruct: expected gap_eps at most 1.8e+308 in size, got a larger integer": (
        ValueError,
        lambda: RECONSTRUCT.call(gap_eps=TOO_LARGE),
    ),
    "pca_reconstruct: expected differentiate_basis to be True or False, got int": (
        TypeError,
        lambda: RECONSTRUCT.call(differentiate_basis=1),
    ),
    f"pca_reconstruct: expected backend to be one of {['auto', *backend_names()]}, got NoneType": (
        TypeError,
        lambda: RECONSTRUCT.call(backend=None),
    ),
    f"pca_reconstruct: expected backend to be one of {['auto', *backend_names()]}, got 'nothing'": (
        ValueError,
        lambda: RECONSTRUCT.call(backend="nothing"),
    ),
    "normalize: expected features of shape [*, N, D], got [3]": (
        ValueError,
        lambda: ENTRIES["normalize"].call(features=X[0]),
    ),
    "project_reconstruct: expected pca to be what himo_kernels.pca returned, got tuple": (
        TypeError,
        lambda: PROJECT.call(pca=tuple(PCA)),
    ),
    "project_reconstruct: expected pca.components of dtype torch.float32 for x of dtype "
    "torch.float32, got torch.float64": (
        TypeError,
        lambda: PROJECT.call(pca=PCA._replace(components=PCA.components.double())),
    ),
    "project_reconstruct: expected pca.mean of shape [4], got [3]": (
        ValueError,
        lambda: PROJECT.call(x=_tensor(5, 4)),
    ),
    "info_nce: expected text_features of shape [5, 3], got [4, 3]": (
        ValueError,
        lambda: INFO_NCE.call(text_features=X[1:]),
    ),
    "info_nce: expected text_features of dtype torch.float32 (as image_features), "
    "got torch.float64": (
        TypeError,
        lambda: INFO_NCE.call(text_features=X.double()),
    ),
    "info_nce: expected text_features on cpu (as image_features), got meta": (
        ValueError,
        lambda: INFO_NCE.call(text_features=X.to("meta")),
    ),
    "info_nce: expected logit_scale of shape [] or [1], got [2]": (
        ValueError,
        lambda: INFO_NCE.call(logit_scale=torch.ones(2)),
    ),
    "info_nce: expected logit_scale to be finite, got inf": (
        ValueError,
        lambda: INFO_NCE.call(logit_scale=INF, check_finite=True),
    ),
    "info_nce: expected label_smoothing in [0, 1], got nan": (
        ValueError,
        lambda: INFO_NCE.call(label_smoothing=NAN),
    ),
    "dual_info_nce_low_rank: expected rank to be an int64 tensor, got torch.int32": (
        TypeError,
        lambda: LOW_RANK.call(rank=torch.tensor(1, dtype=torch.int32)),
    ),
    "dual_info_nce_low_rank: expected basis of shape [2, 3], got [1, 3]": (
        ValueError,
        lambda: LOW_RANK.call(basis=_tensor(1, 3)),
    ),
    "HiDe: expected variance_threshold in (0, 1], got 0": (
        ValueError,
        lambda: nn.HiDe(0),
    ),
    "HiMoLoss: expected preset to be one of ['paper', 'official'], got 'Paper'": (
        ValueError,
        lambda: nn.HiMoLoss("Paper"),
    ),
    "HiMoLoss: expected strategy to be one of ['gather', 'ring'], got 'all'": (
        ValueError,
        lambda: nn.HiMoLoss(strategy="all"),
    ),
    "HiMoLoss: expected pca_scope to be one of ['global', 'local'], got 'rank'": (
        ValueError,
        lambda: nn.HiMoLoss(pca_scope="rank"),
    ),
    f"HiMoLoss: expected text_features {DTYPE_TEXT}, got torch.complex64": (
        TypeError,
        lambda: LOSS.call(text_features=X.to(torch.complex64)),
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_exact_text(text: str) -> None:
    error, call = TEXTS[text]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    """A device mesh of this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_distributed_tensor_is_refused(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    for name, argument in FEATURE_ARGUMENTS:
        entry = ENTRIES[name]
        value = DTensor.from_local(entry.arguments[argument], mesh, [Replicate()])
        with pytest.raises(TypeError) as caught:
            entry.call(**{argument: value})
        _assert_names_all(caught.value, entry, argument, "a DTensor")
        assert "x.to_local()" in str(caught.value)


# Every memory layout of the same values.
VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2],
    "rows of a wider matrix": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "lazily negated": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ENTRIES)
def test_a_layout_that_is_not_contiguous_is_accepted(name: str, view: str) -> None:
    entry = ENTRIES[name]
    changed = {
        argument: VIEWS[view](value)
        for argument, value in entry.arguments.items()
        if isinstance(value, Tensor) and value.dim() == 2
    }
    torch.testing.assert_close(entry.call(**changed), entry.call())


@pytest.mark.parametrize("name", ENTRIES)
def test_equal_rows_in_expanded_memory_are_accepted(name: str) -> None:
    entry = ENTRIES[name]
    expanded = {
        argument: value[:1].expand_as(value)
        for argument, value in entry.arguments.items()
        if isinstance(value, Tensor) and value.dim() == 2
    }
    copied = {argument: value.clone() for argument, value in expanded.items()}
    torch.testing.assert_close(entry.call(**expanded), entry.call(**copied))


@pytest.mark.parametrize("name", ENTRIES)
def test_meta_tensors_give_shapes_and_dtypes(name: str) -> None:
    entry = ENTRIES[name]
    to_meta: Callable[[Any], Any] = lambda value: torch.utils._pytree.tree_map_only(  # noqa: E731
        Tensor, lambda tensor: tensor.to("meta"), value
    )
    actual = torch.utils._pytree.tree_leaves(entry.call(**to_meta(entry.arguments)))
    expected = torch.utils._pytree.tree_leaves(entry.call())
    for meta, real in zip(actual, expected, strict=True):
        assert meta.is_meta
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
