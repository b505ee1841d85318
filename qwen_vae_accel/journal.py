"""What happened: calls by method and backend, fallbacks with their reasons, engines loaded and released."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from qwen_vae_accel.config import dtype_name
from qwen_vae_accel.terminal import plain, visible
from qwen_vae_accel.visits import fork_safe_lock

logger = logging.getLogger(__name__)

ORIGINAL = "diffusers"


@dataclass(frozen=True, slots=True)
class Fallback:
    """A call that went another way than the configuration asks for."""

    method: str
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Banded:
    """A call of one size that ran in so many bands of rows, and why. Its result is that of one piece."""

    method: str
    size: str
    backend: str
    bands: int
    reason: str


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One engine brought into memory; ``ms`` covers hashing and loading, not the self-check."""

    engine: str
    backend: str
    ms: float
    nbytes: int


class Journal:
    """Counts events of one handle; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._fallbacks: Counter[Fallback] = Counter()
        self._banded: Counter[Banded] = Counter()
        self._loads: list[EngineLoad] = []
        self._builds: list[tuple[str, float]] = []
        self._checks: list[tuple[str, float]] = []
        self._evictions = 0
        self._left_alone: list[str] = []
        self._arithmetic: dict[str, str] = {}

    def served(self, method: str, backend: str, reason: str = "") -> None:
        """Count a call of ``method`` that ``backend`` (:data:`ORIGINAL`: diffusers' own code) served.

        With a ``reason`` it went another way than the configuration asks for. This is the one place that counts such calls by
        their reasons, and logs each reason the first time.
        """
        with self._lock:
            self._calls[method, backend] += 1
            if not reason:
                return
            key = Fallback(method, backend, reason)
            self._fallbacks[key] += 1
            if self._fallbacks[key] > 1:
                return
        logger.warning("%s", visible(f"{method} is served by {backend}: {reason}"))

    def banded(self, event: Banded) -> None:
        """Count a call that ran in bands; the first of its kind is logged."""
        with self._lock:
            self._banded[event] += 1
            if self._banded[event] > 1:
                return
        logger.info("%s of %s: %s in %d bands: %s", event.method, event.size, event.backend, event.bands, event.reason)

    def load(self, event: EngineLoad) -> None:
        """An engine was loaded."""
        with self._lock:
            self._loads.append(event)

    def build(self, engine: str, seconds: float) -> None:
        """An engine was built."""
        with self._lock:
            self._builds.append((engine, seconds))

    def verify(self, engine: str, ms: float) -> None:
        """An engine ran its self-check."""
        with self._lock:
            self._checks.append((engine, ms))

    def evict(self) -> None:
        """An engine was released."""
        with self._lock:
            self._evictions += 1

    def compute(self, method: str, asked: torch.dtype, used: torch.dtype, reason: str) -> None:
        """``method`` computes in ``used`` where ``asked`` is the dtype of its input and output, and why."""
        text = f"{dtype_name(asked)} is computed in {dtype_name(used)}: {reason}"
        with self._lock:
            known = self._arithmetic.get(method)
            self._arithmetic[method] = text
        if known != text:
            logger.info("%s: %s", method, text)

    def leave_alone(self, method: str, reason: str) -> None:
        """``method`` stays as it was found."""
        with self._lock:
            self._left_alone.append(f"{method}: {reason}")

    def report(self, backend: str, resident: list[str], note: str = "", offloaded: int = 0) -> Report:
        """What happened so far."""
        with self._lock:
            calls: dict[str, dict[str, int]] = {"encode": {}, "decode": {}}
            for (method, name), count in self._calls.items():
                calls.setdefault(method, {})[name] = count
            return Report(
                {
                    "backend": backend,
                    "calls": calls,
                    "fallbacks": [
                        {"method": f.method, "backend": f.backend, "reason": f.reason, "count": count}
                        for f, count in self._fallbacks.items()
                    ],
                    "bands": [{**asdict(event), "count": count} for event, count in self._banded.items()],
                    "engines": resident,
                    "loads": len(self._loads),
                    "evictions": self._evictions,
                    "load_ms": [
                        {"engine": e.engine, "backend": e.backend, "ms": e.ms, "nbytes": e.nbytes} for e in self._loads
                    ],
                    "builds": [{"engine": name, "seconds": seconds} for name, seconds in self._builds],
                    "self_checks": [{"engine": name, "ms": ms} for name, ms in self._checks],
                    "offloaded_bytes": offloaded,
                    "arithmetic": dict(self._arithmetic),
                    "left_alone": list(dict.fromkeys(self._left_alone)),
                    "note": note,
                }
            )


class Report:
    """A snapshot of a handle's journal: a table when printed with rich, JSON values through :meth:`as_dict`."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values.

        Keys: ``backend`` (configured), ``calls`` (method -> backend -> count), ``fallbacks`` (method, backend that served,
        reason, count), ``bands`` (method, size, backend, number of bands, reason, count),
        ``engines`` (loaded now), ``loads``, ``evictions``, ``load_ms`` (one entry per load), ``builds``,
        ``self_checks``, ``offloaded_bytes`` (of the VAE's own weights, kept in CPU memory), ``arithmetic`` (method -> the dtype
        it computes in and why, where that is not the one asked for), ``left_alone`` (what was not replaced, and why), ``note``.
        """
        return self._values

    def __rich__(self) -> RenderableType:
        values = self._values
        calls = Table()
        for column in ("method", "served by", "calls"):
            calls.add_column(column, justify="right" if column == "calls" else "left")
        for method, served in values["calls"].items():
            for name, count in sorted(served.items()):
                calls.add_row(plain(method), plain(name), str(count))
        parts: list[RenderableType] = [plain(f"qwen_vae_accel, backend {values['backend']}", "bold"), calls]
        if values["load_ms"]:
            loads = Table()
            for column in ("engine", "backend", "load ms", "MB", "loaded"):
                loads.add_column(column, justify="left" if column in ("engine", "backend") else "right")
            for load in values["load_ms"]:
                loaded = "yes" if load["engine"] in values["engines"] else "no"
                loads.add_row(
                    plain(load["engine"]),
                    plain(load["backend"]),
                    f"{load['ms']:.1f}",
                    f"{load['nbytes'] / 1e6:.1f}",
                    loaded,
                )
            parts += [plain(f"engines: {values['loads']} loads, {values['evictions']} releases", style="bold"), loads]
        if values["fallbacks"]:
            table = Table()
            for column in ("method", "served by", "times", "reason"):
                table.add_column(column)
            for f in values["fallbacks"]:
                table.add_row(plain(f["method"]), plain(f["backend"]), str(f["count"]), plain(f["reason"]))
            parts += [plain("fallbacks", style="bold"), table]
        parts += [
            plain(f"{b['method']} {b['size']}: {b['backend']} ({b['bands']} bands), {b['count']} times: {b['reason']}")
            for b in values["bands"]
        ]
        parts += [plain(f"{method}: {text}") for method, text in values["arithmetic"].items()]
        parts += [plain(f"left alone: {text}") for text in values["left_alone"]]
        if values["note"]:
            parts.append(plain(values["note"]))
        return Group(*parts)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
