"""Building engines on a machine without a GPU: what ``import torch_tensorrt`` asks of one, answered for the target.

TensorRT-RTX compiles for a compute capability that it is told, so no GPU is needed; but Torch-TensorRT asks PyTorch for
the GPU when it is imported. The answers given here hold only while :func:`torch_tensorrt_for` is open, and only on a
machine where PyTorch has no GPU. Nothing is run on the target's behalf: an engine built so is first checked there.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from qwen_vae_accel.backends.base import Environment
from qwen_vae_accel.backends.tensorrt.settings import Capability, capability_text

_lock = threading.RLock()


def target_environment(here: Environment, targets: Sequence[Capability]) -> Environment:
    """A machine with a GPU of ``targets``, and the software of ``here``: what a cross-built engine's identity is read from."""
    names = ", ".join(map(capability_text, targets))
    return Environment(
        device_type="cuda",
        device_name=f"any GPU of compute capability {names} (cross-built)",
        capability=targets[0],
        platform=here.platform,
        packages=here.packages,
    )


@contextmanager
def torch_tensorrt_for(capability: Capability | None) -> Iterator[ModuleType]:
    """The module ``torch_tensorrt``, usable inside the block; one thread at a time, since its registries are global.

    Args:
        capability: what to say the GPU is, where there is none; None: there must be one.

    Raises:
        ImportError: if it is not installed, or its libraries do not load.
    """
    with _lock, ExitStack() as stack:
        if capability is not None and not torch.cuda.is_available():
            for stand_in in _stand_ins(capability):
                stack.enter_context(stand_in)
        with _quiet("torch_tensorrt"):
            module = import_module("torch_tensorrt")
        yield module


def _stand_ins(capability: Capability) -> list[AbstractContextManager[object]]:
    def device_capability(device: Any = None) -> Capability:
        return capability

    found: list[AbstractContextManager[object]] = [
        _replaced(torch.cuda, "get_device_capability", device_capability),
        _replaced(torch.cuda, "current_device", lambda: 0),
    ]
    if torch.version.cuda is None:
        # A CPU build of PyTorch lacks a class that Torch-TensorRT names in annotations, and the libraries that its own
        # runtime library links to; without that library it uses its Python runtime, and we use neither.
        found.append(_replaced(torch._C, "_CudaDeviceProperties", type("_CudaDeviceProperties", (), {})))
        found.append(_replaced(os.path, "isfile", _hiding("libtorchtrt", os.path.isfile)))
    return found


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _hiding(name: str, isfile: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def hidden(path: Any) -> bool:
        return not (isinstance(path, str) and name in os.path.basename(path)) and isfile(path)

    return hidden


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep Torch-TensorRT's remarks on optional parts that are not installed out of the log."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def common_processor(machine: str) -> str:
    """One name for what Linux calls ``x86_64`` and ``aarch64``, and Windows ``AMD64`` and ``ARM64``."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())
