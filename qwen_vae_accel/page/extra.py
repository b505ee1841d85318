"""Packages that only documents of results need: the extra ``bench``."""

from __future__ import annotations

import importlib
from typing import Any

from qwen_vae_accel.errors import ConfigError


def optional_package(name: str) -> Any:
    """A package of the extra ``bench``.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"benchmark reports need {name}: pip install 'qwen-vae-accel[bench]'") from error
