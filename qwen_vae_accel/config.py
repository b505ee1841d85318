"""What the user wants, as one frozen value: JSON in and out, the guide's documents included."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from qwen_vae_accel.documents import parse_json, read_json
from qwen_vae_accel.errors import ConfigError, shown
from qwen_vae_accel.files import is_path
from qwen_vae_accel.plan import Plan
from qwen_vae_accel.sizes import LATENT_SCALE, PRESETS, Size

logger = logging.getLogger(__name__)

VERSION = 1
TASKS = ("t2i", "i2i")
BACKENDS = ("auto", "tensorrt", "inductor", "fused", "eager")
ENGINE_BACKENDS = ("tensorrt", "inductor")
ON_MISS = ("build", "fallback", "error")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
FLOAT8 = "float8_e4m3fn"
_FLOAT8_NAMES = (FLOAT8, "torch.float8_e4m3fn", "float8", "fp8")
_FLOAT8_BACKENDS = ("auto", "fused")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)", re.IGNORECASE)
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)\s*%")
_DIGITS = re.compile(r"\d{1,19}|0?\.\d{1,19}")
_MOST_BYTES = 2**63
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgt", start=1)
}


def _bytes(value: object) -> int | None:
    """Bytes from ``4294967296`` or ``"4GiB"``; None for anything else."""
    size: float = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _BYTES.fullmatch(value.strip())):
        size = float(match[1]) * _UNITS[match[2].lower()]
    return int(size) if 1 <= size < _MOST_BYTES else None


def parse_bytes(value: int | str) -> int:
    """``4294967296`` or ``"4GiB"`` -> bytes."""
    size = _bytes(value)
    if size is None:
        raise ConfigError(f"vram_budget {shown(value)} must be a positive number of bytes, or text such as '4GiB'")
    return size


def parse_limit(value: float | str) -> int | float:
    """``2147483648`` or ``"2GiB"`` -> bytes, an int; ``0.5`` or ``"50%"`` -> a share, a float between 0 and 1."""
    size = _bytes(value)
    if size is not None:
        return size
    share = value if isinstance(value, float) else 0.0
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        share = float(match[1]) / 100
    elif isinstance(value, str) and _DIGITS.fullmatch(value.strip()):  # as the command line has it
        return parse_limit(float(value) if "." in value else int(value))
    if not 0 < share < 1:
        raise ConfigError(
            f"memory_limit {shown(value)} must be a positive number of bytes (a whole number, or text such as '2GiB'), or a "
            "share of the free memory: a number between 0 and 1, or text such as '50%'"
        )
    return share


def dtype_name(value: str | torch.dtype) -> str:
    """A dtype as torch names it, without ``torch.``."""
    name = str(value).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if str(value) in _FLOAT8_NAMES:
        raise ConfigError(f"dtype {str(value)!r} is for decode_dtype only; the others are {', '.join(DTYPES)}")
    if name not in DTYPES:
        raise ConfigError(f"dtype {shown(str(value))} is not one of {', '.join(DTYPES)}")
    return name


def unknown_key(key: object, allowed: tuple[str, ...]) -> str:
    """The error text for a key that nothing reads."""
    near = nearest(key, allowed, 0.5)
    return f"unknown key {shown(key)}" + (f"; did you mean {near!r}?" if near else f"; known are {', '.join(allowed)}")


def nearest(given: object, allowed: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The allowed name that ``given`` may have been meant to be."""
    matches = get_close_matches(given, list(allowed), n=1, cutoff=cutoff) if isinstance(given, str) and len(given) < 100 else []
    return matches[0] if matches else None


