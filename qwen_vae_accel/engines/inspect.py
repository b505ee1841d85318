"""Looking at an engine directory: what is in it, whether it would be run here, what can go, what may be taken in."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from qwen_vae_accel.backends.base import EngineBackend, EngineImage, Environment, Job
from qwen_vae_accel.backends.registry import engine_backends, get_backend
from qwen_vae_accel.config import DTYPES, AccelConfig
from qwen_vae_accel.engines import locks, networkcheck, rights, selfcheck
from qwen_vae_accel.engines.manifest import EngineRecord, Verification, check_name
from qwen_vae_accel.engines.runtime import EngineRuntime
from qwen_vae_accel.engines.store import EngineStore, hash_file
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import (
    AccelError,
    ConfigError,
    EngineError,
    EngineMissingError,
    EngineRefusedError,
    LockedError,
)
from qwen_vae_accel.journal import Journal
from qwen_vae_accel.model import ModelSource, Topology
from qwen_vae_accel.plan import MULTI_PROFILE, EngineKey
from qwen_vae_accel.sizes import STATIC_NAMES, Profile, Size, folder_fits, parse_size, static_multiple

logger = logging.getLogger(__name__)

_NETWORKS = {"vae_encoder": "encode", "vae_decoder": "decode"}


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine file as it is found: its record, and why it would not be run here.

    Attributes:
        path: below the engine directory.
        size: bytes of the file; 0 where it is gone.
        record: what the manifest says of it, if anything.
        reasons: why it would not be run here; empty if it would.
        checks: results of its self-checks on this machine, by profile.
        networks: results of checks of its network, made where it was built for another machine, by profile.
    """

    path: str
    size: int
    record: EngineRecord | None
    reasons: tuple[str, ...]
    checks: dict[str, Verification] = dataclasses.field(default_factory=dict)
    networks: dict[str, Verification] = dataclasses.field(default_factory=dict)

    @property
    def current(self) -> bool:
        """Whether it would be run here."""
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values: dict[str, Any] = {"path": self.path, "bytes": self.size, "current": self.current, "reasons": list(self.reasons)}
        if self.record is not None:
            r = self.record
            values |= {
                "backend": r.backend,
                "method": r.method,
                "dtype": r.dtype,
                "profiles": r.profile_values(),
                "scratch": None if r.scratch is None else list(r.scratch),
                "origin": r.origin,
                "built_at": r.built_at,
                "build_seconds": r.build_seconds,
                "checks": {name: result.to_json() for name, result in self.checks.items()},
                "networks": {name: networkcheck.text(result) for name, result in self.networks.items()},
            }
        return values


