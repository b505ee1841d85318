"""What a TensorRT build can be told, checked here: Torch-TensorRT itself swallows settings that it does not know."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_vae_accel.config import unknown_key
from qwen_vae_accel.errors import ConfigError, shown
from qwen_vae_accel.model.spelling import QUERY_LIMIT

Capability = tuple[int, int]

_NUMBER = re.compile(r"[0-9]{1,18}")
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)")


def parse_capabilities(text: str) -> tuple[Capability, ...]:
    """``"8.9"`` or ``"8.6,8.9,12.0"`` -> compute capabilities, sorted.

    Raises:
        ConfigError: for anything else.
    """
    found = []
    for part in text.split(","):
        match = _CAPABILITY.fullmatch(part.strip())
        if match is None:
            what = f"compute capability {shown(part.strip())}"
            raise ConfigError(f"{what} must be MAJOR.MINOR, such as 8.9 (several: 8.6,8.9,12.0)")
        found.append((int(match[1]), int(match[2])))
    return tuple(sorted(set(found)))


def capability_text(capability: Capability) -> str:
    """``(8, 9)`` -> ``"8.9"``."""
    return f"{capability[0]}.{capability[1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """How engines are built.

    Attributes:
        optimization_level: TensorRT's builder effort, 0 to 5; None: its default (3).
        hardware_compatible: an engine for any GPU of compute capability 8.0 or later. Slower; not for TensorRT-RTX, whose
            engines take several compute capabilities instead.
        version_compatible: an engine for later TensorRT releases of the same major version too. Not for TensorRT-RTX.
        tf32: let float32 engines multiply in TF32, as PyTorch does for convolutions by default.
        query_limit: queries per run of the attention, see :class:`qwen_vae_accel.model.spelling.ChunkedAttention`.

    Raises:
        ConfigError: for an invalid value.
    """

    optimization_level: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    tf32: bool = True
    query_limit: int = QUERY_LIMIT

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and (isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= 5):
            raise ConfigError(f"optimization_level must be a whole number from 0 to 5, not {level!r}")
        for name in ("hardware_compatible", "version_compatible", "tf32"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        limit = self.query_limit
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"query_limit must be a positive whole number, not {limit!r}")

    @classmethod
    def from_text(cls, pairs: Iterable[str]) -> BuildSettings:
        """Settings from ``NAME=VALUE`` texts; values are ``true``, ``false`` or whole numbers.

        Raises:
            ConfigError: for anything else.
        """
        values: dict[str, Any] = {}
        for pair in pairs:
            name, _, text = pair.partition("=")
            value = {"true": True, "false": False}.get(text.strip().lower())
            if value is None and not _NUMBER.fullmatch(text.strip()):
                raise ConfigError(f"setting {shown(pair)} must be NAME=VALUE, the value true, false or a whole number")
            values[name.strip()] = int(text) if value is None else value
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BuildSettings:
        """Settings by name.

        Raises:
            ConfigError: for a name that nothing reads, with the nearest one that something does.
        """
        names = tuple(field.name for field in dataclasses.fields(cls))
        for key in values:
            if key not in names:
                raise ConfigError(f"TensorRT setting: {unknown_key(key, names)}")
        return cls(**values)
