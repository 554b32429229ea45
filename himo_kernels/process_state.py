"""Process-wide settings that calls in several threads change temporarily."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager, nullcontext
from functools import partial
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Borrowed(Generic[T]):
    """A process-wide setting that calls change to `value`; the last active call restores it.

    Calls in several threads overlap in any order, so a call must not restore the value it found:
    another call may have written it. The first call saves the user's setting. If that setting
    serves, nothing is written. If a thread of the user changes the setting during a call, the new
    setting takes effect at once, for that call too, and later calls treat it as the user's. One
    exception: if the user sets `value` itself, it cannot be told from a call's write, and the
    earlier setting is restored.

    Args:
        value: the value that the calls need.
        read: returns the value in effect.
        write: sets a value.
        serves: returns whether a value in effect is as good as `value`.
        setting: returns the value to write to restore a value in effect.
    """

    # One lock for all, as two settings may inherit from the same one. Reentrant, as a signal
    # handler may call while its thread holds the lock.
    _lock = threading.RLock()
    # How often a thread has taken the lock to change settings, and given it back.
    _entered = _left = 0

    def __init__(
        self,
        value: T,
        read: Callable[[], T],
        write: Callable[[T], None],
        *,
        serves: Callable[[T], bool],
        setting: Callable[[T], T] = lambda in_effect: in_effect,
    ) -> None:
        self._value, self._read, self._write = value, read, write
        self._serves, self._setting = serves, setting
        # Active calls. A signal handler may raise before a call ends itself; it is garbage then.
        self._calls: set[weakref.ref[object]] = set()
        self._saved: list[T] = []  # the user's setting, while it is not in effect
        # A child inherits the settings, but not the threads that would restore them.
        os.register_at_fork(
            before=self._lock.acquire,
            after_in_parent=self._lock.release,
            after_in_child=self._leave_in_child,
        )

    def lent(self) -> "_Loan":
        """The setting serves inside, whatever other borrowing threads do."""
        return _Loan(self)

    def is_untouched(self) -> bool:
        """Returns whether the user's setting serves, so that no call changes it."""
        # Without the lock, because every small call comes here. The counts show that the value read
        # is the user's, and not one that a call had written meanwhile.
        entered = Borrowed._entered
        if entered == Borrowed._left and not self._saved and self._serves(self._read()):
            return entered == Borrowed._entered
        return False

    def _begin(self, call: object) -> bool:
        """Returns whether the call counts as active, so that it must end."""
        if self.is_untouched():
            return False
        with self._exclusively():
            self._calls.add(weakref.ref(call))
            if not self._serves(found := self._read()):
                self._saved = [self._setting(found)]
                self._write(self._value)
        return True

    def _end(self, call: object) -> None:
        with self._exclusively():
            self._calls.discard(weakref.ref(call))
            self._calls = {active for active in self._calls if active() is not None}
            self._restore()

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        with self._lock:
            Borrowed._entered += 1
            try:
                yield
            finally:
                Borrowed._left += 1

    def _restore(self) -> None:
        if self._saved and not self._calls:
            if self._read() == self._value:
                self._write(self._saved[0])
            self._saved = []

    def _leave_in_child(self) -> None:
        self._calls.clear()
        self._restore()
        self._lock.release()


class _Loan(ContextDecorator):
    # A class, not a generator: every small call enters one, and a generator takes twice as long.
    def __init__(self, setting: Borrowed[Any]) -> None:
        self._setting = setting

    def _recreate_cm(self) -> "_Loan":
        return _Loan(self._setting)  # a decorated function may call itself

    def __enter__(self) -> None:
        self._counts = self._setting._begin(self)

    def __exit__(self, *_: object) -> None:
        if self._counts:
            self._setting._end(self)


# (backend, operation), such as ("mkldnn", "matmul") -> the precision in effect.
_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter


def _set_precision(backend: str, operation: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def _own_precision(backend: str, precision: str) -> str:
    """Returns the setting of matmul itself: "none" if it inherits `precision`.

    torch returns the value in effect, not the level that set it. So parents with the same value are
    briefly set to "ieee", to see whether matmul follows them.
    """
    if _precision(backend, "all") != precision:
        return precision
    with _exact_where(precision, "generic"), _exact_where(precision, backend):
        return precision if _precision(backend, "matmul") == precision else "none"


@contextmanager
def _exact_where(precision: str, backend: str) -> Iterator[None]:
    if _precision(backend, "all") != precision:
        yield
        return
    _set_precision(backend, "all", "ieee")
    try:
        yield
    finally:
        if _precision(backend, "all") == "ieee":  # otherwise the user has changed it meanwhile
            _set_precision(backend, "all", precision)


def _borrowed_precision(backend: str) -> Borrowed[str]:
    return Borrowed(
        "ieee",
        partial(_precision, backend, "matmul"),
        lambda precision: _set_precision(backend, "matmul", precision),
        serves=frozenset({"ieee", "none"}).__contains__,
        setting=lambda precision: _own_precision(backend, precision),
    )


# torch's name for the matmul library of each device. Each has its own setting.
_PRECISIONS = {"cuda": _borrowed_precision("cuda"), "cpu": _borrowed_precision("mkldnn")}


def full_float32_matmuls(device: str) -> AbstractContextManager[None]:
    """Matmuls in full float32, apart from autocast: no TF32, no bfloat16 passes.

    The process-wide setting is changed only if it allows one of these. Meanwhile the matmuls of
    other threads on the device are full float32 too. The last call restores the user's setting.
    """
    return _PRECISIONS["cuda" if device == "cuda" else "cpu"].lent()


def matmuls_are_full_float32(device: str) -> bool:
    """Returns whether they are without `full_float32_matmuls`, and stay so while calls overlap."""
    return _PRECISIONS["cuda" if device == "cuda" else "cpu"].is_untouched()


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Disables autocast inside. Costs nothing if it is not enabled."""
    if device != "meta" and torch.is_autocast_enabled(device):  # meta tensors know no autocast
        return torch.autocast(device, enabled=False)
    return nullcontext()


@contextmanager
def full_float32(device: str) -> Iterator[None]:
    """`full_float32_matmuls` without autocast."""
    with full_float32_matmuls(device), without_autocast(device):
        yield
