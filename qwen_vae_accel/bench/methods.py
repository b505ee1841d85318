"""What is measured, as data: methods, sizes, tasks.

A method is written ``NAME`` or ``NAME:DTYPE``: ``diffusers``, ``diffusers-compile``, any backend of this package, an
engine backend with ``-mp`` for one multi-profile engine, or ``fastvae`` (a third-party decoder, if it is installed).
``fused:fp8`` decodes a bfloat16 VAE in float8.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from qwen_vae_accel.backends.base import EngineBackend, Environment, Job
from qwen_vae_accel.backends.registry import direct_backends, engine_backends, get_backend
from qwen_vae_accel.config import FLOAT8, AccelConfig, dtype_name
from qwen_vae_accel.errors import AccelError, ConfigError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.plugin.entry import accelerate
from qwen_vae_accel.plugin.methods import handle_of
from qwen_vae_accel.sizes import STATIC_MULTIPLE, Size, parse_size

BASELINE = "diffusers"
# What `--task` of the command and `task` of a row name; the configuration's task is a kind of request.
DIRECTIONS = ("decode", "encode")
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SUFFIX = "-mp"
CPU_SIZES = ("256x256", "512x512")
CUDA_SIZES = ("512x512", "768x1024", "1024x1024", "1664x928", "1328x1328")

Run = Callable[[Tensor], Tensor]


class BenchError(AccelError, RuntimeError):
    """A measurement that would not mean what its row says."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One row: a method on one network at one size."""

    method: Method
    task: str
    size: Size


