"""What all pipeline tests need: small conditioning images, and stand-ins for what is not installed."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.utils import logging

pytest.importorskip("transformers")

_REFERENCE_AREA = 64 * 64
_MODULES = (
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_inpaint",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_layered",
    "diffusers.modular_pipelines.qwenimage.encoders",
    "diffusers.pipelines.qwenimage21.pipeline_qwenimage21",
    "diffusers.modular_pipelines.qwenimage21.encoders",
)


def shrink_references(set_attribute: Any) -> None:
    """Have editing pipelines scale their references to 64x64 pixels in area, not to a megapixel; ratios stay."""
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:  # an older diffusers
            continue
        original = getattr(module, "calculate_dimensions", None)
        if original is not None:
            set_attribute(module, "calculate_dimensions", lambda area, ratio, f=original: f(_REFERENCE_AREA, ratio))


def stand_in_for_torchvision(set_attribute: Any) -> None:
    """Give Anima's transformer the one function of torchvision that it calls, on a mask of zeros."""
    name = "diffusers.models.transformers.transformer_cosmos"
    module = importlib.import_module(name)
    if hasattr(module, "transforms"):
        return

    def resize(mask: torch.Tensor, size: Any, interpolation: Any = None) -> torch.Tensor:
        return torch.nn.functional.interpolate(mask, size=tuple(size), mode="nearest")

    transforms = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=resize), InterpolationMode=types.SimpleNamespace(NEAREST=None)
    )
    set_attribute(module, "transforms", transforms)


@pytest.fixture(autouse=True)
def quiet_and_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small references, no notes of diffusers about the tiny models, one thread's worth of work."""

    def set_attribute(module: Any, name: str, value: Any) -> None:
        monkeypatch.setattr(module, name, value, raising=False)

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    shrink_references(set_attribute)
    stand_in_for_torchvision(set_attribute)
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture
def micro() -> Any:
    """A small random VAE, made so that the oldest supported diffusers can make it too."""
    from tests.pipelines.factory import micro_vae

    return micro_vae()
