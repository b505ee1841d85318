"""Building the engines of a plan ahead of time: what is current is kept, a failure does not stop the rest."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qwen_vae_accel.backends.base import EngineBackend, Environment, Job
from qwen_vae_accel.backends.registry import engine_backends, get_backend
from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.engines.manifest import EngineRecord
from qwen_vae_accel.engines.runtime import EngineRuntime
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import AccelError, BackendUnavailableError, ConfigError
from qwen_vae_accel.journal import Journal
from qwen_vae_accel.model import ModelSource, Topology
from qwen_vae_accel.model.topology import METHODS
from qwen_vae_accel.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildResult:
    """One engine of the plan after a build.

    Attributes:
        path: below the engine directory.
        status: ``"current"`` (was there), ``"built"`` or ``"failed"``.
        seconds: wall time spent on it now.
        record: its record, None where it failed.
        reason: why it failed.
    """

    path: str
    status: str
    seconds: float
    record: EngineRecord | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values: dict[str, Any] = {"path": self.path, "status": self.status, "seconds": round(self.seconds, 3)}
        if self.record is not None:
            values["bytes"] = self.record.size
        if self.reason:
            values["reason"] = self.reason
        return values


def engine_backend(
    config: AccelConfig, environment: Environment, jobs: Iterable[Job], given: EngineBackend | None = None
) -> EngineBackend:
    """The backend to build with: ``given``, or the one named, or for ``auto`` the fastest that has engines and can run.

    Raises:
        ConfigError: if the named backend has no engines.
        BackendUnavailableError: if it, or under ``auto`` none, can do the jobs here.
    """
    jobs = tuple(jobs)
    if given is not None:
        candidates: tuple[EngineBackend, ...] = (given,)
    elif config.backend != "auto":
        backend = get_backend(config.backend)
        if not isinstance(backend, EngineBackend):
            names = ", ".join(other.name for other in engine_backends())
            raise ConfigError(f"backend {backend.name!r} needs no engines, so there is nothing to build; {names} do")
        candidates = (backend,)
    else:
        candidates = engine_backends()
    refused = []
    for backend in candidates:
        reasons = list(dict.fromkeys(text for job in jobs for text in backend.reasons(environment, job)))
        if not reasons:
            return backend
        refused += reasons if config.backend != "auto" else [f"{backend.name}: {text}" for text in reasons]
    raise BackendUnavailableError(config.backend, refused)


class Builder:
    """The engines of one configuration for one VAE.

    Args:
        config: with an ``engine_dir``.
        source: the VAE's networks.
        device: where the engines are to run; for another machine (``target``) where the VAE is.
        backend: to build with, instead of the one that ``config`` names.
        methods: networks to build.
        target: the machine that the engines are for, where it is not this one. They are checked there; here,
            what their compiler is handed is.

    Raises:
        ConfigError: if there is no ``engine_dir``, or the backend needs no engines.
        BackendUnavailableError: if no engine backend can run here.
    """

    def __init__(
        self,
        config: AccelConfig,
        source: ModelSource,
        device: torch.device,
        backend: EngineBackend | None = None,
        target: Environment | None = None,
        methods: tuple[str, ...] = METHODS,
    ) -> None:
        if config.engine_dir is None:
            raise ConfigError("there is no engine_dir to build into: give --engine-dir")
        environment = target or Environment.detect(device)
        stored = {method: source.placement(method).dtype for method in methods}
        jobs = {method: Job.of(config, method, source.topology, device, dtype, environment) for method, dtype in stored.items()}
        self.backend = engine_backend(config, environment, jobs.values(), backend)
        self.store = EngineStore(config.engine_dir)
        verify = config.verify and target is None
        networks = config.verify and target is not None
        self._runtime = EngineRuntime(self.store, source, Journal(), None, config.vram_budget, verify, networks)
        self.wanted = tuple(
            Wanted(self.backend, key, job.dtype, device, source.fingerprint(method, job.dtype), environment)
            for method, job in jobs.items()
            for key in self._plan(config, source.topology, method).engines(method)
        )

    def _plan(self, config: AccelConfig, topology: Topology, method: str) -> Plan:
        """The plan as the directory has it: an engine that is there for another size is not built over."""
        held = self.store.known().held(method, self.backend.suffix)
        for text in config.plan(topology.scale, topology.multiple).surprises(held):
            logger.warning("%s: %s", self.store.root, text)
        return config.plan(topology.scale, topology.multiple, held)

    def estimate(self, wanted: Wanted) -> float | None:
        """Seconds that a build of its kind took before in this directory; None where there was none."""
        records = [records[-1] for records in self.store.manifest().engines.values() if records]
        alike = [r.build_seconds for r in records if r.backend == wanted.backend.name and r.build_seconds > 0]
        same = [r.build_seconds for r in records if r.backend == wanted.backend.name and r.method == wanted.key.method]
        return statistics.median(same or alike) if alike else None

    def run(self, report: Callable[[Wanted, BuildResult | None], None]) -> list[BuildResult]:
        """Build what is not current; ``report`` is told before (with None) and after each engine."""
        results = []
        for wanted in self.wanted:
            report(wanted, None)
            results.append(self._one(wanted))
            report(wanted, results[-1])
        return results

    def _one(self, wanted: Wanted) -> BuildResult:
        start = time.perf_counter()
        try:
            try:
                _, record = self.store.find(wanted)
                return BuildResult(wanted.path, "current", time.perf_counter() - start, record)
            except AccelError as error:
                logger.info("building: %s", error)
            record = self._runtime.build(wanted)
        except AccelError as error:
            return BuildResult(wanted.path, "failed", time.perf_counter() - start, reason=str(error))
        return BuildResult(wanted.path, "built", time.perf_counter() - start, record)
