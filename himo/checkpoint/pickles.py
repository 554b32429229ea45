"""Reads the pickles that torch writes as data: nothing in them is imported, called or built.

A pickle is a program for a machine that can call any function. This is a machine that cannot:
a global becomes its name, and the few names that a checkpoint of tensors is made of become
records of what they describe. What any other name would build becomes an `Object`, which is left
alone: a training script keeps its settings and its numbers beside the tensors. Hence neither
`pickle` nor `torch.load` is needed, nor trusted: that is why it is written by hand.

What a few bytes can describe may be large beyond measure, a tuple that holds itself twice a hundred
times over. So nothing here is hashed, compared or shown but text and small numbers.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from himo.checkpoint.safetensors_files import MAX_DIMENSIONS
from himo.errors import quoted

# Keys of dictionaries: text, and the small integers by which optimizer states number their
# parameters. Under any other is nothing that a checkpoint of tensors is read for.
_MAX_INT_KEY = 1 << 31
_MAX_OPCODES = 250_000  # a second; a thousand tensors take 30,000
_MAX_NUMBER = 1 << 48  # of a shape, a stride or an offset

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
    """What a pickle holds is not data, or is damaged."""


@dataclass(frozen=True)
class Global:
    """A name, `module.attribute`, that a pickle wants looked up. It is not."""

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class StorageRecord:
    """A run of numel values of one dtype, found under key."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False, slots=True)
class TensorRecord:
    """A strided tensor; offset and strides count values of the storage. Not checked against it."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Object:
    """What a name would build: its items and attributes, as far as they are text and a value."""

    name: str
    attributes: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_script_module(self) -> bool:
        """Whether it is a module of a TorchScript archive; its attributes are without its code."""
        return self.name.startswith("__torch__.")  # classes that TorchScript generates


def _record_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_requires_grad_and_hooks: Any
) -> TensorRecord | Object:
    if isinstance(storage, Object):  # of a dtype that no weight has
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
# Modules of which no setting or number is made. Nothing is called whatever the name is; but a file
# that asks for these was made to run code in other readers, and its user should hear of it.
_CODE = frozenset({
    "asyncio", "code", "codeop", "commands", "ctypes", "importlib", "multiprocessing", "nt", "os",
    "pdb", "pickle", "pip", "popen2", "posix", "pty", "runpy", "shutil", "socket", "subprocess",
    "sys", "timeit", "webbrowser",
})  # fmt: skip
# Of `builtins`, where eval and getattr are, only what holds values.
_BUILTINS = frozenset({
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object",
    "long", "range", "set", "slice", "str", "tuple", "unicode", "xrange",
})  # fmt: skip


def read_pickle(
    file: IO[bytes],
    storages: dict[str, StorageRecord] | None = None,
    most: int = _MAX_OPCODES,
) -> Any:
    """What one pickle describes, in dictionaries, lists, tuples, numbers, text and records.

    The file is left at the end of the pickle. Give one of bounded size: a pickle may be as long
    as its file.

    Args:
        file: where the pickle begins.
        storages: is given every storage that the pickle names, by its key.
        most: instructions that it may have.

    Raises:
        PickleError: the pickle asks for code to be run, or is damaged.
    """
    machine = _Machine({} if storages is None else storages)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > most:
                raise PickleError("more instructions than any checkpoint has")
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except PickleError:
        raise
    # What a malformed pickle leads to: wrong types, an empty stack, no such memo, bad text.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        cause = quoted(str(error)) if str(error) else type(error).__name__
        raise PickleError(f"a damaged pickle ({cause})") from error


class _Machine:
    """The stack, its marks and the memo, as `pickletools` describes them."""

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
            case "EMPTY_LIST" | "EMPTY_SET":  # a set as a list: its items are not hashed
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE" | "FROZENSET":
                items = self._pop_mark()
                self.stack.append(tuple(items))
            case "APPEND":
                value = stack.pop()
                _append(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                items = self._pop_mark()
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
            case "NEWOBJ":
                _, function = stack.pop(), stack.pop()
                stack.append(_new(_expect(function, Global)))
            case "NEWOBJ_EX":
                _, _, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(_new(_expect(function, Global)))
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
        if kind == "module":  # a class of torch's flat format, with its source, which is not read
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
    if not isinstance(target, Object):  # whose items, if it is a list of some kind, nobody reads
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
    else:  # a state dict's `_metadata`, the versions of its modules
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
    call = _CALLS.get(cls.name)
    return {} if call is _ordered_dict else Object(cls.name)
