"""The node as ComfyUI loads it: a package under a name of its own, from a folder that is no Python name."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.helpers import ROOT

FOLDER = ROOT / "comfyui"


@pytest.fixture(scope="session")
def node() -> ModuleType:
    name = "custom_nodes.qwen-vae-accel"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
