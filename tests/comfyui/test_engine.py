"""The node in ComfyUI's own engine, on the CPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen_vae_accel.errors import UnsupportedVAEError
from tests.comfyui import engine
from tests.helpers import Reference, photo, randn
from tests.programs import original

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference() -> Any:
    with torch.inference_mode():  # as ComfyUI executes nodes
        yield


@pytest.fixture(scope="module")
def comfy() -> Any:
    return engine.load()


@pytest.fixture
def wide(comfy: Any, monkeypatch: pytest.MonkeyPatch, tiny: nn.Module) -> Any:
    """ComfyUI's VAE with the tiny one's weights: older releases know the published width only."""
    wan = comfy.sd.comfy.ldm.wan.vae
    kind, dim = wan.WanVAE, tiny.config.base_dim
    monkeypatch.setattr(wan, "WanVAE", lambda **config: kind(**{**config, "dim": dim}))
    weights = {name: value.clone() for name, value in original(tiny.state_dict()).items()}
    return comfy.sd.VAE(sd=weights)


@pytest.fixture
def fast(wide: Any, node: ModuleType) -> Any:
    (vae,) = node.NODE_CLASS_MAPPINGS["QwenVAEAccelerate"]().accelerate(wide)
    return vae


def report(vae: Any) -> dict[str, Any]:
    from qwen_vae_accel.plugin.methods import handle_of

    return handle_of(vae.first_stage_model).report().as_dict()


def images(pixels: Tensor) -> Tensor:
    """Images ``[B, H, W, C]`` in [0, 1], as nodes hand them on, as ``[B, C, H, W]`` in [-1, 1]."""
    return pixels.reshape(-1, *pixels.shape[-3:]).movedim(-1, 1) * 2 - 1


def test_images_are_the_same(comfy, fast, wide, tiny):
    with torch.inference_mode(False):
        x, z = photo(width=48, height=64), randn(3, 16, 1, 6, 8)
        decode, encode = Reference(tiny, "decode", z), Reference(tiny, "encode", x)
        encode.exact, encode.theirs = encode.exact.chunk(2, dim=1)[0], encode.theirs.chunk(2, dim=1)[0]
    (pixels,) = comfy.nodes.VAEDecode().decode(fast, {"samples": z})
    decode.check(images(pixels))
    (latents,) = comfy.nodes.VAEEncode().encode(fast, (x[:, :, 0].movedim(1, -1) + 1) / 2)
    encode.check(latents["samples"])
    calls = report(fast)["calls"]
    assert set(calls["decode"]) == set(calls["encode"]) == {"eager"} and report(fast)["fallbacks"] == []
    (theirs,) = comfy.nodes.VAEDecode().decode(wide, {"samples": z})
    assert (pixels - theirs).abs().max() < 1e-4


def test_the_given_vae_stays_as_it_is(comfy, fast, wide):
    calls = report(fast)["calls"]
    kind = type(wide.first_stage_model)
    (pixels,) = comfy.nodes.VAEDecode().decode(wide, {"samples": randn(1, 16, 1, 2, 2)})
    assert report(fast)["calls"] == calls and type(wide.first_stage_model) is kind and pixels.shape == (1, 16, 16, 3)
    assert wide.memory_used_decode((1, 16, 1, 128, 128), torch.bfloat16) > fast.memory_used_decode(
        (1, 16, 1, 128, 128), torch.bfloat16
    )


def test_tiles_are_comfyuis_own(comfy, fast, wide):
    z = randn(1, 16, 1, 12, 12)
    node = comfy.nodes.VAEDecodeTiled()
    ours, theirs = (node.decode(vae, {"samples": z}, tile_size=64, overlap=16)[0] for vae in (fast, wide))
    assert torch.equal(ours, theirs) and report(fast)["calls"]["decode"] == {}
    pixels = theirs.reshape(1, 96, 96, 3)
    encode = comfy.nodes.VAEEncodeTiled()
    ours, theirs = (encode.encode(vae, pixels, tile_size=64, overlap=16)[0]["samples"] for vae in (fast, wide))
    assert (ours - theirs).abs().max() < 1e-3
    assert report(fast)["calls"]["encode"]["eager"] > 1, "tiles of images that are encoded are images"


def test_video_and_batches_of_frames_are_comfyuis_own(comfy, fast, wide):
    z = randn(1, 16, 2, 4, 4)
    assert torch.equal(fast.decode(z), wide.decode(z))
    frames = torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fast.encode(frames), wide.encode(frames))
    assert report(fast)["calls"] == {"encode": {"host": 1}, "decode": {"host": 1}}
    shape = (1, 16, 2, 64, 64)
    assert fast.memory_used_decode(shape, torch.float16) == wide.memory_used_decode(shape, torch.float16)


def test_it_is_saved_and_unloaded_as_ever(comfy, fast, wide):
    z = randn(1, 16, 1, 4, 4)
    before = fast.decode(z)
    assert fast.get_sd().keys() == wide.get_sd().keys()
    comfy.management.unload_all_models()
    wide.decode(z)
    assert torch.equal(fast.decode(z), before)
    assert report(fast)["calls"]["decode"] == {"eager": 2}


def test_a_patched_weight_is_followed(comfy, fast, wide):
    """As a LoRA of ComfyUI does it: another parameter in the place of the weight's."""
    z = randn(1, 16, 1, 4, 4)
    before = fast.decode(z)
    weight = wide.first_stage_model.decoder.head[2].bias
    comfy.utils.set_attr_param(wide.first_stage_model, "decoder.head.2.bias", weight + 0.2)
    assert not torch.allclose(fast.decode(z), before, atol=1e-2)
    assert (fast.decode(z) - wide.decode(z)).abs().max() < 1e-4
    assert report(fast)["calls"]["decode"] == {"eager": 3}


def test_another_vae_is_refused(comfy, node):
    class Other:
        first_stage_model = nn.Linear(1, 1)

    with pytest.raises(UnsupportedVAEError, match="Linear"):
        node.NODE_CLASS_MAPPINGS["QwenVAEAccelerate"]().accelerate(Other())
