"""The lazy runtime: engines are found, checked, built and loaded at their first request, and released when others need room.

Residency is counted by size name: the encoder and the decoder of one size are a pair. While an engine is in use it is
never released; who needs room waits, first come, first served. One thread loads an engine, others that want the same one
wait for it. What a thread has taken here it has as a visit (see :mod:`qwen_vae_accel.visits`), so that an interrupt at any
point leaves nothing taken.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qwen_vae_accel.backends.base import EngineBackend, EngineImage, Environment, Job, Program
from qwen_vae_accel.engines import networkcheck, selfcheck
from qwen_vae_accel.engines.expected import Expected
from qwen_vae_accel.engines.manifest import EngineRecord, Verification, check_name
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.errors import BuildError, EngineError, EngineRefusedError
from qwen_vae_accel.journal import EngineLoad, Journal
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.source import build_model
from qwen_vae_accel.plan import Choice, EngineKey, Profile
from qwen_vae_accel.visits import Visits, fork_safe_lock

logger = logging.getLogger(__name__)


# path below the engine directory, compute dtype, device, fingerprint of the weights
_SlotKey = tuple[str, torch.dtype, torch.device, str]


# Seconds after which a waiting thread looks again even if nobody rang: an interrupt may have struck whoever should have.
_LOOK = 0.1


@dataclass(slots=True, eq=False)
class _Slot:
    """An engine in memory, or on its way there (no program yet).

    Attributes:
        name: of its size.
        estimate: bytes that it takes, or will take.
        users: who uses it; while it has no program, the one that loads it.
        program: what runs it.
        record: of the bytes that were loaded.
        checked: profiles whose self-check it has passed.
        refused: it failed a self-check, and goes when its last user does.
    """

    name: str
    estimate: int
    users: Visits = field(default_factory=Visits)
    program: Program | None = None
    record: EngineRecord | None = None
    checked: set[str] = field(default_factory=set)
    refused: bool = False


@dataclass(slots=True, eq=False)
class _Waiter:
    """A thread that waits for an engine, until ``slot`` is the one that it was given."""

    key: _SlotKey
    visit: threading.Lock
    thread: int
    bell: threading.Lock
    slot: _Slot | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """An engine with the job it is to do and the fingerprint of the weights it must hold."""

    backend: EngineBackend
    job: Job
    key: EngineKey
    weights: str

    @property
    def path(self) -> str:
        """Path below the engine directory."""
        return self.key.stem + self.backend.suffix


class EngineRuntime:
    """Engines of one directory for one VAE.

    Args:
        store: the engine directory.
        source: the VAE's networks, for fingerprints, builds and self-checks.
        journal: told of loads, builds and releases.
        max_resident: sizes that may be loaded at once; None: no limit.
        budget: bytes that loaded engines may take together.
        verify: whether engines are checked before their first use on this machine.
        detect: gives the environment of a device.
        verify_networks: whether what a compiler is handed is checked in place of the engine that it builds, which is for
            another machine.
    """

    def __init__(
        self,
        store: EngineStore,
        source: ModelSource,
        journal: Journal,
        max_resident: int | None,
        budget: int,
        verify: bool,
        detect: Callable[[torch.device], Environment],
        verify_networks: bool = False,
    ) -> None:
        self.store = store
        self._source = source
        self._journal = journal
        self._max_resident = max_resident
        self._budget = budget
        self._verify = verify
        self._detect = detect
        self._verify_networks = verify_networks
        self._lock = fork_safe_lock()
        self._slots: OrderedDict[_SlotKey, _Slot] = OrderedDict()
        self._queue: list[_Waiter] = []
        self._waiting = Visits()
        # Self-checks that were passed, by content: sha256 of the file, device, dtype, fingerprint of the weights, profile.
        self._good: set[tuple[str, torch.device, torch.dtype, str, str]] = set()
        self._checking = fork_safe_lock()

    @contextmanager
    def use(self, wanted: Wanted, choice: Choice, visit: threading.Lock) -> Iterator[Program]:
        """The program of an engine, loaded if it is not; it stays loaded at least until the block ends.

        Args:
            wanted: the engine.
            choice: the profile of it that is to be run.
            visit: a lock that the caller holds around the block, ``with visit, runtime.use(..., visit) as program``: the
                engine is in use while it is held, whatever instruction an interrupt strikes.

        Raises:
            EngineMissingError, EngineRefusedError, EngineError: if there is no usable engine; nothing is loaded then.
        """
        slot_key = (wanted.path, wanted.job.dtype, wanted.job.device, wanted.weights)
        program: Program | None = None
        slot, mine = self._take(slot_key, wanted, visit)
        try:
            if mine:
                self._fill(slot, slot_key, wanted)
            program = slot.program
            assert program is not None
            if self._verify and choice.profile.name not in slot.checked:
                try:
                    self._check(wanted, choice.profile, program, slot)
                except EngineRefusedError:
                    slot.refused = True
                    raise
            yield program
        finally:
            program = None
            slot.users.leave(visit)
            if slot.refused or self._queue:
                with self._lock:
                    if slot.refused and not slot.users and self._slots.get(slot_key) is slot:
                        self._release(slot_key)
                    self._ring()

    def _fill(self, slot: _Slot, slot_key: _SlotKey, wanted: Wanted) -> None:
        try:
            program, slot.record = self._load(wanted)
            with self._lock:
                slot.estimate = program.nbytes
                slot.program = program
                # Whoever waits for this engine has it at once, so that while they wait it is loaded no second time.
                for waiter in self._queue:
                    if waiter.key == slot_key and waiter.slot is None:
                        slot.users.enter(waiter.visit, waiter.thread)
                        waiter.slot = slot
                self._ring()
        except BaseException:
            with self._lock:
                if self._slots.get(slot_key) is slot:
                    del self._slots[slot_key]
                self._ring()
            raise

    def _take(self, slot_key: _SlotKey, wanted: Wanted, visit: threading.Lock) -> tuple[_Slot, bool]:
        """A slot in use by the caller, and whether the caller has to load it."""
        with self._lock:
            loaded = self._slots.get(slot_key)
            if loaded is not None and loaded.program is not None and (not self._queue or self._inside()):
                loaded.users.enter(visit)
                self._slots.move_to_end(slot_key)
                return loaded, False
        bell = threading.Lock()
        bell.acquire()
        waiter = _Waiter(slot_key, visit, threading.get_ident(), bell)
        try:
            self._waiting.enter(visit)
            with self._lock:
                self._queue.append(waiter)
            while True:
                with self._lock:
                    taken = self._admit(waiter, wanted)
                if taken is not None:
                    return taken
                bell.acquire(timeout=_LOOK)
        finally:
            self._waiting.leave(visit)
            with self._lock:
                self._queue[:] = [other for other in self._queue if other is not waiter]
                self._ring()

    def _admit(self, waiter: _Waiter, wanted: Wanted) -> tuple[_Slot, bool] | None:
        """What :meth:`_take` returns, or None while it is not this thread's turn or there is no room."""
        self._queue[:] = [other for other in self._queue if other.visit in self._waiting]
        for key, other in list(self._slots.items()):
            if other.program is None and not other.users:
                self._release(key)
        if waiter.slot is not None:
            return waiter.slot, False
        slot = self._slots.get(waiter.key)
        if slot is not None and slot.program is None:
            return None
        inside = self._inside()
        if not inside and any(self._is_for_room(other) for other in self._before(waiter)):
            return None
        if slot is None:
            self._release_stale(waiter.key)
            estimate = self.store.size(wanted.path)
            if not self._make_room(wanted.key.name, estimate):
                if inside:
                    raise EngineError(f"there is no room for {wanted.path} inside a call that uses another engine")
                return None
            slot = self._slots[waiter.key] = _Slot(wanted.key.name, estimate)
        slot.users.enter(waiter.visit)
        self._slots.move_to_end(waiter.key)
        return slot, slot.program is None

    def _before(self, waiter: _Waiter) -> list[_Waiter]:
        return self._queue[: self._queue.index(waiter)]

    def _is_for_room(self, waiter: _Waiter) -> bool:
        """Whether a thread waits for others to be done, and not for an engine that is on its way."""
        slot = self._slots.get(waiter.key)
        return waiter.slot is None and (slot is None or slot.program is not None)

    def _inside(self) -> bool:
        """Whether the current thread uses an engine already: it must not wait for those who wait for it."""
        return any(slot.users.mine() for slot in self._slots.values())

    def _ring(self) -> None:
        for waiter in self._queue:
            if waiter.bell.locked():
                waiter.bell.release()

    def _release_stale(self, wanted: _SlotKey) -> None:
        """Release the engine of the same path over weights that the VAE no longer has."""
        for key, slot in list(self._slots.items()):
            if key[:3] == wanted[:3] and not slot.users:
                self._release(key)

    def _make_room(self, name: str, nbytes: int) -> bool:
        """Release the least recently used engines until one more fits; False if all that could go are in use."""
        while True:
            names = {slot.name for slot in self._slots.values()} | {name}
            crowded = self._max_resident is not None and len(names) > self._max_resident
            full = sum(slot.estimate for slot in self._slots.values()) + nbytes > self._budget
            others = [key for key, slot in self._slots.items() if not (crowded and slot.name == name)]
            if not (crowded or full) or not others:
                return True
            victim = next((key for key in others if not self._slots[key].users), None)
            if victim is None:
                return False
            self._release(victim)

    def _release(self, slot_key: _SlotKey) -> None:
        device = slot_key[2]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        slot = self._slots.pop(slot_key)
        if slot.program is None:  # whoever loaded it was interrupted
            return
        alive = weakref.ref(slot.program)
        slot.program = None
        if alive() is not None:
            gc.collect()  # takes a third of a second beside a whole pipeline: only where a cycle or a traceback holds it
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self._journal.evict()
        logger.info("released engine %s", slot_key[0])

    def expected(self, wanted: Wanted) -> Expected:
        """What the engine of ``wanted`` must be to be run here."""
        job = wanted.job
        return Expected.of(wanted.backend, wanted.key, job.dtype, wanted.weights, self._detect(job.device))

    def _load(self, wanted: Wanted) -> tuple[Program, EngineRecord]:
        start = time.perf_counter()
        image, record = self.store.load(self.expected(wanted))
        program = self._open(wanted, image)
        ms = (time.perf_counter() - start) * 1e3
        self._journal.load(EngineLoad(wanted.path, wanted.backend.name, ms, program.nbytes))
        logger.info("loaded engine %s in %.1f ms", image.path, ms)
        return program, record

    def _open(self, wanted: Wanted, image: EngineImage) -> Program:
        try:
            return wanted.backend.load(image, wanted.job, wanted.key)
        except Exception as error:
            raise EngineRefusedError(str(image.path), [f"{wanted.backend.name} cannot load it: {error}"]) from error

    # Self-checks.

    def _check(self, wanted: Wanted, profile: Profile, program: Program, slot: _Slot) -> None:
        """Refuse a program whose self-check failed; run the check where these bytes have no result on this machine yet."""
        with self._checking:
            if profile.name in slot.checked:
                return
            record = slot.record
            assert record is not None
            content = (record.sha256, wanted.job.device, wanted.job.dtype, wanted.weights, profile.name)
            machine = selfcheck.machine_id(self._detect(wanted.job.device))
            name = check_name(machine, profile)
            result = record.verification.get(name)
            if result is None and content not in self._good:
                start = time.perf_counter()
                result = record.verification[name] = self.run_check(wanted, profile, program, machine)
                self._journal.verify(wanted.path, (time.perf_counter() - start) * 1e3)
                scratch = wanted.backend.scratch(program)
                self.store.record_verification(wanted.path, record.sha256, name, result, scratch)
            if result is not None:
                self._judge(wanted, profile, result)
            self._good.add(content)
            slot.checked.add(profile.name)

    def run_check(self, wanted: Wanted, profile: Profile, program: Program, machine: str) -> Verification:
        """Run the self-check of one profile now.

        Raises:
            EngineRefusedError: if the program does not get through it.
        """
        index = wanted.key.profiles.index(profile)
        try:
            return selfcheck.check(self._source, wanted.job, program, profile.optimum, index, machine)
        except Exception as error:
            difference = f"its self-check at {profile.optimum} does not run: {error}"
            raise EngineRefusedError(str(self.store.root / wanted.path), [difference]) from error

    def _judge(self, wanted: Wanted, profile: Profile, result: Verification) -> None:
        if not result.passed:
            difference = f"self-check failed at {profile.optimum} against the exact network: {result.errors()} ({result.at})"
            raise EngineRefusedError(str(self.store.root / wanted.path), [difference])

    # Building.

    def build(self, wanted: Wanted) -> EngineRecord:
        """Build an engine unless a usable one is there that passed its self-checks here; it is checked before it is published.

        Raises:
            BuildError: if the backend failed or the directory cannot be written; what was there before is there still.
            EngineRefusedError: if the new engine failed its self-check.
        """
        environment = self._detect(wanted.job.device)
        expected = self.expected(wanted)
        elapsed = math.nan

        def make(path: Path) -> EngineRecord:
            nonlocal elapsed
            start = time.perf_counter()
            # Contiguous copies of its own: what is compiled must not depend on views into the VAE.
            state = {
                name: value.to(wanted.job.device, wanted.job.dtype, copy=True).contiguous()
                for name, value in self._source.state(wanted.job.method).items()
            }
            try:
                model = build_model(state, wanted.job.method)
                scratch = wanted.backend.build(model, wanted.job, wanted.key, path)
            except OSError:
                raise
            except Exception as error:
                raise BuildError(f"{wanted.backend.name} failed to build {wanted.path}: {error}") from error
            elapsed = time.perf_counter() - start
            return expected.record(environment, sha256="", size=0, build_seconds=round(elapsed, 3), scratch=scratch)

        def accept(image: EngineImage, record: EngineRecord) -> EngineRecord:
            network = wanted.backend.take_network() if self._verify_networks else None
            if network is not None:
                checks = networkcheck.check(self._source, wanted.job, wanted.key, network, self.store.root / wanted.path)
                record.verification.update(checks)
                logger.info("%s: %s", wanted.path, "; ".join(map(networkcheck.text, checks.values())))
            if not self._verify:
                return record
            program = self._open(wanted, image)
            machine = selfcheck.machine_id(environment)
            # The other profiles of an engine are checked at their first request.
            profile = min(wanted.key.profiles, key=lambda p: p.optimum.width * p.optimum.height)
            result = self.run_check(wanted, profile, program, machine)
            self._judge(wanted, profile, result)
            record.verification[check_name(machine, profile)] = result
            return dataclasses.replace(record, scratch=wanted.backend.scratch(program) or record.scratch)

        here = selfcheck.machine_id(environment) + "/"

        def stands(record: EngineRecord) -> bool:
            return all(result.passed for name, result in record.verification.items() if name.startswith(here))

        _, record = self.store.build(expected, make, accept, stands if self._verify else None)
        if not math.isnan(elapsed):
            self._journal.build(wanted.path, elapsed)
            logger.info("built engine %s in %.1f s", wanted.path, elapsed)
        return record

    # State.

    def resident(self) -> list[str]:
        """Paths of the engines that are loaded now."""
        with self._lock:
            return [key[0] for key, slot in self._slots.items() if slot.program is not None]

    def release(self) -> None:
        """Release every engine; waits for those in use by other threads.

        Raises:
            EngineError: if the current thread uses one.
        """
        while True:
            with self._lock:
                for key, slot in list(self._slots.items()):
                    if not slot.users:
                        self._release(key)
                if not self._slots:
                    return
                if self._inside():
                    raise EngineError("engines cannot be released inside a call that uses one")
                used = [slot.users for slot in self._slots.values()]
            for users in used:
                users.wait()
