"""The list of backends: the one place that changes when a backend is added."""

from __future__ import annotations

from qwen_vae_accel.backends.base import Backend, DirectBackend, EngineBackend
from qwen_vae_accel.backends.eager import EagerBackend
from qwen_vae_accel.backends.fused.backend import FusedBackend
from qwen_vae_accel.backends.inductor import InductorBackend
from qwen_vae_accel.backends.tensorrt import TensorRTBackend
from qwen_vae_accel.errors import BackendUnavailableError

# In the order of preference of backend="auto": engines, which somebody made on purpose, then the fastest.
_BACKENDS: tuple[Backend, ...] = (TensorRTBackend(), InductorBackend(), FusedBackend(), EagerBackend())


def engine_backends() -> tuple[EngineBackend, ...]:
    """Backends that need engine files, in the order of preference."""
    return tuple(backend for backend in _BACKENDS if isinstance(backend, EngineBackend))


def direct_backends() -> tuple[DirectBackend, ...]:
    """Backends that need none, fastest first; the last can always run."""
    return tuple(backend for backend in _BACKENDS if isinstance(backend, DirectBackend))


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        BackendUnavailableError: if this release has none.
    """
    for backend in _BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for backend in _BACKENDS)
    raise BackendUnavailableError(name, [f"this release does not have it; it has {known}"])
