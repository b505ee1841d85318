"""What tuning found on one GPU, kept as versioned JSON beside the engines: ``tuning_<GPU>.json``."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qwen_vae_accel.documents import LARGEST_FILE, parse_json
from qwen_vae_accel.files import read_file, write_atomically
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.network import Kind
from qwen_vae_accel.kernels.sm90.schedules import Schedule
from qwen_vae_accel.kernels.tuning.candidates import candidates
from qwen_vae_accel.kernels.tuning.configs import RELATIVE_FIELDS, AttentionConfig, Config, ConvConfig
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.selection import Tuning

logger = logging.getLogger(__name__)

_VERSION = 2
_AGAIN = "qwen-vae-accel tune --engine-dir DIR measures again"


@dataclass(frozen=True, slots=True)
class Machine:
    """What measured configurations are tied to."""

    gpu: str
    compute_capability: str
    multiprocessors: int
    triton: str

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """Describe the GPU ``device`` and the installed Triton."""
        properties = torch.cuda.get_device_properties(device)
        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "none"
        capability = f"{properties.major}.{properties.minor}"
        return cls(properties.name, capability, properties.multi_processor_count, triton)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found for one kernel.

    Attributes:
        key: which kernel.
        choices: at most two configurations; none where nothing was faster than what ships.
        milliseconds: with these, the sum over one launch for each different size it was measured at.
        shipped_milliseconds: the same with what ships.
    """

    key: KernelKey
    choices: tuple[Config, ...]
    milliseconds: float
    shipped_milliseconds: float


@dataclass(frozen=True, slots=True)
class TunedGpu:
    """The result of one run of ``tune``.

    Attributes:
        machine: what it holds for.
        torch: version of PyTorch that it was measured with.
        dtype: such as ``"bfloat16"``; the choices serve float16 as well.
        sizes: images, width x height.
        made_at: ISO 8601, UTC.
        kernels: what was found, kernel by kernel.
    """

    machine: Machine
    torch: str
    dtype: str
    sizes: tuple[str, ...]
    made_at: str
    kernels: tuple[Measured, ...]

    def tuning(self, base: Tuning | None = None) -> Tuning:
        """Return ``base`` with these choices before its own."""
        return (base or Tuning()).with_measured({kernel.key: kernel.choices for kernel in self.kernels if kernel.choices})

    def beside(self, before: TunedGpu | None) -> TunedGpu:
        """Return the same with what ``before``, of the same machine, has of other kernels."""
        if before is None:
            return self
        known = {kernel.key for kernel in self.kernels}
        kept = tuple(kernel for kernel in before.kernels if kernel.key not in known)
        return replace(self, kernels=self.kernels + kept, sizes=tuple(dict.fromkeys((*self.sizes, *before.sizes))))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, with the version of the schema."""
        kernels = [{**asdict(kernel), "key": kernel.key.as_dict()} for kernel in self.kernels]
        return {"version": _VERSION, **asdict(self), "kernels": kernels}

    def dumps(self) -> str:
        """Write it as JSON."""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    @classmethod
    def loads(cls, text: str | bytes, machine: Machine, gpu: Gpu) -> TunedGpu:
        """Read it from JSON, to be used on ``machine``, whose GPU is ``gpu``.

        Raises:
            ValueError: it is no such JSON, has another version, was measured elsewhere, or names what tuning never tries.
        """
        try:
            document = parse_json(text)
            if document["version"] != _VERSION:
                found = document["version"]
                raise ValueError(f"version {found!r} of the schema, this release reads {_VERSION}: {_AGAIN}")
            if different := _differences(Machine(**document["machine"]), machine):
                raise ValueError(f"measured with {'; '.join(different)}: {_AGAIN}")
            kernels = tuple(_measured(entry, gpu) for entry in document["kernels"])
            if len({kernel.key for kernel in kernels}) != len(kernels):
                raise ValueError("a kernel is listed twice")
            return cls(
                machine, _text(document["torch"]), _text(document["dtype"]), tuple(map(_text, document["sizes"])),
                _text(document["made_at"]), kernels,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a tuning: {type(error).__name__} {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value!r} is not a positive number")
    return float(value)


def _differences(measured: Machine, here: Machine) -> list[str]:
    pairs = ((field.name, getattr(measured, field.name), getattr(here, field.name)) for field in fields(Machine))
    return [f"{name} {theirs}, here {ours}" for name, theirs, ours in pairs if theirs != ours]


def _measured(entry: Any, gpu: Gpu) -> Measured:
    key = KernelKey.from_dict(entry["key"])
    known = candidates(key, gpu)
    kind = AttentionConfig if key.kind is Kind.ATTENTION else Schedule if key.sm90 else ConvConfig
    choices = tuple(_choice(kind, values, known) for values in entry["choices"])
    if len(choices) > 2:
        raise ValueError(f"{len(choices)} choices for {key}; at most two are made")
    return Measured(key, choices, _number(entry["milliseconds"]), _number(entry["shipped_milliseconds"]))


def _choice(kind: type, values: dict[str, Any], known: tuple[Config, ...]) -> Config:
    name, neutral = RELATIVE_FIELDS[kind]
    relative = _number(values[name])
    if set(values) != {field.name for field in fields(kind)}:
        raise ValueError(f"{values} has other fields than {kind.__name__}")
    for config in known:
        tried = asdict(config)
        if all(type(tried[key]) is type(value) and tried[key] == value for key, value in values.items() if key != name):
            return kind(**{**tried, name: relative})
    raise ValueError(f"{values} is not among the configurations that are tried")


def tuning_path(folder: Path, gpu: str) -> Path:
    """The file in ``folder`` that keeps the tuning of the GPU of that name."""
    return folder / f"tuning_{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def write_tuned(folder: Path, tuned: TunedGpu) -> Path:
    """Keep ``tuned`` in ``folder``, in place of an earlier one of this GPU; whoever reads meanwhile finds either whole.

    Raises:
        OSError: the folder cannot be written.
    """
    path = tuning_path(folder, tuned.machine.gpu)
    write_atomically(path, tuned.dumps())
    return path


def read_tuned(folder: Path, machine: Machine, gpu: Gpu) -> TunedGpu | None:
    """The tuning of ``machine`` in ``folder``; None, with the reason logged, where there is none that serves."""
    path = tuning_path(folder, machine.gpu)
    try:
        return TunedGpu.loads(read_file(path, LARGEST_FILE), machine, gpu)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is not used; the shipped configurations serve: %s", path, error)
        return None
