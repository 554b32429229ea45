"""Argument checks. Every message has the form `operator: expected ..., got ...`."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def raise_shape(operator: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raises the ValueError for an argument of the wrong shape."""
    shape = list(got.shape) if isinstance(got, Tensor) else got
    raise ValueError(f"{operator}: expected {argument} of shape {expected}, got {shape}")


def raise_value(operator: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raises the ValueError for an argument of the right type but an invalid value."""
    raise ValueError(f"{operator}: expected {argument} {expected}, got {got!r}")


def raise_type(operator: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raises the TypeError for an argument of the wrong type, dtype or layout."""
    raise TypeError(f"{operator}: expected {argument} {expected}, got {got}")


def check_tensor(operator: str, argument: str, value: object) -> None:
    """Raises TypeError unless value is a dense, local floating-point tensor."""
    if not isinstance(value, Tensor):
        raise_type(operator, argument, "to be a torch.Tensor", type(value).__name__)
    if type(value).__name__ == "DTensor":  # by name: importing DTensor costs every process 0.3 s
        raise_type(operator, argument, "to be a local tensor (x.to_local())", "a DTensor")
    if value.layout != torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else value.layout
        raise_type(operator, argument, "to be a dense (strided) tensor", layout)
    if value.dtype not in FLOATING_DTYPES:
        raise_type(
            operator, argument, "of dtype float16, bfloat16, float32 or float64", value.dtype
        )


def check_features(operator: str, argument: str, value: Tensor, names: str = "[*, N, D]") -> None:
    """Raises unless value is a floating-point tensor [*, N, D] with at least one row and column."""
    check_tensor(operator, argument, value)
    if value.dim() < 2:
        raise_shape(operator, argument, names, value)
    if value.shape[-2] == 0 or value.shape[-1] == 0:
        raise_shape(operator, argument, f"{names} with at least one row and one column", value)


def check_device(
    operator: str, argument: str, value: Tensor, other_argument: str, other: Tensor
) -> None:
    """Raises ValueError unless value is on the device of other."""
    if value.device != other.device:
        expected = f"on {other.device} (as {other_argument})"
        raise ValueError(f"{operator}: expected {argument} {expected}, got {value.device}")


def check_same_as(
    operator: str, argument: str, value: Tensor, other_argument: str, other: Tensor
) -> None:
    """Raises unless value has the device and dtype of other."""
    check_device(operator, argument, value, other_argument, other)
    if value.dtype != other.dtype:
        expected = f"of dtype {other.dtype} (as {other_argument})"
        raise_type(operator, argument, expected, value.dtype)


def check_rank(
    operator: str, argument: str, value: object, shape: Sequence[int], other: Tensor
) -> None:
    """Raises unless value is an int64 tensor of this shape, on the device of other's features."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise_type(operator, argument, "to be an int64 tensor", got)
    check_shape(operator, argument, value, shape)
    check_device(operator, argument, value, "the features", other)


def check_shape(operator: str, argument: str, value: Tensor, expected: Sequence[int]) -> None:
    """Raises ValueError unless value.shape equals expected."""
    if value.shape != torch.Size(expected):
        raise_shape(operator, argument, str(list(expected)), value)


def check_alike(
    operator: str,
    features: Mapping[str, Tensor],
    check_each: Callable[[str, str, Tensor], None] = check_features,
) -> None:
    """Raises unless all have the shape, dtype and device of the first."""
    first, example = next(iter(features.items()))
    for argument, value in features.items():
        check_each(operator, argument, value)
        check_same_as(operator, argument, value, first, example)
        check_shape(operator, argument, value, example.shape)


def check_finite_values(operator: str, **tensors: Tensor) -> None:
    """Raises ValueError naming the first non-finite entry. Reads the device: one host sync each."""
    for argument, value in tensors.items():
        if value.is_meta:
            expected = f"to be False for {argument} on meta, which has no values"
            raise_value(operator, "check_finite", expected, True)
        bad = ~torch.isfinite(value.detach())
        if bad.any():
            index = tuple(int(i) for i in bad.nonzero()[0])
            place = f" at {list(index)}" if index else ""
            got = f"{value[index].item()}{place}"
            raise ValueError(f"{operator}: expected {argument} to be finite, got {got}")


def check_integers(operator: str, argument: str, value: object, other: Tensor) -> None:
    """Raises unless value is an int64 or int32 tensor, on the device of other's features."""
    expected = "to be an int64 or int32 tensor"
    if not isinstance(value, Tensor):
        raise_type(operator, argument, expected, type(value).__name__)
    if value.dtype not in (torch.int64, torch.int32):
        raise_type(operator, argument, expected, value.dtype)
    check_device(operator, argument, value, "the features", other)


def check_places(operator: str, argument: str, value: Tensor, size: int) -> None:
    """Raises ValueError naming the first integer outside of [0, size). One host sync."""
    outside = (value < 0) | (value >= size)
    if outside.any():
        index = tuple(int(i) for i in outside.nonzero()[0])
        got = f"{int(value[index])} at {list(index)}"
        raise ValueError(f"{operator}: expected {argument} in [0, {size}), got {got}")


def check_choice(operator: str, argument: str, value: object, choices: Sequence[str]) -> str:
    """Returns value; raises unless it is one of these strings."""
    expected = f"to be one of {list(choices)}"
    if not isinstance(value, str):
        raise_type(operator, argument, expected, type(value).__name__)
    if value not in choices:
        raise_value(operator, argument, expected, value)
    return value


def check_number(
    operator: str, argument: str, value: object, dtype: torch.dtype = torch.float64
) -> float:
    """Returns value as a float; raises unless it is a Python (or NumPy) real number within dtype.

    inf and NaN are within every dtype.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise_type(operator, argument, "to be a number", type(value).__name__)
    largest = torch.finfo(dtype).max
    expected = f"at most {largest:.2g} in size"
    try:
        number = float(value)
    except OverflowError:  # the value is not printed: it has hundreds of digits
        raise ValueError(
            f"{operator}: expected {argument} {expected}, got a larger integer"
        ) from None
    half_a_digit = 1 + torch.finfo(dtype).eps / 4  # rounds to largest
    if largest * half_a_digit < abs(number) < float("inf"):
        raise_value(operator, argument, f"{expected} ({dtype})", number)
    return number


def check_variance_threshold(operator: str, value: object) -> float:
    """Returns the cumulative-variance threshold tau as a float in (0, 1]."""
    number = check_number(operator, "variance_threshold", value)
    if not 0.0 < number <= 1.0:
        raise_value(operator, "variance_threshold", "in (0, 1]", value)
    return number


def check_variance_floor(operator: str, value: object) -> float | str:
    """Returns "relative", or the trace >= 0 at or below which a batch counts as constant."""
    expected = "to be 'relative', or finite and >= 0"
    if isinstance(value, str):
        if value != "relative":
            raise_value(operator, "variance_floor", expected, value)
        return value
    number = check_number(operator, "variance_floor", value)
    if not 0.0 <= number < float("inf"):
        raise_value(operator, "variance_floor", expected, value)
    return number


def check_gap_eps(operator: str, value: object) -> float:
    """Returns the relative gap regulariser as a finite float >= 0."""
    number = check_number(operator, "gap_eps", value)
    if not 0.0 <= number < float("inf"):
        raise_value(operator, "gap_eps", "to be finite and >= 0", value)
    return number


def check_label_smoothing(operator: str, value: object) -> float:
    """Returns the label smoothing as a float in [0, 1]."""
    number = check_number(operator, "label_smoothing", value)
    if not 0.0 <= number <= 1.0:
        raise_value(operator, "label_smoothing", "in [0, 1]", value)
    return number


def check_flag(operator: str, argument: str, value: object) -> bool:
    """Returns value; TypeError unless it is a bool (a non-empty string would count as True)."""
    if not isinstance(value, bool):
        raise_type(operator, argument, "to be True or False", type(value).__name__)
    return value
