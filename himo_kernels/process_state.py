"""Settings of the whole process that calls in several threads need at another value for a while."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Borrowed(Generic[T]):
    """A setting of the process: calls take it at a value of theirs, the last one out puts it back.

    Calls in several threads overlap in any order, so none of them may put back what it found: that
    can be the value of another call. The first one in keeps what the user set; where that serves
    as it is, nothing is written at all. What a thread of the user sets while a call is inside
    holds from then on, for that call too, and calls that come in take it for what the user set.
    With one exception: `value` itself is not told from that of the calls, and what was set before
    comes back.

    Args:
        value: what the calls need.
        read: returns what is in force.
        write: sets a value.
        serves: tells whether a value in force is as good as `value`.
        setting: returns what to write to get back to a value that is in force.
    """

    # One for all, as two settings may inherit the same one. Reentrant, as the handler of a signal
    # may call while its thread is in here.
    _lock = threading.RLock()

    def __init__(
        self,
        value: T,
        read: Callable[[], T],
        write: Callable[[T], None],
        *,
        serves: Callable[[T], bool],
        setting: Callable[[T], T] = lambda in_force: in_force,
    ) -> None:
        self._value, self._read, self._write = value, read, write
        self._serves, self._setting = serves, setting
        self._calls: set[object] = set()  # those inside: a set, so that to leave twice is to leave
        self._kept: list[T] = []  # what the user set, while it is not in force
        # A child has the settings of its parent, but none of the threads that would put them back.
        os.register_at_fork(
            before=self._lock.acquire,
            after_in_parent=self._lock.release,
            after_in_child=self._leave_in_child,
        )

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The setting serves inside, whatever other threads that borrow it do."""
        call = object()
        try:
            with self._lock:
                self._calls.add(call)
                if not self._serves(found := self._read()):
                    self._kept = [self._setting(found)]
                    self._write(self._value)
            yield
        finally:
            with self._lock:
                self._calls.discard(call)
                self._restore()

    def _restore(self) -> None:
        if self._kept and not self._calls:
            if self._read() == self._value:
                self._write(self._kept[0])
            self._kept = []

    def _leave_in_child(self) -> None:
        self._calls.clear()
        self._restore()
        self._lock.release()


def _precision(backend: str, operation: str = "matmul") -> str:
    return torch._C._get_fp32_precision_getter(backend, operation)


def _set_precision(backend: str, operation: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def _own_precision(backend: str, precision: str) -> str:
    """Returns the setting of matrix products themselves: "none" where they inherit `precision`.

    torch tells what is in force, not whose setting it is. One of the same value higher up is made
    exact for a moment, to see whether products follow it.
    """
    if _precision(backend, "all") != precision:
        return precision
    with _exact_where(precision, "generic"), _exact_where(precision, backend):
        return precision if _precision(backend) == precision else "none"


@contextmanager
def _exact_where(precision: str, backend: str) -> Iterator[None]:
    if _precision(backend, "all") != precision:
        yield
        return
    _set_precision(backend, "all", "ieee")
    try:
        yield
    finally:
        if _precision(backend, "all") == "ieee":  # else the user has set it meanwhile
            _set_precision(backend, "all", precision)


def _borrowed_precision(backend: str) -> Borrowed[str]:
    return Borrowed(
        "ieee",
        lambda: _precision(backend),
        lambda precision: _set_precision(backend, "matmul", precision),
        serves=lambda precision: precision in ("ieee", "none"),
        setting=lambda precision: _own_precision(backend, precision),
    )


# What torch calls the library that multiplies, by device. The setting of one is not the other's.
_PRECISIONS = {"cuda": _borrowed_precision("cuda"), "cpu": _borrowed_precision("mkldnn")}


@contextmanager
def full_float32(device: str) -> Iterator[None]:
    """Matrix products in float32 proper: neither autocast nor TF32 nor bfloat16 passes.

    The process's setting is written only where it allows one of those. Products of other threads
    on the device are exact too while one is inside. After the last call it is what the user set.
    """
    precision = _PRECISIONS["cuda" if device == "cuda" else "cpu"]
    with precision.lent(), torch.autocast(device, enabled=False):
        yield
