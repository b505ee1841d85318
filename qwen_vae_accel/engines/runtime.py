"""The lazy runtime: engines are found, checked, built and loaded at their first request, and released when others need room.

Residency is counted by size name: the encoder and the decoder of one size are a pair. While an engine is in use it is
never released; who needs room waits. One thread loads an engine, others that want the same one wait for it.
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
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_vae_accel.backends.base import EngineBackend, Environment, Job, Program
from qwen_vae_accel.engines import selfcheck
from qwen_vae_accel.engines.manifest import EngineRecord, Verification, check_name
from qwen_vae_accel.engines.store import EngineStore, Expected
from qwen_vae_accel.errors import BuildError, EngineRefusedError
from qwen_vae_accel.journal import EngineLoad, Journal
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.source import build_model
from qwen_vae_accel.plan import Choice, EngineKey, Profile

logger = logging.getLogger(__name__)


# path below the engine directory, compute dtype, device, fingerprint of the weights
_SlotKey = tuple[str, torch.dtype, torch.device, str]


@dataclass(slots=True)
class _Slot:
    """An engine in memory, or on its way there (no program yet)."""

    name: str
    estimate: int
    program: Program | None = None
    users: int = 0
    refused: bool = False


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
    ) -> None:
        self.store = store
        self._source = source
        self._journal = journal
        self._max_resident = max_resident
        self._budget = budget
        self._verify = verify
        self._detect = detect
        self._changed = threading.Condition()
        self._slots: OrderedDict[_SlotKey, _Slot] = OrderedDict()
        self._good: set[tuple[_SlotKey, str]] = set()
        self._checking = threading.Lock()

    @contextmanager
    def use(self, wanted: Wanted, choice: Choice) -> Iterator[Program]:
        """The program of an engine, loaded if it is not; it stays loaded at least until the block ends.

        Raises:
            EngineMissingError, EngineRefusedError, EngineError: if there is no usable engine; nothing is loaded then.
        """
        slot_key = (wanted.path, wanted.job.dtype, wanted.job.device, wanted.weights)
        slot, mine = self._take(slot_key, wanted)
        if mine:
            try:
                slot.program = self._load(wanted)
                slot.estimate = slot.program.nbytes
            except BaseException:
                with self._changed:
                    del self._slots[slot_key]
                    self._changed.notify_all()
                raise
            with self._changed:
                self._changed.notify_all()
        program = slot.program
        assert program is not None
        try:
            if self._verify and (slot_key, choice.profile.name) not in self._good:
                try:
                    self._check(wanted, choice.profile, program, slot_key)
                except EngineRefusedError:
                    slot.refused = True
                    raise
            yield program
        finally:
            del program
            with self._changed:
                slot.users -= 1
                if slot.refused and slot.users == 0:
                    self._release(slot_key)
                self._changed.notify_all()

    def _take(self, slot_key: _SlotKey, wanted: Wanted) -> tuple[_Slot, bool]:
        """A slot in use by the caller, and whether the caller has to load it."""
        with self._changed:
            while True:
                slot = self._slots.get(slot_key)
                if slot is not None and slot.program is not None:
                    slot.users += 1
                    self._slots.move_to_end(slot_key)
                    return slot, False
                if slot is None:
                    self._release_stale(slot_key)
                    estimate = self._file_size(wanted)
                    if self._make_room(wanted.key.name, estimate):
                        slot = self._slots[slot_key] = _Slot(wanted.key.name, estimate, users=1)
                        return slot, True
                self._changed.wait()

    def _release_stale(self, wanted: _SlotKey) -> None:
        """Release the engine of the same path over weights that the VAE no longer has."""
        for key, slot in list(self._slots.items()):
            if key[:3] == wanted[:3] and slot.users == 0:
                self._release(key)

    def _file_size(self, wanted: Wanted) -> int:
        try:
            return (self.store.root / wanted.path).stat().st_size
        except OSError:
            return 0

    def _make_room(self, name: str, nbytes: int) -> bool:
        """Release the least recently used engines until one more fits; False if all that could go are in use."""
        while True:
            names = {slot.name for slot in self._slots.values()} | {name}
            crowded = self._max_resident is not None and len(names) > self._max_resident
            full = sum(slot.estimate for slot in self._slots.values()) + nbytes > self._budget
            others = [key for key, slot in self._slots.items() if not (crowded and slot.name == name)]
            if not (crowded or full) or not others:
                return True
            victim = next((key for key in others if self._slots[key].users == 0), None)
            if victim is None:
                return False
            self._release(victim)

    def _release(self, slot_key: _SlotKey) -> None:
        device = slot_key[2]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        slot = self._slots.pop(slot_key)
        alive = weakref.ref(slot.program) if slot.program is not None else lambda: None
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

    def _load(self, wanted: Wanted) -> Program:
        start = time.perf_counter()
        path, _ = self.store.find(self.expected(wanted))
        program = self._open(wanted, path)
        ms = (time.perf_counter() - start) * 1e3
        self._journal.load(EngineLoad(wanted.path, wanted.backend.name, ms, program.nbytes))
        logger.info("loaded engine %s in %.1f ms", path, ms)
        return program

    def _open(self, wanted: Wanted, path: Path) -> Program:
        try:
            return wanted.backend.load(path, wanted.job, wanted.key)
        except Exception as error:
            raise EngineRefusedError(str(path), [f"{wanted.backend.name} cannot load it: {error}"]) from error

    # Self-checks.

    def _check(self, wanted: Wanted, profile: Profile, program: Program, slot_key: _SlotKey) -> None:
        """Refuse a program whose self-check failed; run the check where this machine has no result yet."""
        with self._checking:
            if (slot_key, profile.name) in self._good:
                return
            _, record = self.store.find(self.expected(wanted))
            machine = selfcheck.machine_id(self._detect(wanted.job.device))
            name = check_name(machine, profile)
            result = record.verification.get(name)
            if result is None:
                start = time.perf_counter()
                result = self.run_check(wanted, profile, program, machine)
                self._journal.verify(wanted.path, (time.perf_counter() - start) * 1e3)
                scratch = wanted.backend.scratch(program)
                self.store.record_verification(wanted.path, record.sha256, name, result, scratch)
            self._judge(wanted, profile, result)
            self._good.add((slot_key, profile.name))

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
            difference = (
                f"self-check failed at {profile.optimum}: relative error {result.relative_error:.2e} against the exact model, "
                f"{wanted.job.dtype} allows {result.tolerance:.0e} ({result.at})"
            )
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

        def accept(path: Path, record: EngineRecord) -> EngineRecord:
            if not self._verify:
                return record
            program = self._open(wanted, path)
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
        with self._changed:
            return [key[0] for key, slot in self._slots.items() if slot.program is not None]

    def release(self) -> None:
        """Release every engine; waits for those in use."""
        with self._changed:
            while self._slots:
                idle = next((key for key, slot in self._slots.items() if slot.users == 0), None)
                if idle is None:
                    self._changed.wait()
                else:
                    self._release(idle)
