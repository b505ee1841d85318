"""The manifest: what is known of every engine file of a directory. Versioned JSON, ``manifest.json``.

A path may have two records for a moment: the one of the file that is there, and the one of the file about to replace
it. The file's hash says which of them is true, so a build killed at any point leaves a usable directory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_vae_accel.documents import read_json
from qwen_vae_accel.errors import EngineError, shown
from qwen_vae_accel.files import is_path
from qwen_vae_accel.plan import EngineKey
from qwen_vae_accel.sizes import Profile, Size, folder_fits

VERSION = 1
NAME = "manifest.json"
_NETWORKS = ("vae_encoder", "vae_decoder")


def adopt_command(root: Path) -> str:
    """The command that takes in the engines of ``root`` that have no record."""
    return f"qwen-vae-accel adopt --trust --engine-dir {shlex.quote(str(root))} --vae PATH"


def _path(name: str) -> str:
    """``name`` if it is an engine's path below the directory: what a manifest names may be deleted."""
    path = PurePosixPath(name)
    if not is_path(name) or not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{shown(name)} is not a path below the engine directory")
    if path.parts[0].startswith(".") or not path.name.startswith(_NETWORKS):
        raise ValueError(f"{shown(name)} is not the path of an engine")
    return name


def _check(values: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        if name in values and not isinstance(values[name], kind):
            raise TypeError(f"{name} is {shown(values[name])}, not of type {kind.__name__}")


def _size(text: str) -> Size:
    # Not parse_size: an engine may have been built for a size that no configuration would name.
    width, height = text.split("x")
    return Size(int(width), int(height))


_NUMBERS = ("relative_error", "relative_limit", "line_error", "line_limit", "psnr_db")


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of one self-check: an engine against the exact network in float64 on the same input.

    Attributes:
        passed: whether both errors were within their limits.
        relative_error: ``||engine - exact|| / ||exact||``.
        relative_limit: the most that it may be, from diffusers' own error here, see :mod:`qwen_vae_accel.accuracy`.
        line_error: the error of the worst row, column or channel, in the same units.
        line_limit: the most that it may be.
        psnr_db: of the engine's output against the exact one, peak to peak 2 for images, the reference's range for moments.
        machine: where it ran, see :func:`qwen_vae_accel.engines.selfcheck.machine_id`.
        at: UTC time, ISO 8601.
    """

    passed: bool
    relative_error: float
    relative_limit: float
    line_error: float
    line_limit: float
    psnr_db: float
    machine: str
    at: str

    def errors(self) -> str:
        """Say in words which errors were found and which are allowed."""
        return (
            f"relative error {self.relative_error:.1e} of {self.relative_limit:.1e} allowed, "
            f"in its worst row, column or channel {self.line_error:.1e} of {self.line_limit:.1e}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; JSON has no infinity, and Python's float() reads its name back."""
        values = dataclasses.asdict(self)
        return {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Verification:
        """Read what :meth:`to_json` made. Raises KeyError, TypeError, ValueError or OverflowError for anything else."""
        _check(values, {"passed": bool, "machine": str, "at": str})
        floats = {name: float(values[name]) for name in _NUMBERS}
        return cls(**{**values, **floats})


def check_name(machine: str, profile: Profile) -> str:
    """The name under which a record keeps the self-check of a profile on a machine."""
    return f"{machine}/{profile.name}"


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One engine file.

    Attributes:
        sha256: hex digest of the file.
        size: bytes of the file.
        backend: the backend that made it.
        method: ``"encode"`` or ``"decode"``.
        name: folder of a static engine, or ``multi_profile``.
        profiles: sizes it takes.
        dtype: compute dtype.
        weights: fingerprint of the weights inside.
        identity: the facts it is tied to; it runs only where they are the same.
        environment: everything known of the machine that built it.
        built_at: UTC time, ISO 8601.
        build_seconds: wall time of the build.
        scratch: bytes of device memory that a run needs at most beside the weights, per profile: what the engine says of
            itself, and until it is first loaded what its builder planned; None where neither is known.
        origin: ``"built"`` here, or ``"adopted"`` on the user's word.
        verification: results of the self-check by ``machine/profile``.
    """

    sha256: str
    size: int
    backend: str
    method: str
    name: str
    profiles: tuple[Profile, ...]
    dtype: str
    weights: str
    identity: dict[str, str]
    environment: dict[str, str]
    built_at: str
    build_seconds: float
    scratch: tuple[int, ...] | None = None
    origin: str = "built"
    verification: dict[str, Verification] = field(default_factory=dict)

    @property
    def key(self) -> EngineKey:
        """The engine of a plan that this file is."""
        return EngineKey(self.method, self.name, self.profiles)

    def profile_values(self) -> list[dict[str, str]]:
        """Return the sizes it takes as plain JSON values."""
        return [{"name": p.name, "min": str(p.minimum), "opt": str(p.optimum), "max": str(p.maximum)} for p in self.profiles]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values = dataclasses.asdict(self)
        values["verification"] = {name: result.to_json() for name, result in self.verification.items()}
        values["profiles"] = self.profile_values()
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EngineRecord:
        """The inverse of :meth:`to_json`; raises KeyError, TypeError, ValueError or OverflowError for anything else."""
        fields = {f.name for f in dataclasses.fields(cls)}
        unknown = set(values) - fields
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        texts = ("sha256", "backend", "name", "dtype", "weights", "built_at", "origin")
        _check(values, {**dict.fromkeys(texts, str), "size": int, "identity": dict, "environment": dict})
        for facts in (values["identity"], values["environment"], *values["profiles"]):
            _check(facts, dict.fromkeys(facts, str))
        if values["method"] not in ("encode", "decode"):
            raise ValueError(f"method {shown(values['method'])} is neither encode nor decode")
        profiles = tuple(Profile(p["name"], _size(p["min"]), _size(p["opt"]), _size(p["max"])) for p in values["profiles"])
        if not profiles:
            raise ValueError("no profiles")
        scratch = values.get("scratch")
        if scratch is not None:
            scratch = tuple(scratch)
            if len(scratch) != len(profiles) or not all(isinstance(size, int) and size >= 0 for size in scratch):
                raise ValueError(f"scratch is {shown(scratch)}, not a number of bytes for each of {len(profiles)} profiles")
        results = values.get("verification", {}).items()
        # By the criterion of an earlier release: as if the engine had not been checked.
        checks = {name: Verification.from_json(result) for name, result in results if "tolerance" not in result}
        seconds = float(values["build_seconds"])
        if not (math.isfinite(seconds) and values["size"] >= 0):
            raise ValueError("build_seconds and size must be numbers of seconds and bytes")
        return cls(**{**values, "profiles": profiles, "build_seconds": seconds, "scratch": scratch, "verification": checks})


@dataclass(slots=True)
class Manifest:
    """All records of a directory, by path relative to it, newest last."""

    engines: dict[str, list[EngineRecord]] = field(default_factory=dict)

    def newest(self, path: str) -> EngineRecord | None:
        """The newest record of the file ``path``."""
        records = self.engines.get(path)
        return records[-1] if records else None

    def held(self, method: str, suffix: str) -> dict[str, Size]:
        """The sizes of the static engines of one network, by folder: what their records say, whatever folders are called."""
        found = {}
        for path in self.engines:
            record = self.newest(path)
            if record is None or (path, record.method) != (record.key.stem + suffix, method) or not record.key.is_static:
                continue
            name, size = record.name, record.profiles[0].optimum
            if record.profiles == (Profile.static(name, size),) and folder_fits(name, size):
                found[name] = size
        return found

    def dumps(self) -> str:
        """The text of the file."""
        engines = {path: [r.to_json() for r in records] for path, records in sorted(self.engines.items()) if records}
        return json.dumps({"version": VERSION, "engines": engines}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def read(cls, root: Path) -> Manifest:
        """The manifest of ``root``; an empty one where there is none.

        Raises:
            EngineError: if it cannot be read or understood. Nothing is changed then.
        """
        path = root / NAME
        hint = f"Restore the file, or move it away and take the engines in again: {adopt_command(root)}"
        try:
            document = read_json(path)
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError) as error:
            raise EngineError(f"cannot read the manifest {path}: {error}") from error
        except ValueError as error:
            raise EngineError(f"the manifest {path} is not JSON ({error}). {hint}") from error
        if not isinstance(document, dict) or not isinstance(document.get("engines"), dict):
            raise EngineError(f"the manifest {path} has no table of engines. {hint}")
        if document.get("version") != VERSION:
            raise EngineError(f"the manifest {path} has version {shown(document.get('version'))}; this release reads {VERSION}")
        try:
            engines = document["engines"].items()
            return cls({_path(name): [EngineRecord.from_json(r) for r in records] for name, records in engines})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise EngineError(f"the manifest {path} has a malformed record ({shown(error)}). {hint}") from error
