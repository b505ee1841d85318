"""What an engine must be to be run: compared with its record, field by field."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from qwen_vae_accel.backends.base import EngineBackend, Environment
from qwen_vae_accel.engines.manifest import EngineRecord
from qwen_vae_accel.plan import EngineKey


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
        sizes = ",".join(profile.text for profile in key.profiles)
        options = f"--backend {self.backend} --method {key.method} --dtype {self.dtype} --sizes {sizes}"
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
