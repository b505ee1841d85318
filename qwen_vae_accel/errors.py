"""Every error this package raises on purpose, and the base class to catch them all."""

from __future__ import annotations

from collections.abc import Iterable


def _bullets(reasons: Iterable[str]) -> str:
    return "".join(f"\n  - {reason}" for reason in reasons)


def shown(value: object) -> str:
    """``repr`` for messages: of anything that anybody may give, and not longer than a line or two."""
    try:
        text = repr(value)
    except Exception:  # thousands of digits, too deep, or a class that fails
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"


class AccelError(Exception):
    """Base class of all errors of qwen_vae_accel."""


class ConfigError(AccelError, ValueError):
    """An invalid configuration: an unknown key, a wrong type, a value out of range."""


class InvalidInputError(AccelError, ValueError):
    """Input that cannot be used: a tensor of a wrong rank, channels, device, dtype or size; a file of another kind."""


class UnsupportedVAEError(AccelError, TypeError):
    """The model is no VAE of Qwen-Image, Qwen-Image 2.1 or Wan 2.1; ``reasons`` lists the differences found."""

    def __init__(self, what: str, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"cannot accelerate {what}:{_bullets(self.reasons)}")


class BackendUnavailableError(AccelError, RuntimeError):
    """A backend that was asked for by name cannot run here; ``reasons`` says why."""

    def __init__(self, backend: str, reasons: Iterable[str], hint: str = "") -> None:
        self.backend = backend
        self.reasons = tuple(reasons)
        super().__init__(f"backend {backend!r} cannot be used here:{_bullets(self.reasons)}" + (f"\n{hint}" if hint else ""))


class EngineError(AccelError, RuntimeError):
    """An engine, or the directory that holds engines, cannot be used."""


class LockedError(EngineError):
    """Another process works on the same engine or the manifest, and gave no sign of life for too long."""


class EngineMissingError(EngineError):
    """No engine of the plan serves the request, and ``on_miss="error"``."""


class EngineRefusedError(EngineError):
    """An engine file exists but must not be run here; ``differences`` lists why."""

    def __init__(self, engine: str, differences: Iterable[str], hint: str = "") -> None:
        self.engine = engine
        self.differences = tuple(differences)
        super().__init__(f"engine {engine} is refused:{_bullets(self.differences)}" + (f"\n{hint}" if hint else ""))


class BuildError(EngineError):
    """A backend failed to build an engine; nothing that was there before is lost."""


class TuningError(AccelError, RuntimeError):
    """Tuned kernels do not compute what the shipped ones do; nothing was stored."""


class HandleError(AccelError, RuntimeError):
    """An accelerated VAE used against its handle's state: restored, replaced, configured twice."""
