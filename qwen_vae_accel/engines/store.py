"""The engine directory: the guide's layout, a manifest, atomic writes, locks that work across processes.

Layout: ``<name>/vae_encoder<suffix>`` and ``<name>/vae_decoder<suffix>`` for static sizes,
``vae_encoder_multi_profile<suffix>`` for multi-profile engines, ``manifest.json``, and two folders of our own, ``.locks``
and ``.tmp``. Loading a file runs code from it: only files whose hash the manifest holds are ever loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shlex
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from qwen_vae_accel.backends.base import EngineBackend, Environment
from qwen_vae_accel.engines.manifest import NAME, EngineRecord, Manifest, Verification, adopt_command
from qwen_vae_accel.errors import BuildError, EngineError, EngineMissingError, EngineRefusedError
from qwen_vae_accel.files import open_regular, write_atomically
from qwen_vae_accel.plan import EngineKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Expected:
    """What an engine must be to be run: compared with its record, field by field."""

    key: EngineKey
    backend: str
    suffix: str
    dtype: str
    weights: str
    identity: Mapping[str, str]
    accepts: Callable[[str, str, str], bool] = lambda fact, built, here: built == here

    @classmethod
    def of(cls, backend: EngineBackend, key: EngineKey, dtype: torch.dtype, weights: str, environment: Environment) -> Expected:
        """What ``backend``'s engine of ``key`` must be to be run in ``environment``."""
        return cls(
            key=key,
            backend=backend.name,
            suffix=backend.suffix,
            dtype=str(dtype).removeprefix("torch."),
            weights=weights,
            identity=backend.identity(environment),
            accepts=backend.accepts,
        )

    @property
    def path(self) -> str:
        """Path below the engine directory."""
        return self.key.stem + self.suffix

    def record(self, environment: Environment, **values: Any) -> EngineRecord:
        """The record of a new engine that is this, made in ``environment``; ``values`` are the fields not known here."""
        return EngineRecord(
            backend=self.backend,
            method=self.key.method,
            name=self.key.name,
            profiles=self.key.profiles,
            dtype=self.dtype,
            weights=self.weights,
            identity=dict(self.identity),
            environment=environment.describe(),
            built_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **values,
        )

    def build_command(self, root: Path) -> str:
        """The command that builds it into ``root``."""
        key = self.key
        sizes = key.name
        if not key.is_static:
            sizes = ",".join(f"{p.minimum}:{p.optimum}:{p.maximum}" for p in key.profiles)
        task = "i2i" if key.method == "encode" else "t2i"
        options = f"--backend {self.backend} --task {task} --dtype {self.dtype} --sizes {sizes}"
        multi = "" if key.is_static else " --multi-profile"
        return f"qwen-vae-accel build {options}{multi} --engine-dir {shlex.quote(str(root))} --vae PATH"

    def differences(self, record: EngineRecord) -> list[str]:
        """Why an engine of ``record`` must not be run for this, one text per difference."""
        found = []
        for what, theirs, ours in (
            ("backend", record.backend, self.backend),
            ("network", record.method, self.key.method),
            ("dtype", record.dtype, self.dtype),
        ):
            if theirs != ours:
                found.append(f"{what}: built for {theirs}, wanted {ours}")
        if record.weights != self.weights:
            found.append(f"weights: built from {record.weights[:12]}..., the VAE has {self.weights[:12]}...")
        if record.profiles != self.key.profiles:
            theirs, ours = (
                ", ".join(f"{p.name} [{p.minimum}..{p.optimum}..{p.maximum}]" for p in profiles)
                for profiles in (record.profiles, self.key.profiles)
            )
            found.append(f"sizes: built for {theirs}, wanted {ours}")
        for name in sorted(set(record.identity) | set(self.identity)):
            theirs, ours = record.identity.get(name, "nothing"), self.identity.get(name, "nothing")
            if not self.accepts(name, theirs, ours):
                found.append(f"{name}: built for {theirs}, here {ours}")
        return found


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class EngineStore:
    """One engine directory. Making this object touches nothing on disk.

    Args:
        root: the directory; made at the first build.
    """

    def __init__(self, root: str | Path) -> None:
        self._threads = threading.Lock()
        try:
            self.root = Path(root).expanduser().absolute()
            is_file = self.root.exists() and not self.root.is_dir()
        except (OSError, RuntimeError, ValueError) as error:  # no rights on a parent, nobody's home, not a path
            raise EngineError(f"engine_dir {str(root)!r} cannot be used: {error}") from error
        if is_file:
            raise EngineError(f"engine_dir {self.root} is a file; name a folder")

    # Reading.

    def manifest(self) -> Manifest:
        """The records, as they are on disk now."""
        return Manifest.read(self.root)

    def stamp(self) -> tuple[int, int] | None:
        """Time of writing and size of the manifest, which change with every engine; None where there is none."""
        try:
            status = (self.root / NAME).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def find(self, expected: Expected) -> tuple[Path, EngineRecord]:
        """The file and record of a usable engine.

        Raises:
            EngineMissingError: if there is no such file.
            EngineRefusedError: if there is one that must not be run, with every difference.
            EngineError: if the directory or its manifest cannot be read.
        """
        path = self.root / expected.path
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise EngineMissingError(f"there is no engine {path}") from None
        except OSError as error:
            raise EngineError(f"cannot read the engine {path}: {error}") from error
        records = self.manifest().engines.get(expected.path, [])
        if not records:
            raise EngineRefusedError(
                str(path),
                ["the manifest does not know it, so nobody says what it was made from, and loading it runs its code"],
                f"If you trust whoever made it: {adopt_command(self.root)}",
            )
        try:
            digest = hash_file(path)
        except OSError as error:
            raise EngineError(f"cannot read the engine {path}: {error}") from error
        record = next((r for r in records if r.sha256 == digest), None)
        if record is None:
            known = records[-1]
            raise EngineRefusedError(
                str(path),
                [f"damaged: {size} bytes with sha256 {digest[:12]}..., built with {known.size} and {known.sha256[:12]}..."],
            )
        found = expected.differences(record)
        if found:
            raise EngineRefusedError(str(path), found, f"Rebuild it here: {expected.build_command(self.root)}")
        return path, record

    # Writing.

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        folder = self.root / ".locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{name.replace('/', '.')}.lock", thread_local=False)
            lock.acquire()
        except OSError as error:
            raise EngineError(f"cannot write in the engine directory {self.root}: {error}") from error
        try:
            yield
        finally:
            lock.release()

    def _write_manifest(self, manifest: Manifest) -> None:
        # Under the manifest's lock, what a killed writer left behind is nobody's.
        for leftover in self.root.glob(f".{NAME}.*"):
            leftover.unlink(missing_ok=True)
        write_atomically(self.root / NAME, manifest.dumps())
        _sync(self.root)

    @contextmanager
    def _editing(self) -> Iterator[Manifest]:
        with self._locked(NAME):
            manifest = self.manifest()
            yield manifest
            self._write_manifest(manifest)

    def build(
        self,
        expected: Expected,
        make: Callable[[Path], EngineRecord],
        accept: Callable[[Path, EngineRecord], EngineRecord] | None = None,
        stands: Callable[[EngineRecord], bool] | None = None,
    ) -> tuple[Path, EngineRecord]:
        """Have ``make`` write an engine and publish it; whoever comes second finds the first one's and waits.

        Args:
            expected: the engine wanted. If a usable one is there by the time the lock is ours, it is returned.
            make: writes the given path and returns its record, with any hash and size.
            accept: looks at the written file before it is published; its record is published, its exception stops it.
            stands: whether an engine that is there already may stay; None: it may.

        Raises:
            BuildError: if making or writing it failed. What was there before is there still.
        """
        with self._threads, self._locked(expected.path):
            try:
                path, record = self.find(expected)
                if stands is None or stands(record):
                    return path, record
            except (EngineMissingError, EngineRefusedError):
                pass
            prefix = expected.path.replace("/", ".")
            folder = self.root / ".tmp"
            try:
                folder.mkdir(exist_ok=True)
                # Under this engine's lock, what an earlier build of it left behind is nobody's.
                for leftover in folder.glob(f"{prefix}.*"):
                    leftover.unlink(missing_ok=True)
                temporary = folder / f"{prefix}.{uuid.uuid4().hex}{expected.suffix}"
                try:
                    record = make(temporary)
                    record = dataclasses.replace(record, sha256=hash_file(temporary), size=temporary.stat().st_size)
                    if accept is not None:
                        record = accept(temporary, record)
                    return self._publish(expected.path, temporary, record), record
                finally:
                    temporary.unlink(missing_ok=True)
            except OSError as error:
                raise BuildError(f"cannot write the engine {self.root / expected.path}: {error}") from error

    def _publish(self, name: str, temporary: Path, record: EngineRecord) -> Path:
        final = self.root / name
        final.parent.mkdir(parents=True, exist_ok=True)
        _sync(temporary)
        # Announce, replace, forget: whichever file is in place at any moment, a record describes it.
        with self._editing() as manifest:
            records = manifest.engines.setdefault(name, [])
            records[:] = [*(r for r in records if r.sha256 != record.sha256), record]
        temporary.replace(final)
        _sync(final.parent)
        with self._editing() as manifest:
            manifest.engines[name] = [record]
        return final

    def record_verification(
        self, name: str, sha256: str, check: str, result: Verification, scratch: tuple[int, ...] | None = None
    ) -> None:
        """Keep the result of a self-check, and the scratch memory that the loaded engine says it needs.

        In a directory that cannot be written it is logged and lost.
        """
        try:
            with self._editing() as manifest:
                records = manifest.engines.get(name, [])
                for index, record in enumerate(records):
                    if record.sha256 == sha256:
                        record.verification[check] = result
                        records[index] = dataclasses.replace(record, scratch=scratch or record.scratch)
        except (EngineError, OSError) as error:
            logger.warning("the self-check of %s is not recorded: %s", name, error)

    def add(self, name: str, record: EngineRecord) -> None:
        """Write the record of a file that is already in place (adoption)."""
        with self._editing() as manifest:
            manifest.engines[name] = [record]

    def remove(self, name: str) -> int:
        """Delete an engine and its records; returns the bytes freed."""
        path = self.root / name
        with self._locked(name), self._editing() as manifest:
            manifest.engines.pop(name, None)
            freed = path.stat().st_size if path.is_file() else 0
            path.unlink(missing_ok=True)
        if path.parent != self.root and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
        return freed

    def unknown_files(self, suffixes: tuple[str, ...]) -> list[str]:
        """Engine files in the guide's layout that have no record, relative to the directory."""
        known = self.manifest().engines
        found = []
        for path in sorted(self.root.glob("**/vae_*coder*")):
            name = path.relative_to(self.root).as_posix()
            if path.suffix in suffixes and name not in known and not name.startswith("."):
                found.append(name)
        return found

    def leftovers(self) -> list[Path]:
        """Files that killed builds left behind."""
        return sorted((self.root / ".tmp").glob("*"))
