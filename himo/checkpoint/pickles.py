"""Reads the pickles that torch writes as data: nothing in them is imported, called or built.

A pickle is a program for a machine that can call any function. This is a machine that cannot:
a global becomes its name, and the few names that a checkpoint of tensors is made of become
records of what they describe. Any other name, and any opcode that torch does not write, is
refused. Hence neither `pickle` nor `torch.load` is needed, nor trusted.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import torch

# Keys of dictionaries: text, and the small integers by which optimizer states number their
# parameters. Others could be made slow to hash (nested tuples) or to tell apart.
_MAX_INT_KEY = 1 << 31
_MAX_OPCODES = 1_000_000  # half a second; a thousand tensors take 40,000

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class PickleError(ValueError):
    """What a pickle holds is not data of the kind torch saves, or is damaged."""


@dataclass(frozen=True)
class Global:
    """A name, `module.attribute`, that a pickle wants looked up. It is not."""

    name: str


@dataclass(frozen=True, eq=False)
class StorageRecord:
    """A run of numel values of one dtype, found under key."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A strided tensor; offset and strides count values of the storage. Not checked against it."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class ScriptModule:
    """A module of a TorchScript archive: its attributes, without its code."""

    attributes: dict[Any, Any] = field(default_factory=dict)


def _record_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_requires_grad_and_hooks: Any
) -> TensorRecord:
    numbers = (offset, *size, *stride)
    if (
        not isinstance(storage, StorageRecord)
        or len(size) != len(stride)
        or any(type(x) is not int or not 0 <= x < 1 << 62 for x in numbers)
    ):
        raise PickleError("a tensor with an impossible storage, shape or stride")
    return TensorRecord(storage, offset, tuple(size), tuple(stride))


def _first(value: Any, *_others: Any) -> Any:
    return value


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor_v2": _record_tensor,
    "torch._utils._rebuild_tensor": _record_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch.Size": _first,
    # Attributes of TorchScript modules other than tensors.
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
}
_DTYPES = {str(dtype) for dtype in STORAGES.values()}
_SCRIPT_PREFIX = "__torch__."  # classes that TorchScript generates


def read_pickle(file: IO[bytes]) -> Any:
    """What one pickle describes, in dictionaries, lists, tuples, numbers, text and records.

    The file is left at the end of the pickle. Give one of bounded size: a pickle may be as long
    as its file.

    Raises:
        PickleError: the pickle names anything but tensors, or is damaged.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MAX_OPCODES:
                raise PickleError("more instructions than any checkpoint has")
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except PickleError:
        raise
    # What a malformed pickle leads to: wrong types, an empty stack, no such memo, bad text.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise PickleError(f"a damaged pickle ({error})") from error


class _Machine:
    """The stack, its marks and the memo, as `pickletools` describes them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4"
                | "FLOAT" | "BINFLOAT"
                | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
                | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
            ):  # fmt: skip
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                items = self._pop_mark()
                self.stack.append(tuple(items))
            case "APPEND":
                value = stack.pop()
                _expect(stack[-1], list).append(value)
            case "APPENDS":
                items = self._pop_mark()
                _expect(self.stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self._pop_mark()
                _set_items(self.stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_global(_expect(module, str), _expect(attribute, str)))
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(_expect(function, Global), _expect(arguments, tuple)))
            case "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_new(_expect(function, Global), _expect(arguments, tuple)))
            case "BUILD":
                state = _expect(stack.pop(), dict)
                if isinstance(stack[-1], ScriptModule):
                    stack[-1].attributes.update(state)
                else:
                    _expect(stack[-1], dict)  # a state dict's `_metadata`: versions of modules
            case _:
                raise PickleError(f"the instruction {name}, which torch never writes")

    def _pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise PickleError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    _expect(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        small = type(key) is int and abs(key) < _MAX_INT_KEY
        if not small and not isinstance(key, str):
            raise PickleError(f"a dictionary key of type {type(key).__name__}")
        if isinstance(key, str) and key in target:
            raise PickleError(f"the key {key!r} twice")
        target[key] = value


def _global(module: str, attribute: str) -> Global:
    name = f"{module}.{attribute}"
    if name in (*_CALLS, *STORAGES, *_DTYPES) or name.startswith(_SCRIPT_PREFIX):
        return Global(name)
    raise PickleError(
        f"{name}, which is no tensor: a pickle that wants it imported may run any code"
    )


def _storage(kind: Any, storage: Any, key: Any, _device: Any, numel: Any, *view: Any) -> Any:
    dtype = STORAGES.get(_expect(storage, Global).name)
    if kind != "storage" or dtype is None or view not in ((), (None,)):
        raise PickleError("a storage of an unknown kind")
    if type(numel) is not int or numel < 0:
        raise PickleError(f"a storage of {numel!r} values")
    return StorageRecord(_expect(key, str), dtype, numel)


def _call(function: Global, arguments: tuple[Any, ...]) -> Any:
    call = _CALLS.get(function.name)
    if call is None or (call is dict and arguments):
        raise PickleError(f"a call of {function.name}")
    return call(*arguments)


def _new(cls: Global, arguments: tuple[Any, ...]) -> ScriptModule:
    if not cls.name.startswith(_SCRIPT_PREFIX) or arguments:
        raise PickleError(f"an object of the class {cls.name}")
    return ScriptModule()
