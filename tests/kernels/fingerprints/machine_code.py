"""Hashes of machine code: Triton's and NVRTC's, neither of which needs a GPU. Not to be used where Triton interprets."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qwen_vae_accel import kernels
from qwen_vae_accel.kernels import compiling
from qwen_vae_accel.kernels.sm90 import attention as attention_sm90
from qwen_vae_accel.kernels.sm90 import conv3x3, nvrtc
from tests.kernels.fingerprints.plans import digest
from tests.kernels.fingerprints.subjects import CAPABILITIES, META, NETWORKS, gpus_of, make, pretended_gpu

# The kernels of sm90 write code of their own for float16; Triton's differ in types alone.
DTYPES = {"H200": (torch.bfloat16, torch.float16)}


def versions() -> dict[str, str | None]:
    """Of the compilers; other versions make other code."""
    return {"triton": importlib.metadata.version("triton"), "nvrtc": nvrtc.version()}


class _Driver:
    """As much of Triton's driver as compiling for ``capability`` asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # functions keep what they have compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _triton(capability: int, task: Callable[[], Any]) -> str:
    from triton.runtime.driver import driver

    driver.set_active(_Driver(capability))
    kernel = task()
    return hashlib.sha256(kernel.asm["cubin"]).hexdigest()


def _sm90(key: tuple[Any, ...]) -> str:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        attention = key[0] == "attention"
        cubin = attention_sm90.compile_attention(*key[1:]) if attention else conv3x3.compile_variant(*key[:2])
    return hashlib.sha256(cubin).hexdigest()


def _codes(name: str, gpu: str, dtype: torch.dtype, known: dict[Any, str], steps: Callable[[str], bool]) -> Iterator[str]:
    """Hashes of the kernels that those ``steps`` of a network launch, images from 64 pixels a side."""
    network = make(name, gpu, dtype)
    with compiling.collecting() as tasks:
        for shape in network.usual_shapes():
            launches = network.launches(shape)
            memory = launches.memory(torch.empty(shape, dtype=dtype, device=META))
            for step in launches.steps:
                if steps(step.kernel):
                    step.launch(memory)
    for key, task in tasks.items():
        unique = (CAPABILITIES[gpu], key)
        if unique not in known:
            nvrtcs = isinstance(key, tuple) and not isinstance(key[0], int)
            known[unique] = _sm90(key) if nvrtcs else _triton(CAPABILITIES[gpu], task)
        yield known[unique]


@contextlib.contextmanager
def _compilers() -> Iterator[None]:
    """Inside, Triton compiles anew, and without file names and line numbers, which would be part of the code."""
    with tempfile.TemporaryDirectory() as cache, pretended_gpu():
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
        os.environ["TRITON_CACHE_DIR"] = cache
        yield


def machine_code(wanted: Callable[[str], bool]) -> dict[str, str]:
    """Name of a network, GPU and dtype -> a hash of the machine code of all its kernels, for names that are ``wanted``."""
    known: dict[Any, str] = {}
    found = {}
    with _compilers():
        for gpu, capability in CAPABILITIES.items():
            for dtype in DTYPES.get(gpu, (torch.bfloat16,)):
                for name in NETWORKS:
                    place = f"{name}, {gpu}, {str(dtype).removeprefix('torch.')}"
                    if gpu in gpus_of(name) and wanted(place) and not ("float8" in name and capability < 89):
                        codes = sorted(_codes(name, gpu, dtype, known, lambda kernel: True))
                        found[place] = f"{len(codes)} kernels {digest(codes)}"
    return found


SAMPLES = {"triton": "conv_out sum 3", "nvrtc": "conv3x3 96->96 norm"}


def samples() -> dict[str, str]:
    """A hash of one kernel of each compiler that is here, quickly made."""
    here = versions()  # not inside, where NVRTC is pretended to be there
    with _compilers():
        return {
            compiler: digest(sorted(_codes("decode", "H200", torch.bfloat16, {}, sample.__eq__)))
            for compiler, sample in SAMPLES.items()
            if here[compiler] is not None
        }


def sources() -> dict[str, str]:
    """Hashes of the text that machine code is made of, without comments: nothing has to be compiled for them."""
    functions = {}
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            function = getattr(value, "_jit", value)
            if type(function).__name__ in ("JITFunction", "InterpretedFunction"):
                source = inspect.getsource(function.fn)
                functions[name] = ast.unparse(ast.parse(source[source.index("def ") :]))
    texts = [path.read_text() for path in sorted(Path(nvrtc.__file__).parent.rglob("*.cu*"))]
    cuda = [" ".join(re.sub(r"//.*", "", text).split()) for text in texts]
    return {"triton": digest(functions), "nvrtc": digest(cuda)}
