"""Reads the file of --config: flags of `himo train` as JSON or TOML."""

import difflib
import tomllib
import typing
from collections.abc import Mapping
from typing import Any, Literal

from himo.errors import HimoError, quoted, shortened
from himo.files import json_value, open_regular
from himo.flags import flag

_LARGEST = 1 << 20  # bytes
# Keys of a run's config.json that are no flags; they are skipped, so that --config can read it.
_OF_A_RUN = ("command", "versions", "starts", "chosen")


def read_config(path: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file by the name of their field; a null is as a key that is not there.

    Args:
        path: ends in .json or .toml. Keys are flags without their first dashes, and with - or _.
        kinds: the type of each field: bool, int, float, str or a Literal.

    Raises:
        HimoError: the file cannot be read, a key is unknown or is there twice, or a value is of
            another type.
    """
    values: dict[str, Any] = {}
    for key, value in _content(path).items():
        name = key.replace("-", "_")
        if name in _OF_A_RUN:
            continue
        if name not in kinds:
            (near,) = difflib.get_close_matches(name, kinds, 1, 0)
            raise HimoError(f"{path}: unknown key {quoted(key)}; the nearest flag is {flag(near)}")
        if name in values:
            raise HimoError(f"{path}: {shortened(key)} is given twice, with - and with _")
        if value is not None:
            values[name] = _checked(value, kinds[name], f"{path}: {key}")
    return values


def _content(path: str) -> dict[str, Any]:
    if not path.endswith((".json", ".toml")):
        raise HimoError(f"--config {path}: expected a name that ends in .json or .toml")
    with open_regular(path) as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise HimoError(f"{path}: expected at most {_LARGEST:,} bytes")
    try:
        is_toml = path.endswith(".toml")
        content = tomllib.loads(data.decode("utf-8-sig")) if is_toml else json_value(data)
    except (ValueError, RecursionError) as error:
        raise HimoError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise HimoError(f"{path}: expected an object of flags and values, got {quoted(content)}")
    return content


def _checked(value: Any, kind: Any, where: str) -> Any:
    """The value as the type of its field; HimoError if it is of another."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if choices:
        if value in choices:
            return value
        raise HimoError(f"{where}: expected {' or '.join(choices)}, got {quoted(value)}")
    if kind is float and type(value) is int and abs(value) < 1 << 64:
        value = float(value)
    if type(value) is not kind:
        expected = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
        raise HimoError(f"{where}: expected {expected[kind]}, got {quoted(value)}")
    return value