@dataclass(frozen=True, kw_only=True)
class AccelConfig:
    """How a VAE is to be accelerated. All fields have a default; all are checked when the value is made.

    Attributes:
        task: ``"t2i"`` (text-to-image) or ``"i2i"`` (image editing); ``warmup`` leaves the encoder out for t2i.
        backend: ``"auto"`` takes an engine where one fits, else the first backend that can run; a name is taken or
            refused with its reasons.
        engine_dir: folder of compiled engines; None: no engines.
        multi_profile: one engine of several optimization profiles instead of one engine per size. None: for ``"i2i"`` where no
            ``sizes`` are given.
        sizes: sizes to have engines for: names, ``"WIDTHxHEIGHT"``, with ``multi_profile`` also ``"MIN:OPT:MAX"``; or a mapping
            of names to these, kept as ``"NAME=SIZE"``; or the name of a whole table, ``"guide"`` or ``"lightx2v"``.
            None: the guide's five sizes or nine profiles.
        dtype: compute dtype, ``"float32"``, ``"bfloat16"`` or ``"float16"``; None: the VAE's. Results always come back
            in the VAE's dtype.
        encode_dtype: overrides ``dtype`` for encoding (its error compounds over edits).
        decode_dtype: overrides ``dtype`` for decoding; also ``"float8_e4m3fn"``: the costly convolutions in float8 by the
            ``fused`` backend (compute capability 8.9 and later), the other layers in ``dtype`` (bfloat16 for a float32 VAE).
        max_resident: how many sizes keep their engines loaded; None: as many as ``vram_budget`` holds. The guide's is 1.
        vram_budget: bytes that loaded engines may take together, or text such as ``"4GiB"``.
        memory_limit: scratch memory of a call of backend ``fused``, which is what it allocates above its weights beside the
            output: bytes (``2147483648``, ``"2GiB"``), or a share of what is free when a size is first seen (``0.5``,
            ``"50%"``). What would take more runs in bands of rows, with the same result. None: 4e9 bytes.
        on_miss: what to do when no usable engine is there: ``"build"`` it, ``"fallback"`` to a backend that needs none,
            or ``"error"``. None: build when an engine backend is named and ``engine_dir`` given, else fall back.
        verify: run an engine once against the exact network in float64 before its first use on a machine.
        preprocess: make the tensors of editing pipelines' PIL images on the GPU, bit for bit as diffusers does.
        postprocess: make a pipeline's PIL images and arrays on the GPU too, byte for byte as diffusers does.
        offload_reference: keep the VAE's own weights in CPU memory; they come back for whatever runs the original methods.
    """

    task: str = "t2i"
    backend: str = "auto"
    engine_dir: str | None = None
    multi_profile: bool | None = None
    sizes: tuple[str, ...] | None = None
    dtype: str | None = None
    encode_dtype: str | None = None
    decode_dtype: str | None = None
    max_resident: int | None = None
    vram_budget: int = 4 * 2**30
    memory_limit: int | float | None = None
    on_miss: str | None = None
    verify: bool = True
    preprocess: bool = True
    postprocess: bool = True
    offload_reference: bool = False

    def __post_init__(self) -> None:
        self._one_of("task", TASKS)
        self._one_of("backend", BACKENDS)
        if self.on_miss is not None:
            self._one_of("on_miss", ON_MISS)
        for name in ("multi_profile", "verify", "preprocess", "postprocess", "offload_reference"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "multi_profile" and value is None):
                raise ConfigError(f"{name} must be true or false, not {shown(value)}")
        for name in ("dtype", "encode_dtype", "decode_dtype"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, (str, torch.dtype)):
                    raise ConfigError(f"{name} must be a dtype's name, not {shown(value)}")
                eight = name == "decode_dtype" and str(value) in _FLOAT8_NAMES
                object.__setattr__(self, name, FLOAT8 if eight else dtype_name(value))
        if self.decode_dtype == FLOAT8:
            self._check_float8()
        if self.engine_dir is not None:
            if not isinstance(self.engine_dir, (str, Path)) or not is_path(str(self.engine_dir)):
                raise ConfigError(f"engine_dir must be a folder's path, not {shown(self.engine_dir)}")
            if os.path.expanduser(self.engine_dir).startswith("~"):
                raise ConfigError(f"engine_dir {shown(str(self.engine_dir))}: there is no such home folder on this machine")
            object.__setattr__(self, "engine_dir", str(self.engine_dir))
        limit = self.max_resident
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= 1024):
            raise ConfigError(f"max_resident must be a whole number from 1 to 1024, not {shown(limit)}")
        object.__setattr__(self, "vram_budget", parse_bytes(self.vram_budget))
        if self.memory_limit is not None:
            object.__setattr__(self, "memory_limit", parse_limit(self.memory_limit))
        if self.sizes is not None:
            object.__setattr__(self, "sizes", _size_texts(self.sizes))
        self.plan()
        if self.on_miss == "build" and self.engine_dir is None:
            raise ConfigError("on_miss='build' needs an engine_dir to build into")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            near = nearest(value, allowed)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {shown(value)}{hint}")

    def _check_float8(self) -> None:
        if self.backend not in _FLOAT8_BACKENDS:
            raise ConfigError(f"decode_dtype {FLOAT8!r} is for backend fused or auto, not {self.backend!r}")
        if self.dtype == "float32":
            raise ConfigError(
                f"with decode_dtype {FLOAT8!r} the other layers compute in dtype: bfloat16 or float16, not 'float32'"
            )

    # What follows from the fields.

    def plan(self, scale: int = LATENT_SCALE, multiple: int = 1, held: Mapping[str, Size] | None = None) -> Plan:
        """The sizes engines are made for, with ``scale`` and ``multiple`` of the VAE's topology and what a directory holds."""
        return Plan.make(self.sizes, self.has_profiles, scale, multiple, held)

    @property
    def has_profiles(self) -> bool:
        """``multi_profile`` with its default filled in: editing takes images of any size."""
        return self.task == "i2i" and self.sizes is None if self.multi_profile is None else self.multi_profile

    @property
    def miss_policy(self) -> str:
        """``on_miss`` with its default filled in."""
        if self.on_miss is not None:
            return self.on_miss
        return "build" if self.backend in ENGINE_BACKENDS and self.engine_dir is not None else "fallback"

    @property
    def methods(self) -> tuple[str, ...]:
        """The networks that the task runs, and a warm-up loads: text-to-image only decodes."""
        return ("decode",) if self.task == "t2i" else ("encode", "decode")

    def compute_dtype(self, method: str, vae_dtype: torch.dtype) -> torch.dtype:
        """The dtype the network of ``method`` computes in; that of its other layers where some are float8."""
        if self.float8(method):
            dtype = DTYPES[self.dtype] if self.dtype else vae_dtype
            return torch.bfloat16 if dtype == torch.float32 else dtype
        name = (self.encode_dtype if method == "encode" else self.decode_dtype) or self.dtype
        return DTYPES[name] if name else vae_dtype

    def float8(self, method: str) -> bool:
        """Whether convolutions of the network of ``method`` are to compute in float8."""
        return method == "decode" and self.decode_dtype == FLOAT8

    # JSON.

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the version of the schema."""
        values = dataclasses.asdict(self)
        values["sizes"] = list(self.sizes) if self.sizes is not None else None
        return {"version": VERSION, **values}

    def to_json(self) -> str:
        """The document that :meth:`from_json` reads back to an equal value."""
        return json.dumps(self.as_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, path_or_text: str | Path) -> AccelConfig:
        """Read a JSON document: a file's path, or the text itself. Both our schema and the guide's are taken.

        Raises:
            ConfigError: if the file cannot be read, is not JSON object, or has an invalid key or value.
        """
        text = str(path_or_text)
        if text.lstrip("\ufeff \t\r\n").startswith("{"):
            what, read = "the config", lambda: parse_json(text)
        else:
            what, read = f"the config {shown(text)}", lambda: read_json(Path(path_or_text))
        try:
            document = read()
        except OSError as error:
            raise ConfigError(f"cannot read {what}: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"{what} is not JSON: {error}") from error
        return cls.from_dict(document)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> AccelConfig:
        """The same from parsed JSON."""
        if not isinstance(document, Mapping):
            raise ConfigError(f"a config is a JSON object, not {type(document).__name__}")
        if not _GUIDE_MARKS.isdisjoint(document):
            return cls(**_from_guide(document))
        values = dict(document)
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise ConfigError(f"config version {shown(version)} is not known; this release reads version {VERSION}")
        names = tuple(field.name for field in dataclasses.fields(cls))
        for key in values:
            if key not in names:
                raise ConfigError(unknown_key(key, names))
        return cls(**values)

    @classmethod
    def resolve(cls, config: AccelConfig | Mapping[str, Any] | str | Path | None, **overrides: Any) -> AccelConfig:
        """A config from whatever the user gave; keyword arguments override its fields."""
        if config is None:
            base = cls()
        elif isinstance(config, cls):
            base = config
        elif isinstance(config, Mapping):
            base = cls.from_dict(config)
        elif isinstance(config, (str, Path)):
            base = cls.from_json(config)
        else:
            raise ConfigError(f"config must be an AccelConfig, a dict, or a path, not {type(config).__name__}")
        if not overrides:
            return base
        return cls.from_dict({**base.as_dict(), **overrides})


def _size_texts(sizes: Any) -> tuple[str, ...]:
    """``sizes`` in whatever form they were given, as a tuple of texts for :meth:`Plan.make`."""
    if isinstance(sizes, Mapping):
        for name, size in sizes.items():
            if not isinstance(name, str) or not isinstance(size, str):
                raise ConfigError(
                    f'sizes: {shown(name)}: {shown(size)} does not map a name to a size; write it as {{"4_3": "1472x1104"}}'
                )
        return tuple(f"{name}={size}" for name, size in sizes.items())
    if isinstance(sizes, str) and sizes in PRESETS:
        return (sizes,)
    try:
        texts = tuple(sizes)
    except TypeError:
        texts = (None,)
    if isinstance(sizes, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"sizes must be a list of names or WIDTHxHEIGHT texts, a mapping of names to these, or one of "
            f"{', '.join(PRESETS)}, not {shown(sizes)}"
        )
    return texts


# Any of these keys tells a document of the guide's host, whole or as the guide shortens it, from one of ours.
_GUIDE_MARKS = frozenset(("vae_type", "trt_vae_config", "model_cls", "infer_steps"))


def _from_guide(document: Mapping[str, Any]) -> dict[str, Any]:
    """Fields from a document of the guide's host; what is not about the VAE's engines (``infer_steps``, ...) is ignored."""
    kind = document.get("vae_type", "tensorrt" if "trt_vae_config" in document else "baseline")
    if kind not in ("tensorrt", "baseline"):
        raise ConfigError(f"vae_type must be 'tensorrt' or 'baseline', not {shown(kind)}")
    read = {"task", "vae_type"} | ({"trt_vae_config"} if kind == "tensorrt" else set())
    ignored = sorted(shown(key) for key in set(document) - read)
    if ignored:
        logger.debug("keys of the guide's host that are ignored: %s", ", ".join(ignored))
    fields = {"task": document.get("task", "t2i")}
    if kind == "baseline":  # the host runs no engines then
        return fields
    section = document.get("trt_vae_config")
    if not isinstance(section, Mapping):
        raise ConfigError('vae_type \'tensorrt\' needs trt_vae_config: {"trt_engine_path": ..., "multi_profile": ...}')
    allowed = ("trt_engine_path", "multi_profile")
    for key in section:
        if key not in allowed:
            raise ConfigError(f"trt_vae_config: {unknown_key(key, allowed)}")
    if "trt_engine_path" not in section:
        raise ConfigError("trt_vae_config has no trt_engine_path")
    return {
        **fields,
        "backend": "tensorrt",
        "engine_dir": section["trt_engine_path"],
        "multi_profile": section.get("multi_profile", False),
    }
