"""The engine that a request wants, and how the record of a file differs from it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from qwen_vae_accel.backends.base import EngineBackend, Environment, Job
from qwen_vae_accel.config import dtype_name
from qwen_vae_accel.engines.manifest import EngineRecord
from qwen_vae_accel.model import Topology
from qwen_vae_accel.plan import EngineKey


@dataclass(frozen=True, slots=True)
class Wanted:
    """An engine that a request wants: what a file must be to be run here.

    An engine has four descriptions. The plan names it (:class:`EngineKey`), a request wants it over certain weights on a
    certain device (this class), the manifest records what a file is (:class:`EngineRecord`), and the runtime keeps what is
    loaded under the description that it was wanted by.

    Attributes:
        backend: what builds and loads it.
        key: which engine of the plan it is.
        dtype: of the network's input and output.
        device: where it is to run.
        weights: fingerprint of the weights that it must hold.
        environment: the machine that it is to run on: that of ``device``, or the target of a build for another machine. It
            does not count when two are compared.
    """

    backend: EngineBackend
    key: EngineKey
    dtype: torch.dtype
    device: torch.device
    weights: str
    environment: Environment = field(compare=False, repr=False)

    @property
    def path(self) -> str:
        """The path of its file below the engine directory."""
        return self.key.stem + self.backend.suffix

    def job(self, topology: Topology) -> Job:
        """The job that it does for a VAE of ``topology``."""
        return Job(self.key.method, topology, self.dtype, self.device)

    def replaces(self, other: Wanted) -> bool:
        """Whether both are the same file on the same device, so that only one of them can be right."""
        return (self.path, self.dtype, self.device) == (other.path, other.dtype, other.device)

    def record(self, **values: Any) -> EngineRecord:
        """The record of a new file that is this engine; ``values`` are the fields that are not known here."""
        return EngineRecord(
            backend=self.backend.name,
            method=self.key.method,
            name=self.key.name,
            profiles=self.key.profiles,
            dtype=dtype_name(self.dtype),
            weights=self.weights,
            identity=self.backend.identity(self.environment),
            environment=self.environment.describe(),
            built_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **values,
        )

    def build_command(self, root: Path) -> str:
        """The command that builds it into ``root``."""
        key = self.key
        sizes = ",".join(profile.text(multi_profile=not key.is_static) for profile in key.profiles)
        options = f"--backend {self.backend.name} --method {key.method} --dtype {dtype_name(self.dtype)} --sizes {sizes}"
        multi = "" if key.is_static else " --multi-profile"
        return f"qwen-vae-accel build {options}{multi} --engine-dir {shlex.quote(str(root))} --vae PATH"

    def differences(self, record: EngineRecord) -> list[str]:
        """Why a file of ``record`` must not be run as this engine, one text per difference; empty if it may."""
        found = []
        for what, theirs, ours in (
            ("backend", record.backend, self.backend.name),
            ("network", record.method, self.key.method),
            ("dtype", record.dtype, dtype_name(self.dtype)),
        ):
            if theirs != ours:
                found.append(f"{what}: built for {theirs}, wanted {ours}")
        if record.weights != self.weights:
            found.append(f"weights: built from {record.weights[:12]}..., the VAE has {self.weights[:12]}...")
        if record.profiles != self.key.profiles:
            found.append(f"sizes: built for {record.key.ranges()}, wanted {self.key.ranges()}")
        identity = self.backend.identity(self.environment)
        for name in sorted(set(record.identity) | set(identity)):
            theirs, ours = record.identity.get(name, "nothing"), identity.get(name, "nothing")
            if not self.backend.accepts(name, theirs, ours):
                found.append(f"{name}: built for {theirs}, here {ours}")
        return found
