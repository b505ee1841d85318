"""The lazy runtime: engines are found, checked, built and loaded at their first request, and released when others need room.

Which of them are in memory, and who waits for whom, is :mod:`qwen_vae_accel.engines.residency`'s to say.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_vae_accel.backends.base import EngineImage, Program
from qwen_vae_accel.engines import networkcheck, selfcheck
from qwen_vae_accel.engines.manifest import EngineRecord, Verification
from qwen_vae_accel.engines.residency import Residency, Resident
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import BuildError, EngineRefusedError
from qwen_vae_accel.journal import EngineLoad, Journal
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.source import build_model
from qwen_vae_accel.sizes import Profile
from qwen_vae_accel.visits import fork_safe_lock

logger = logging.getLogger(__name__)


class EngineRuntime:
    """Engines of one directory for one VAE.

    Args:
        store: the engine directory.
        source: the VAE's networks, for builds and self-checks.
        journal: told of loads, builds and releases.
        max_resident: sizes that may be loaded at once; None: no limit.
        budget: bytes that loaded engines may take together.
        verify: whether engines are checked before their first use on this machine.
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
        verify_networks: bool = False,
    ) -> None:
        self.store = store
        self._source = source
        self._journal = journal
        self._verify = verify
        self._verify_networks = verify_networks
        self._residency = Residency(store, journal, max_resident, budget)
        self._good: set[tuple[str, Wanted, str]] = (
            set()
        )  # self-checks that were passed: of which bytes, as what, at which profile
        self._checking = fork_safe_lock()

    @contextmanager
    def use(self, wanted: Wanted, profile: Profile, visit: threading.Lock) -> Iterator[Program]:
        """The program of an engine, loaded if it is not; it stays loaded at least until the block ends.

        Args:
            wanted: the engine.
            profile: the one of its profiles that is to be run.
            visit: a lock that the caller holds around the block, ``with visit, runtime.use(..., visit) as program``: the
                engine is in use while it is held, whatever instruction an interrupt strikes.

        Raises:
            EngineMissingError, EngineRefusedError, EngineError: if there is no usable engine; nothing is loaded then.
        """
        program: Program | None = None
        resident, mine = self._residency.take(wanted, visit)
        try:
            if mine:
                self._load(resident)
            program = resident.program
            assert program is not None
            if self._verify and profile.name not in resident.checked:
                try:
                    self._check(resident, profile, program)
                except EngineRefusedError:
                    resident.refused = True
                    raise
            yield program
        finally:
            program = None
            self._residency.leave(resident, visit)

    def _load(self, resident: Resident) -> None:
        wanted = resident.wanted
        try:
            start = time.perf_counter()
            image, resident.record = self.store.load(wanted)
            program = self._open(wanted, image)
            ms = (time.perf_counter() - start) * 1e3
            self._journal.load(EngineLoad(wanted.path, wanted.backend.name, ms, program.nbytes))
            logger.info("loaded engine %s in %.1f ms", image.path, ms)
            self._residency.loaded(resident, program)
        except BaseException:
            self._residency.abandon(resident)
            raise

    def _open(self, wanted: Wanted, image: EngineImage) -> Program:
        try:
            return wanted.backend.load(image, wanted.job(self._source.topology), wanted.key)
        except Exception as error:
            raise EngineRefusedError(str(image.path), [f"{wanted.backend.name} cannot load it: {error}"]) from error

    # Self-checks.

    def _check(self, resident: Resident, profile: Profile, program: Program) -> None:
        """Refuse a program whose self-check failed; run the check where these bytes have no result on this machine yet."""
        with self._checking:
            if profile.name in resident.checked:
                return
            wanted, record = resident.wanted, resident.record
            assert record is not None
            content = (record.sha256, wanted, profile.name)
            result = record.verification.get(selfcheck.name_of(wanted.environment, profile))
            if result is None and content not in self._good:
                result = self.verify(wanted, profile, program, record)
            if result is not None:
                self._judge(wanted, profile, result)
            self._good.add(content)
            resident.checked.add(profile.name)

    def verify(self, wanted: Wanted, profile: Profile, program: Program, record: EngineRecord) -> Verification:
        """Run the self-check of one profile now, and keep its result in ``record`` and in the manifest.

        Raises:
            EngineRefusedError: if the program does not get through it.
        """
        start = time.perf_counter()
        result = self._run_check(wanted, profile, program)
        self._journal.verify(wanted.path, (time.perf_counter() - start) * 1e3)
        name = selfcheck.name_of(wanted.environment, profile)
        record.verification[name] = result
        self.store.record_verification(wanted.path, record.sha256, name, result, wanted.backend.scratch(program))
        return result

    def _run_check(self, wanted: Wanted, profile: Profile, program: Program) -> Verification:
        job, index = wanted.job(self._source.topology), wanted.key.profiles.index(profile)
        machine = selfcheck.machine_id(wanted.environment)
        try:
            return selfcheck.check(self._source, job, program, profile.optimum, index, machine)
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
        job = wanted.job(self._source.topology)
        elapsed = math.nan

        def make(path: Path) -> EngineRecord:
            nonlocal elapsed
            start = time.perf_counter()
            # Contiguous copies of its own: what is compiled must not depend on views into the VAE.
            state = {
                name: value.to(job.device, job.dtype, copy=True).contiguous()
                for name, value in self._source.state(job.method).items()
            }
            try:
                scratch = wanted.backend.build(build_model(state, job.method), job, wanted.key, path)
            except OSError:
                raise
            except Exception as error:
                raise BuildError(f"{wanted.backend.name} failed to build {wanted.path}: {error}") from error
            elapsed = time.perf_counter() - start
            return wanted.record(sha256="", size=0, build_seconds=round(elapsed, 3), scratch=scratch)

        def accept(image: EngineImage, record: EngineRecord) -> EngineRecord:
            network = wanted.backend.take_network() if self._verify_networks else None
            if network is not None:
                checks = networkcheck.check(self._source, job, wanted.key, network, self.store.root / wanted.path)
                record.verification.update(checks)
                logger.info("%s: %s", wanted.path, "; ".join(map(networkcheck.text, checks.values())))
            if not self._verify:
                return record
            program = self._open(wanted, image)
            # The other profiles of an engine are checked at their first request.
            profile = min(wanted.key.profiles, key=lambda p: p.optimum.width * p.optimum.height)
            result = self._run_check(wanted, profile, program)
            self._judge(wanted, profile, result)
            record.verification[selfcheck.name_of(wanted.environment, profile)] = result
            return dataclasses.replace(record, scratch=wanted.backend.scratch(program) or record.scratch)

        here = selfcheck.machine_id(wanted.environment) + "/"

        def stands(record: EngineRecord) -> bool:
            return all(result.passed for name, result in record.verification.items() if name.startswith(here))

        _, record = self.store.build(wanted, make, accept, stands if self._verify else None)
        if not math.isnan(elapsed):
            self._journal.build(wanted.path, elapsed)
            logger.info("built engine %s in %.1f s", wanted.path, elapsed)
        return record

    # State.

    def resident(self) -> list[str]:
        """The paths of the engines that are loaded now, below the engine directory."""
        return self._residency.paths()

    def release(self) -> None:
        """Release every engine, after waiting for those that other threads use.

        Raises:
            EngineError: if the current thread uses one.
        """
        self._residency.release()