# Gives a function from the network's input [1, C, 1, H, W] to its output [1, C', H', W'], as long as it is open.
Prepare = Callable[[nn.Module, Trial, Path], AbstractContextManager[Run]]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to run the VAE in one dtype; float8 is that of a decoder's products, and the VAE then is bfloat16."""

    name: str
    dtype: torch.dtype
    prepare: Prepare

    @property
    def label(self) -> str:
        """Name and dtype, as tables show it."""
        return f"{self.name} {SHORT[self.dtype]}"

    @property
    def float8(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    @property
    def decodes_only(self) -> bool:
        return self.float8 or self.name == "fastvae"

    @property
    def vae_dtype(self) -> torch.dtype:
        """Of the VAE, its input and its output."""
        return torch.bfloat16 if self.float8 else self.dtype


def _call(vae: Any, task: str) -> Run:
    if task == "decode":
        return lambda z: vae.decode(z, return_dict=False)[0][:, :, 0]
    return lambda x: vae.encode(x).latent_dist.parameters[:, :, 0]


def _require_unpatched(vae: nn.Module) -> None:
    patched = [f"vae.{name}" for name in ("encode", "decode", "_encode", "_decode", "_apply") if name in vae.__dict__]
    if patched or handle_of(vae) is not None:
        raise BenchError(f"the diffusers baseline is patched: {', '.join(patched) or 'by accelerate()'}")


@contextmanager
def _diffusers(vae: nn.Module, trial: Trial, folder: Path) -> Iterator[Run]:
    _require_unpatched(vae)
    yield _call(vae, trial.task)
    _require_unpatched(vae)


@contextmanager
def _compiled(vae: nn.Module, trial: Trial, folder: Path) -> Iterator[Run]:
    """diffusers with ``torch.compile`` on its network, for any size: one compilation serves a whole run."""
    network: Any = vae.get_submodule("decoder" if trial.task == "decode" else "encoder")
    network.compile(dynamic=True)
    with _diffusers(vae, trial, folder) as run:
        yield run


@contextmanager
def _accelerated(vae: nn.Module, trial: Trial, folder: Path, *, backend: str, multi_profile: bool) -> Iterator[Run]:
    needs_engines = isinstance(get_backend(backend), EngineBackend)
    config = AccelConfig(
        task="t2i" if trial.task == "decode" else "i2i",
        backend=backend,
        engine_dir=str(folder / SHORT[trial.method.dtype]) if needs_engines else None,
        multi_profile=multi_profile,
        sizes=None if multi_profile else (str(trial.size),),
        on_miss="build" if needs_engines else None,
        decode_dtype=FLOAT8 if trial.method.float8 else None,
    )
    with accelerate(vae, config) as handle:
        yield _call(vae, trial.task)
        report = handle.report().as_dict()
        if set(report["calls"][trial.task]) != {backend}:
            reasons = "; ".join(f["reason"] for f in report["fallbacks"])
            raise BenchError(f"served by {', '.join(report['calls'][trial.task])} instead: {reasons}")


@contextmanager
def _fastvae(vae: Any, trial: Trial, folder: Path) -> Iterator[Run]:
    """fastvae's adapter for Wan 2.1, fed the same weights under the same names."""
    names = set(inspect.signature(AutoencoderKLWan.__init__).parameters)
    wan = AutoencoderKLWan(**{name: value for name, value in vae.config.items() if name in names})
    wan.load_state_dict(vae.state_dict())
    decoder = importlib.import_module("fastvae").FastVAEDecoder.from_vae(wan.to(vae.device, vae.dtype).eval())
    yield lambda z: decoder.decode(z)[:, :, 0]


def method_names() -> dict[str, Prepare]:
    """All methods by name."""
    found: dict[str, Prepare] = {BASELINE: _diffusers, "diffusers-compile": _compiled}
    for direct in direct_backends():
        found[direct.name] = partial(_accelerated, backend=direct.name, multi_profile=False)
    for engine in engine_backends():
        found[engine.name] = partial(_accelerated, backend=engine.name, multi_profile=False)
        found[engine.name + _SUFFIX] = partial(_accelerated, backend=engine.name, multi_profile=True)
    if importlib.util.find_spec("fastvae") is not None:
        found["fastvae"] = _fastvae
    return found


def parse_method(text: str, default: torch.dtype) -> Method:
    """``NAME`` or ``NAME:DTYPE`` -> :class:`Method`.

    Raises:
        ConfigError: for a name or dtype that is not known.
    """
    name, _, kind = text.strip().partition(":")
    known = method_names()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
        raise ConfigError(f"method {name!r} is not known{hint}")
    dtype = default
    if name == "fused" and kind in ("fp8", FLOAT8):
        dtype = torch.float8_e4m3fn
    elif kind:
        dtype = _DTYPES.get(kind) or getattr(torch, dtype_name(kind))
    return Method(name, dtype, known[name])


def default_methods(vae: nn.Module, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The baseline and every backend that can run here; on the GPU also diffusers compiled, and our own kernels in fp16."""
    environment = Environment.detect(device)
    topology = ModelSource(vae).topology
    names = [BASELINE]
    candidates = [(backend.name, dtype) for backend in reversed((*engine_backends(), *direct_backends()))]
    if device.type == "cuda":
        names.append("diffusers-compile")
        candidates += [(backend.name, torch.float16) for backend in direct_backends()[:-1] if dtype != torch.float16]
    for name, kind in candidates:
        if not any(get_backend(name).reasons(environment, Job(task, topology, kind, device)) for task in DIRECTIONS):
            names.append(f"{name}:{SHORT[kind]}")
    if not get_backend("fused").reasons(environment, Job("decode", topology, torch.bfloat16, device, float8=True)):
        names.append("fused:fp8")
    return names


def parse_sizes(texts: Iterable[str]) -> list[Size]:
    """Names or WxH -> sizes, rounded down to multiples of 16 as the pipelines do."""
    sizes = list(dict.fromkeys(parse_size(text.strip()).floor(STATIC_MULTIPLE) for text in texts))
    if not sizes or any(min(size.width, size.height) < STATIC_MULTIPLE for size in sizes):
        raise ConfigError(f"sizes must be at least {STATIC_MULTIPLE} pixels a side")
    return sizes
