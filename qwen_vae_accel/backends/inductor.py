"""Backend ``inductor``: the exact image networks compiled ahead of time by AOTInductor into ``.pt2`` packages.

A package holds native code and the weights. It needs a C++ compiler to build (on the GPU also Triton) and none to load.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qwen_vae_accel import caches
from qwen_vae_accel.backends.base import NO_FLOAT8, EngineBackend, EngineImage, Environment, Job, export_network
from qwen_vae_accel.backends.unpacked import unpack
from qwen_vae_accel.model.spelling import QUERY_LIMIT, query_chunks, spell
from qwen_vae_accel.plan import EngineKey

_CPU = torch.device("cpu")

# It runs in an empty folder, so that nothing of the current one is imported, with the paths that this process imports from.
_TEST_LOAD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import torch
kind, *arguments = json.loads(sys.argv[2])
if kind.endswith("Cuda"):
    torch.zeros(1, device=arguments[2])  # the runner takes it for granted that PyTorch has begun to use the GPU
getattr(torch._C._aoti, kind)(*arguments)
"""


def _runner(library: Path, device: torch.device) -> tuple[Any, ...]:
    """The name of torch's class that runs ``library`` on ``device``, and its arguments: one run at a time."""
    name = _spelled(library)
    if device.type == "cpu":
        return "AOTIModelContainerRunnerCpu", name, 1
    return "AOTIModelContainerRunnerCuda", name, 1, f"cuda:{device.index or 0}", _spelled(library.parent)


def _load_elsewhere(path: Path, device: torch.device = _CPU) -> None:
    """Load a fresh package in another process first: code of a mismatched C++ compiler crashes whoever loads it."""
    library = unpack(EngineImage.read(path)).library
    paths = [entry for entry in sys.path if os.path.isabs(entry)]
    arguments = [json.dumps(paths), json.dumps(_runner(library, device))]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-c", _TEST_LOAD, *arguments],
            cwd=empty,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode < 0:
        compiler = os.environ.get("CXX", "g++")
        raise RuntimeError(
            f"the package crashes when it is loaded (signal {-done.returncode}). Most often the compiler {compiler!r} is newer "
            "than the C++ library of the running Python: set CXX to the system's own g++ and build again"
        )
    if done.returncode:
        raise RuntimeError(f"the package does not load: {done.stderr.strip().splitlines()[-1:]}")


def _spelled(path: Path) -> str:
    """``path`` as torch's C++ takes it, which is UTF-8 and ends the process where a name is not.

    Raises:
        RuntimeError: in UTF-8 it would be another file, or none.
    """
    text = str(path)
    if os.fsencode(text) != text.encode("utf-8", "replace"):
        raise RuntimeError(
            f"torch opens packages by names in UTF-8, and {ascii(text)} is not one "
            f"(file names here are in {sys.getfilesystemencoding()}): name another folder, or set PYTHONUTF8=1"
        )
    return text


class InductorProgram:
    """A loaded package. It takes contiguous input only: the strides it was compiled for are part of its code."""

    def __init__(self, image: EngineImage, device: torch.device) -> None:
        kind, *arguments = _runner(unpack(image).library, device)
        self._runner = getattr(torch._C._aoti, kind)(*arguments)
        self.nbytes = len(image.data)

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
        output: Tensor = self._runner.run([x.contiguous()])[0]
        return output


class InductorBackend(EngineBackend):
    """AOTInductor packages: static sizes, or one package for the whole range of several profiles."""

    name: ClassVar[str] = "inductor"
    suffix: ClassVar[str] = ".pt2"

    def reasons(self, environment: Environment, job: Job) -> list[str]:
        if environment.device_type not in ("cpu", "cuda"):
            return [f"device type {environment.device_type!r} is not one of cpu and cuda, which it compiles for"]
        return [NO_FLOAT8] if job.float8 else []

    def build_reasons(self) -> list[str]:
        """Why nothing can be compiled here, though packages could be loaded."""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return [f"AOTInductor needs a C++ compiler, and {compiler!r} is not on the PATH (set CXX)"]
        return []

    def identity(self, environment: Environment) -> dict[str, str]:
        facts = environment.describe()
        names = ("device", "device_name", "compute_capability", "cuda", "platform", "package:torch")
        return {name: facts[name] for name in names if name in facts}

    def build(self, model: nn.Module, job: Job, key: EngineKey, path: Path) -> tuple[int, ...] | None:
        reasons = self.build_reasons()
        if reasons:
            raise RuntimeError("; ".join(reasons))
        name = _spelled(path)
        caches.prepare()
        height, width = job.input_hw(key.profiles[0].optimum)
        example = torch.zeros(1, job.in_channels, height, width, dtype=job.dtype, device=job.device)
        if job.device.type == "cuda":
            scale = job.topology.scale if job.method == "encode" else 1
            most = max(math.prod(job.input_hw(profile.maximum)) for profile in key.profiles) // scale**2
            model = spell(model, query_chunks(most, QUERY_LIMIT))
        low = tuple(map(min, zip(*(job.input_hw(profile.minimum) for profile in key.profiles), strict=True)))
        high = tuple(map(max, zip(*(job.input_hw(profile.maximum) for profile in key.profiles), strict=True)))
        program = export_network(model, example, low, high, job.multiple)
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=name)
        _load_elsewhere(path, job.device)
        return None

    def load(self, image: EngineImage, job: Job, key: EngineKey) -> InductorProgram:
        return InductorProgram(image, job.device)
