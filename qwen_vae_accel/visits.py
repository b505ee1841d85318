"""Who is inside: callers of a VAE, users of an engine. Nothing of it outlives an interrupt or a fork.

A signal handler may raise between any two instructions of Python code, also inside ``__enter__`` and ``__exit__`` of
context managers written in Python. The ``with`` statement on a lock of :mod:`threading` is different: its two ends are C,
and CPython runs no handler between the lock being taken and the block that gives it back. So a visit *is* such a lock.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Living(Generic[_T]):
    """Objects that are alive. Unlike a ``WeakSet`` it runs no Python code, which an interrupt would strike, as they die."""

    def __init__(self) -> None:
        self._references: set[weakref.ref[_T]] = set()

    def add(self, value: _T) -> None:
        """Have ``value`` among them for as long as it lives."""
        self._references.add(weakref.ref(value, self._references.discard))

    def __iter__(self) -> Iterator[_T]:
        for reference in list(self._references):
            value = reference()
            if value is not None:
                yield value


class Visits:
    """The visits under way, in the order in which they began. A visitor holds a lock of its own for as long as it stays::

        visit = threading.Lock()
        with visit:
            visits.enter(visit)
            ...
            visits.leave(visit)

    A visit whose lock is free is over, whether or not it came to :meth:`leave`. In a forked child, those of threads that
    stayed in the parent are over too.
    """

    def __init__(self) -> None:
        self._threads: dict[threading.Lock, int] = {}
        _visits.add(self)

    def enter(self, visit: threading.Lock, thread: int | None = None) -> None:
        """Count ``visit``, which is held, as one of ``thread`` (None: the current one)."""
        self._threads[visit] = threading.get_ident() if thread is None else thread

    def leave(self, visit: threading.Lock) -> None:
        """Forget ``visit``."""
        self._threads.pop(visit, None)

    def __iter__(self) -> Iterator[threading.Lock]:
        for visit in list(self._threads):
            if visit.locked():
                yield visit
            else:  # interrupted before it could leave
                self.leave(visit)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, visit: threading.Lock) -> bool:
        return visit in self._threads and visit.locked()

    def mine(self) -> bool:
        """Whether the current thread is inside."""
        thread = threading.get_ident()
        return any(self._threads.get(visit) == thread for visit in self)

    def wait(self) -> None:
        """Wait until the visits of other threads that are under way now are over."""
        thread = threading.get_ident()
        for visit in self:
            if self._threads.get(visit) != thread:
                with visit:
                    pass


def fork_safe_lock() -> threading.RLock:
    """A lock that is free in a forked child, whichever other thread of the parent held it."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def is_held_here(lock: Any) -> bool:
    """Whether the current thread holds ``lock``, one of :func:`fork_safe_lock`."""
    return bool(lock._is_owned())


_visits: Living[Visits] = Living()
_locks: Living[Any] = Living()


def _forked() -> None:
    thread = threading.get_ident()
    for visits in _visits:
        visits._threads = {visit: owner for visit, owner in visits._threads.items() if owner == thread}
    for lock in _locks:
        if not lock._is_owned():
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
