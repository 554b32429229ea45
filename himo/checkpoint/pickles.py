"""Reads the pickles of torch as data: nothing in them is imported, called or built.

A pickle is a program for a stack machine that can call any function. The machine here can call
none, which is why neither `pickle` nor `torch.load` is used. A global becomes its name. The few
names that describe tensors become records. Any other name becomes an `Object`, which is ignored:
training scripts store settings and numbers with the tensors.

A few bytes can describe a value of any size: a tuple that holds itself twice, a hundred times over.
So only text and small numbers are hashed, compared or shown.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from himo.checkpoint.safetensors_files import MAX_DIMENSIONS
from himo.errors import quoted

# Keys of dictionaries are text, or the small integers by which optimizer states number parameters.
# Other keys are ignored.
_MAX_INT_KEY = 1 << 31
_MAX_OPCODES = 250_000  # a second; a thousand tensors take 30,000
_MAX_NUMBER = 1 << 48  # in a shape, a stride or an offset

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
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}

REMEDY = "torch.save(model.state_dict(), PATH), where the model is, writes a file that is read"


class PickleError(ValueError):
    """A pickle holds more than data, or is damaged."""


@dataclass(frozen=True)
class Global:
    """A name, `module.attribute`, that a pickle wants imported. It is not."""

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class StorageRecord:
    """A run of numel values of one dtype, found under key."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False, slots=True)
class TensorRecord:
    """A strided tensor. Offset and strides count values of the storage and may reach beyond it."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Object:
    """An instance of a class that is not built: its items and attributes under keys of text."""

    name: str
    attributes: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_script_module(self) -> bool:
        """Whether it is a module of a TorchScript archive, whose classes have generated names."""
        return self.name.startswith("__torch__.")


def _record_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_requires_grad_and_hooks: Any
) -> TensorRecord | Object:
    if isinstance(storage, Object):  # a dtype that no weight has
        return storage
    if (
        not isinstance(storage, StorageRecord)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or not len(size) == len(stride) <= MAX_DIMENSIONS
        or any(type(x) is not int or not 0 <= x < _MAX_NUMBER for x in (offset, *size, *stride))
    ):
        raise PickleError("a tensor with an impossible storage, shape or stride")
    return TensorRecord(storage, offset, size, stride)


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    return _call(_expect(function, Global), _expect(arguments, tuple))


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    content: dict[Any, Any] = {}
    for pair in _expect(pairs, list | tuple):
        _set_items(content, [*_expect(pair, list | tuple)])
    return content


def _first(value: Any, *_others: Any) -> Any:
    return value


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _record_tensor,
    "torch._utils._rebuild_tensor": _record_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _first,
    # Attributes of TorchScript modules other than tensors.
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
}
# Modules that hold no type of settings or numbers. Nothing is called whatever the name is, but a
# file that names these was made to run code in other readers, and its user should know.
_CODE = frozenset({
    "asyncio", "code", "codeop", "commands", "ctypes", "importlib", "multiprocessing", "nt", "os",
    "pdb", "pickle", "pip", "popen2", "posix", "pty", "runpy", "shutil", "socket", "subprocess",
    "sys", "timeit", "webbrowser",
})  # fmt: skip
# The names of `builtins` that hold values; eval and getattr are there too.
_BUILTINS = frozenset({
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object",
    "long", "range", "set", "slice", "str", "tuple", "unicode", "xrange",
})  # fmt: skip


def read_pickle(
    file: IO[bytes],
    storages: dict[str, StorageRecord] | None = None,
    most: int = _MAX_OPCODES,
) -> Any:
    """The content of one pickle as dictionaries, lists, tuples, numbers, text and records.

    Reads to the end of the pickle, which may be as long as the file: bound the file's size.

    Args:
        file: its position is the start of the pickle.
        storages: receives every storage that the pickle names, by its key.
        most: the largest number of instructions.

    Raises:
        PickleError: the pickle asks for code to be run, or is damaged.
    """
    machine = _Machine({} if storages is None else storages)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > most:
                raise PickleError(f"more instructions than any checkpoint has; {REMEDY}")
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except PickleError:
        raise
    # A malformed pickle leads to these: wrong types, an empty stack, a missing memo, bad text.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        cause = quoted(str(error)) if str(error) else type(error).__name__
        raise PickleError(f"a damaged pickle ({cause})") from error


class _Machine:
    """The stack, its marks and the memo that `pickletools` describes."""

    def __init__(self, storages: dict[str, StorageRecord]) -> None:
        self.storages = storages
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
                | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
                | "STRING" | "BINSTRING" | "SHORT_BINSTRING"
            ):  # fmt: skip
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":  # a set is a list here: its items are not hashed
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE" | "FROZENSET":
                items = self._pop_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [stack.pop()] if name == "APPEND" else self._pop_mark()
                _append(self.stack[-1], items)
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
                stack.append(self._persistent(*_expect(stack.pop(), tuple)))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(_expect(function, Global), _expect(arguments, tuple)))
            case "NEWOBJ" | "NEWOBJ_EX":
                *_, cls = [stack.pop() for _ in range(2 if name == "NEWOBJ" else 3)]
                stack.append(_new(_expect(cls, Global)))
            case "BUILD":
                _build(stack[-2], stack.pop())
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case _:
                raise PickleError(f"the instruction {name}, which torch never writes")

    def _persistent(self, kind: Any, first: Any, *others: Any) -> Any:
        if kind == "module":  # a class in torch's flat format, with its source
            return _expect(first, Global)
        return self._storage(kind, first, *others)

    def _storage(
        self, kind: Any, storage: Any, key: Any, _device: Any, numel: Any, *view: Any
    ) -> StorageRecord | Object:
        name = _expect(storage, Global).name
        if kind != "storage" or view not in ((), (None,)):
            raise PickleError("a storage of an unknown kind")
        if type(numel) is not int or not 0 <= numel < _MAX_NUMBER:
            raise PickleError(f"a storage of {quoted(numel)} values")
        if name not in STORAGES:
            return Object(name)
        record = StorageRecord(_expect(key, str), STORAGES[name], numel)
        self.storages[record.key] = record
        return record

    def _pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", "container")
        raise PickleError(f"a {type(value).__name__} where a {expected} belongs")
    return value


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, Object):  # the items of an Object are not used
        _expect(target, list).extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
    content = target.attributes if isinstance(target, Object) else _expect(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str) and key in content:
            raise PickleError(f"the key {quoted(key)} twice")
        if isinstance(key, str) or (type(key) is int and abs(key) < _MAX_INT_KEY):
            content[key] = value


def _build(target: Any, state: Any) -> None:
    if isinstance(target, Object):
        if isinstance(state, dict):
            target.attributes.update(state)
    else:  # the state is a state dict's `_metadata`, the versions of its modules
        _expect(target, dict | list)


def _global(module: str, attribute: str) -> Global:
    root, *path = module.partition(".")[0], *attribute.split(".")
    name = f"{module}.{attribute}"
    hidden = root in ("builtins", "__builtin__") and path[0] not in _BUILTINS
    if hidden or not _CODE.isdisjoint((root, *path[:-1])):
        raise PickleError(
            f"{quoted(name)}: a pickle that wants it imported may run any code; {REMEDY}"
        )
    return Global(name)


def _call(function: Global, arguments: tuple[Any, ...]) -> Any:
    call = _CALLS.get(function.name)
    return call(*arguments) if call is not None else Object(function.name)


def _new(cls: Global) -> Any:
    return {} if _CALLS.get(cls.name) is _ordered_dict else Object(cls.name)
