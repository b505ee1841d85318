"""Which engines are in memory: who uses one, who waits for one, and what makes room.

Residency is counted by size name: the encoder and the decoder of one size are a pair. While an engine is in use it is
never released; who needs room waits, first come, first served. One thread loads an engine, others that want the same one
wait for it. What a thread has taken here it has as a visit (see :mod:`qwen_vae_accel.visits`), so that an interrupt at any
point leaves nothing taken.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from qwen_vae_accel.backends.base import Program
from qwen_vae_accel.engines.manifest import EngineRecord
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import EngineError
from qwen_vae_accel.journal import Journal
from qwen_vae_accel.visits import Visits, fork_safe_lock

logger = logging.getLogger(__name__)

# Seconds after which a waiting thread looks again even if nobody rang: an interrupt may have struck whoever should have.
_LOOK = 0.1


@dataclass(slots=True, eq=False)
class Resident:
    """An engine in memory, or on its way there (no program yet).

    Attributes:
        wanted: which engine it is.
        estimate: bytes that it takes, or will take.
        users: who uses it; while it has no program, the one that loads it.
        program: what runs it.
        record: of the bytes that were loaded.
        checked: names of the profiles whose self-check it has passed.
        refused: whether it failed a self-check, and goes when its last user does.
    """

    wanted: Wanted
    estimate: int
    users: Visits = field(default_factory=Visits)
    program: Program | None = None
    record: EngineRecord | None = None
    checked: set[str] = field(default_factory=set)
    refused: bool = False


@dataclass(slots=True, eq=False)
class _Waiter:
    """A thread that waits for an engine, until ``resident`` is the one that it was given."""

    wanted: Wanted
    visit: threading.Lock
    thread: int
    bell: threading.Lock
    resident: Resident | None = None


class Residency:
    """The engines of one directory that are in memory.

    Args:
        store: the engine directory, which knows how large an engine is before it is loaded.
        journal: told of each release.
        max_resident: sizes that may be loaded at once; None: no limit.
        budget: bytes that loaded engines may take together.
    """

    def __init__(self, store: EngineStore, journal: Journal, max_resident: int | None, budget: int) -> None:
        self._store = store
        self._journal = journal
        self._max_resident = max_resident
        self._budget = budget
        self._lock = fork_safe_lock()
        self._residents: OrderedDict[Wanted, Resident] = OrderedDict()
        self._queue: list[_Waiter] = []
        self._waiting = Visits()

    def take(self, wanted: Wanted, visit: threading.Lock) -> tuple[Resident, bool]:
        """Wait until the engine may be used, and use it until :meth:`leave`.

        Args:
            wanted: the engine.
            visit: a lock that the caller holds for as long as it uses the engine.

        Returns:
            The engine, and whether the caller has to load it: then :meth:`loaded` or :meth:`abandon` must follow.

        Raises:
            EngineError: if the current thread uses another engine already, and there is no room beside it.
        """
        with self._lock:
            resident = self._residents.get(wanted)
            if resident is not None and resident.program is not None and (not self._queue or self._inside()):
                resident.users.enter(visit)
                self._residents.move_to_end(wanted)
                return resident, False
        bell = threading.Lock()
        bell.acquire()
        waiter = _Waiter(wanted, visit, threading.get_ident(), bell)
        try:
            self._waiting.enter(visit)
            with self._lock:
                self._queue.append(waiter)
            while True:
                with self._lock:
                    taken = self._admit(waiter)
                if taken is not None:
                    return taken
                bell.acquire(timeout=_LOOK)
        finally:
            self._waiting.leave(visit)
            with self._lock:
                self._queue[:] = [other for other in self._queue if other is not waiter]
                self._ring()

    def loaded(self, resident: Resident, program: Program) -> None:
        """Keep the program of an engine that was taken to be loaded. Whoever waits for it has it at once."""
        with self._lock:
            resident.estimate = program.nbytes
            resident.program = program
            for waiter in self._queue:
                if waiter.wanted == resident.wanted and waiter.resident is None:
                    resident.users.enter(waiter.visit, waiter.thread)
                    waiter.resident = resident
            self._ring()

    def abandon(self, resident: Resident) -> None:
        """Give up an engine that was taken to be loaded and could not be. Whoever waits for it may try."""
        with self._lock:
            if self._residents.get(resident.wanted) is resident:
                del self._residents[resident.wanted]
            self._ring()

    def leave(self, resident: Resident, visit: threading.Lock) -> None:
        """End what :meth:`take` began; the caller holds no reference to the program any more."""
        resident.users.leave(visit)
        if resident.refused or self._queue:
            with self._lock:
                if resident.refused and not resident.users and self._residents.get(resident.wanted) is resident:
                    self._release(resident.wanted)
                self._ring()

    def paths(self) -> list[str]:
        """The paths of the engines that are loaded now, below the engine directory."""
        with self._lock:
            return [wanted.path for wanted, resident in self._residents.items() if resident.program is not None]

    def release(self) -> None:
        """Release every engine, after waiting for those that other threads use.

        Raises:
            EngineError: if the current thread uses one.
        """
        while True:
            with self._lock:
                for wanted, resident in list(self._residents.items()):
                    if not resident.users:
                        self._release(wanted)
                if not self._residents:
                    return
                if self._inside():
                    raise EngineError("engines cannot be released inside a call that uses one")
                used = [resident.users for resident in self._residents.values()]
            for users in used:
                users.wait()

    # Under the lock.

    def _admit(self, waiter: _Waiter) -> tuple[Resident, bool] | None:
        """The answer of :meth:`take`, or None while it is not this thread's turn or there is no room."""
        self._queue[:] = [other for other in self._queue if other.visit in self._waiting]
        for wanted, other in list(self._residents.items()):
            if other.program is None and not other.users:
                self._release(wanted)
        if waiter.resident is not None:
            return waiter.resident, False
        resident = self._residents.get(waiter.wanted)
        if resident is not None and resident.program is None:
            return None
        inside = self._inside()
        if not inside and any(self._is_for_room(other) for other in self._before(waiter)):
            return None
        if resident is None:
            self._release_stale(waiter.wanted)
            estimate = self._store.size(waiter.wanted.path)
            if not self._make_room(waiter.wanted.key.name, estimate):
                if inside:
                    raise EngineError(f"there is no room for {waiter.wanted.path} inside a call that uses another engine")
                return None
            resident = self._residents[waiter.wanted] = Resident(waiter.wanted, estimate)
        resident.users.enter(waiter.visit)
        self._residents.move_to_end(waiter.wanted)
        return resident, resident.program is None

    def _before(self, waiter: _Waiter) -> list[_Waiter]:
        return self._queue[: self._queue.index(waiter)]

    def _is_for_room(self, waiter: _Waiter) -> bool:
        """Whether a thread waits for others to be done, and not for an engine that is on its way."""
        resident = self._residents.get(waiter.wanted)
        return waiter.resident is None and (resident is None or resident.program is not None)

    def _inside(self) -> bool:
        """Whether the current thread uses an engine already: it must not wait for those who wait for it."""
        return any(resident.users.mine() for resident in self._residents.values())

    def _ring(self) -> None:
        for waiter in self._queue:
            if waiter.bell.locked():
                waiter.bell.release()

    def _release_stale(self, wanted: Wanted) -> None:
        """Release the engine of the same file over weights that the VAE no longer has."""
        for other, resident in list(self._residents.items()):
            if wanted.replaces(other) and not resident.users:
                self._release(other)

    def _make_room(self, name: str, nbytes: int) -> bool:
        """Release the least recently used engines until one more fits; False if all that could go are in use."""
        while True:
            names = {wanted.key.name for wanted in self._residents} | {name}
            crowded = self._max_resident is not None and len(names) > self._max_resident
            full = sum(resident.estimate for resident in self._residents.values()) + nbytes > self._budget
            others = [wanted for wanted in self._residents if not (crowded and wanted.key.name == name)]
            if not (crowded or full) or not others:
                return True
            victim = next((wanted for wanted in others if not self._residents[wanted].users), None)
            if victim is None:
                return False
            self._release(victim)

    def _release(self, wanted: Wanted) -> None:
        if wanted.device.type == "cuda":
            torch.cuda.synchronize(wanted.device)
        resident = self._residents.pop(wanted)
        if resident.program is None:  # whoever loaded it was interrupted
            return
        alive = weakref.ref(resident.program)
        resident.program = None
        if alive() is not None:
            gc.collect()  # takes a third of a second beside a whole pipeline: only where a cycle or a traceback holds it
        if wanted.device.type == "cuda":
            torch.cuda.empty_cache()
        self._journal.evict()
        logger.info("released engine %s", wanted.path)
