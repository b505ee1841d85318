"""DiffSynth's own modules, where its package is installed: ``make test-hosts`` does that."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, files
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.accuracy import measure
from tests.helpers import Reference, photo, randn
from tests.programs import original

pytestmark = pytest.mark.usefixtures("no_grad")


def module(name: str) -> ModuleType:
    """A file of ``diffsynth.models`` alone: the package wants torchvision, for which this machine's torch may have no build."""
    try:
        path = next(file.locate() for file in files("diffsynth") or () if str(file) == f"diffsynth/models/{name}.py")
    except PackageNotFoundError:
        pytest.skip("no DiffSynth: make test-hosts installs it")
    spec = importlib.util.spec_from_file_location(f"diffsynth_{name}", str(path))
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def served(handle: Any) -> dict[str, dict[str, int]]:
    report = handle.report().as_dict()
    assert report["fallbacks"] == []
    return report["calls"]


def statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and one over the deviation of the latents, as DiffSynth has them."""
    return vae.mean.view(1, -1, 1, 1), vae.std.view(1, -1, 1, 1)


def test_its_qwen_image_vae_makes_the_same_images(tiny):
    vae = module("qwen_image_vae").QwenImageVAE(base_dim=tiny.config.base_dim).eval()
    vae.load_state_dict(tiny.state_dict())
    x, z = photo(width=48, height=32)[:, :, 0], randn(2, 16, 4, 6)
    mean, inverse = statistics(vae)
    decode, encode = Reference(tiny, "decode", z / inverse + mean), Reference(tiny, "encode", x)
    encode.exact, encode.theirs = ((moments.chunk(2, dim=1)[0] - mean) * inverse for moments in (encode.exact, encode.theirs))
    encode.yardstick = measure(encode.theirs, encode.exact)
    tiles = {"tiled": True, "tile_size": 4, "tile_stride": 2}
    theirs = vae.decode(z, device="cpu", **tiles)
    handle = accelerate(vae)
    decode.check(vae.decode(z, device="cpu", tiled=False, tile_size=128, tile_stride=64))
    encode.check(vae.encode(x))
    assert served(handle) == {"decode": {"eager": 1}, "encode": {"eager": 1}}
    assert torch.equal(vae.decode(z, device="cpu", **tiles), theirs), "tiles are its own"


def test_its_wan_vae_makes_the_same_images(tiny, monkeypatch):
    models = module("wan_video_vae")
    kind = models.VideoVAE_
    monkeypatch.setattr(models, "VideoVAE_", lambda z_dim: kind(dim=tiny.config.base_dim, z_dim=z_dim))
    vae: nn.Module = models.WanVideoVAE()
    vae.model.load_state_dict(original(tiny.state_dict()))
    z = randn(1, 16, 1, 4, 6)
    mean, std = (value.view(1, -1, 1, 1, 1) for value in (vae.mean, vae.std))
    decode = Reference(tiny, "decode", z * std + mean)
    frames = randn(1, 16, 2, 2, 2)
    theirs = vae.decode(frames, "cpu")
    handle = accelerate(vae)
    decode.check(vae.decode(z, "cpu"))
    assert served(handle)["decode"] == {"eager": 1} and handle.module is vae.model
    assert torch.equal(vae.decode(frames, "cpu"), theirs), "video is its own"