@dataclass(frozen=True, slots=True)
class Removal:
    """Something that can go.

    Attributes:
        path: of the file.
        engine: its path below the directory, or None for a file that is no engine.
        size: bytes of the file.
        reason: why it can go.
        planned: whether the plan, if there is one, has it.
    """

    path: Path
    engine: str | None
    size: int
    reason: str
    planned: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return path, bytes and reason as plain JSON values."""
        return {"path": str(self.path), "bytes": self.size, "reason": self.reason}


class Inspector:
    """One engine directory, seen from one machine.

    Args:
        root: the directory.
        device: where engines are to run.
        source: a VAE's networks, to compare weights with; None: weights are not compared.

    Raises:
        EngineError: if there is no such directory.
    """

    def __init__(self, root: Path, device: torch.device, source: ModelSource | None = None) -> None:
        self.store = EngineStore(root)
        if not self.store.root.is_dir():
            raise EngineError(f"there is no engine directory {root}")
        self._device = device
        self._source = source
        self._environment = Environment.detect(device)
        self._machine = selfcheck.machine_id(self._environment)

    # What is there.

    def survey(self) -> list[EngineStatus]:
        """Every engine file and every record, compared with this machine and, where given, with the VAE."""
        known = [self._status(path, records[-1]) for path, records in sorted(self.store.manifest().engines.items()) if records]
        unknown = [
            EngineStatus(path, self.store.size(path), None, ("the manifest has no record of it: adopt --trust takes it in",))
            for path in self.store.unknown_files(self._suffixes())
        ]
        return known + unknown

    @staticmethod
    def _suffixes() -> tuple[str, ...]:
        return tuple(dict.fromkeys(backend.suffix for backend in engine_backends()))

    def _status(self, path: str, record: EngineRecord) -> EngineStatus:
        reasons: list[str] = []
        try:
            _, record = self.store.find(self._wanted_at(path, record))
        except EngineMissingError:
            reasons = ["the file is gone"]
        except EngineRefusedError as error:
            reasons = list(error.differences)
        except AccelError as error:
            reasons = [str(error)]
        checks = {
            profile.name: record.verification[name]
            for profile in record.profiles
            if (name := check_name(self._machine, profile)) in record.verification
        }
        reasons += [f"self-check of {name} failed: {result.errors()}" for name, result in checks.items() if not result.passed]
        return EngineStatus(path, self.store.size(path), record, tuple(reasons), checks, networkcheck.of_record(record))

    def _wanted(self, record: EngineRecord) -> Wanted:
        """The engine that the file of ``record`` would be run as here, over the weights that it holds."""
        backend = get_backend(record.backend)
        if not isinstance(backend, EngineBackend):
            raise EngineError(f"backend {record.backend!r} has no engines in this release")
        if record.dtype not in DTYPES:
            raise EngineError(f"dtype {record.dtype!r} is not known")
        return Wanted(backend, record.key, DTYPES[record.dtype], self._device, record.weights, self._environment)

    def _wanted_at(self, path: str, record: EngineRecord) -> Wanted:
        """The engine that the file at ``path`` would be run as here, over the weights of the VAE where one is given."""
        wanted = self._wanted(record)
        if self._source is not None:
            wanted = dataclasses.replace(wanted, weights=self._source.fingerprint(record.method, wanted.dtype))
        if wanted.path != path:
            raise EngineError(f"its record belongs to {wanted.path}")
        return wanted

    # Self-checks.

    def writers(self) -> list[str]:
        """List what lets others than the current user and root change what is run from here."""
        return rights.writers(self.store.root, *rights.everything(self.store.root))

    def verify(self, status: EngineStatus) -> Iterator[tuple[Profile, Verification]]:
        """Run the self-check of every profile of an engine again and keep the results.

        Raises:
            EngineError: if it cannot be loaded.
        """
        if self._source is None or status.record is None:
            raise EngineError("a self-check needs the VAE and a record")
        wanted = self._wanted(status.record)
        runtime = EngineRuntime(self.store, self._source, Journal(), None, 2**62, False)
        visit = threading.Lock()
        for profile in status.record.profiles:
            with visit, runtime.use(wanted, profile, visit) as program:
                result = runtime.verify(wanted, profile, program, status.record)
            yield profile, result
        runtime.release()

    # What can go.

    def prunable(self, planned: Collection[str] | None = None) -> list[Removal]:
        """Leftovers of killed builds, engines that would not be run here, and engines that are not ``planned`` (paths)."""
        found = [
            Removal(path, None, size, "left behind by a killed build")
            for path in self.store.leftovers()
            if not _held(self.store, path) and (size := _size(path)) is not None
        ]
        for status in self.survey():
            if status.record is None:
                continue
            reasons = list(status.reasons)
            in_plan = planned is None or status.path in planned
            if not in_plan:
                reasons.append("not in the plan")
            if reasons:
                path = self.store.root / status.path
                found.append(Removal(path, status.path, status.size, "; ".join(reasons), in_plan))
        return found

    def remove(self, removal: Removal) -> str:
        """Delete it, with its record, if it can still go: it is looked at again under the lock of whoever could change it.

        Returns:
            Why it was kept; empty if it is gone.

        Raises:
            EngineError: if it cannot be deleted.
        """
        try:
            if removal.engine is None:
                self.store.remove_leftover(removal.path)
                return ""
            with locks.take(self.store.root, removal.engine, wait=False):
                records = self.store.manifest().engines.get(removal.engine)
                if records and removal.planned and self._status(removal.engine, records[-1]).current:
                    return "it was built again meanwhile, and would be run here"
                self.store.delete(removal.engine)
                return ""
        except LockedError:
            return "a build of it is under way"

    # What may be taken in.

    def unknown(self) -> list[str]:
        """Engine files without a record, below the directory."""
        return self.store.unknown_files(self._suffixes())

    def adopt(self, path: str, config: AccelConfig) -> EngineRecord:
        """Take in an engine file made elsewhere. This runs its code: only for files the user trusts.

        Its record is written only if the engine passes the self-check of every profile against the VAE.

        Args:
            path: below the directory.
            config: its dtypes, and with ``multi_profile`` the profiles that the file was made for.

        Raises:
            EngineRefusedError: if it is not an engine of this VAE.
            ConfigError: if ``config`` cannot say what the file is.
        """
        source = self._source
        if source is None:
            raise ConfigError("adopting needs the VAE that the engines were made from: give --vae")
        method, name = self._place(path)
        backend = self._backend(path, config)
        stored = source.placement(method).dtype
        job = Job.of(config, method, source.topology, self._device, stored, self._environment)
        reasons = backend.reasons(self._environment, job)
        if reasons:
            raise EngineRefusedError(path, reasons)
        file = self.store.root / path
        try:
            image = EngineImage.read(file)
            profiles = backend.profiles(image, job)
            if profiles is None:
                key = self._key(path, method, name, config, source.topology)
            else:
                key = _key_of(path, method, name, profiles)
            program = backend.load(image, job, key)
            checks = {}
            for index, profile in enumerate(key.profiles):
                result = selfcheck.check(source, job, program, profile.optimum, index, self._machine)
                checks[check_name(self._machine, profile)] = result
                if not result.passed:
                    difference = f"self-check failed at {profile.optimum} against this VAE: {result.errors()}"
                    raise EngineRefusedError(path, [difference])
            if hash_file(file) != image.sha256:
                raise EngineRefusedError(path, ["the file changed while it was being checked"])
        except AccelError:
            raise
        except Exception as error:
            raise EngineRefusedError(path, [f"{backend.name} cannot load or run it: {error}"]) from error
        weights = source.fingerprint(method, job.dtype)
        record = Wanted(backend, key, job.dtype, self._device, weights, self._environment).record(
            sha256=image.sha256,
            size=len(image.data),
            build_seconds=0.0,
            scratch=backend.scratch(program),
            origin="adopted",
            verification=checks,
        )
        self.store.add(path, record)
        return record

    def surprise(self, record: EngineRecord, config: AccelConfig) -> str:
        """Say which other size the plan of ``config`` expected in the folder of a static engine; empty if it expected none."""
        if self._source is None or not record.key.is_static:
            return ""
        topology = self._source.topology
        held = {record.name: record.profiles[0].optimum}
        return "; ".join(config.plan(topology.scale, topology.multiple).surprises(held))

    def _backend(self, path: str, config: AccelConfig) -> EngineBackend:
        suffix = PurePosixPath(path).suffix
        fitting = [backend for backend in engine_backends() if backend.suffix == suffix]
        named = [backend for backend in fitting if backend.name == config.backend]
        if config.backend != "auto" and not named:
            raise EngineRefusedError(path, [f"{suffix} is not the suffix of backend {config.backend!r}"])
        return (named or fitting)[0]

    @staticmethod
    def _place(path: str) -> tuple[str, str]:
        """The network and the name of the engine that a file is by its path in the guide's layout."""
        pure = PurePosixPath(path)
        single = len(pure.parts) == 1
        method = _NETWORKS.get(pure.stem.removesuffix(f"_{MULTI_PROFILE}") if single else pure.stem)
        if method is None or len(pure.parts) > 2 or (single and not pure.stem.endswith(MULTI_PROFILE)):
            raise EngineRefusedError(path, ["its name is not one of an engine directory's"])
        return method, MULTI_PROFILE if single else pure.parts[0]

    @staticmethod
    def _key(path: str, method: str, name: str, config: AccelConfig, topology: Topology) -> EngineKey:
        """The engine that a file is, where only its place says so."""
        if name == MULTI_PROFILE:
            if not config.has_profiles:
                raise ConfigError(f"{path} has several profiles: say which with --multi-profile and --sizes")
            return EngineKey(method, MULTI_PROFILE, config.plan(topology.scale, topology.multiple).profiles)
        planned = () if config.has_profiles else config.plan(topology.scale, topology.multiple).profiles
        size = next((profile.optimum for profile in planned if profile.name == name), None)
        size = size or parse_size(name).floor(static_multiple(topology.scale))
        _check_folder(path, name, size)
        return EngineKey(method, name, (Profile.static(name, size),))


def _key_of(path: str, method: str, name: str, profiles: tuple[Profile, ...]) -> EngineKey:
    """The engine that a file is, where it says itself which profiles it has; its place must not say otherwise."""
    if name == MULTI_PROFILE:
        return EngineKey(method, MULTI_PROFILE, profiles)
    size = profiles[0].optimum
    if len(profiles) != 1 or profiles[0].minimum != profiles[0].maximum:
        raise EngineRefusedError(path, ["it takes a range of sizes, so it belongs in a file named ..._multi_profile"])
    _check_folder(path, name, size)
    return EngineKey(method, name, (Profile.static(name, size),))


def _check_folder(path: str, name: str, size: Size) -> None:
    if not folder_fits(name, size):
        raise EngineRefusedError(
            path, [f"it is for {size}, so it belongs in the folder {size}, or in one of {', '.join(STATIC_NAMES)}"]
        )


def _held(store: EngineStore, leftover: Path) -> bool:
    """Whether a live build may be writing ``leftover`` now."""
    return store.is_being_written(leftover)


def _size(path: Path) -> int | None:
    """Bytes of a file or link; None where there is none any more."""
    try:
        return path.lstat().st_size
    except OSError:
        return None
