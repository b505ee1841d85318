"""The CUDA sources: a file for each kernel, named after it, and the headers that it includes by name."""

from __future__ import annotations

import functools
from pathlib import Path

_FOLDER = Path(__file__).parent


@functools.cache
def kernel_source(name: str) -> str:
    """Text of ``<name>.cu``, whose entry point is ``name``."""
    return (_FOLDER / f"{name}.cu").read_text(encoding="utf-8")


@functools.cache
def headers() -> dict[str, str]:
    """Text of every header, by the name by which it is included."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.cuh"))}
