"""NaN, infinity and the largest numbers in latents and images give what diffusers gives, in every backend of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from qwen_vae_accel import accelerate
from tests.conftest import random_vae
from tests.helpers import as_if_on, decoded, moments, picture, randn
from tests.not_finite import VALUES, assert_same_kinds, kinds, with_value

pytestmark = pytest.mark.usefixtures("no_grad")

METHODS = {"decode": decoded, "encode": moments}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(vae, method, rows, columns, count=3):
    """Inputs of ``count`` images of ``rows`` x ``columns`` latents."""
    if method == "decode":
        return randn(count, vae.config.z_dim, 1, rows, columns)
    channels = 4 if "21" in type(vae).__name__ else 3
    scale = 16 if "21" in type(vae).__name__ else 8
    return picture(count, channels, 1, rows * scale, columns * scale)


def check(vae, plain, method, x):
    """The image that has the value is all NaN, the others are what they are without it; the same as diffusers'."""
    run = METHODS[method]
    clean = run(vae, x)
    assert not clean.isnan().any()
    for value in VALUES:
        bad = with_value(x, value)
        ours = run(vae, bad)
        assert_same_kinds(ours, run(plain, bad))
        assert ours[1].isnan().all()
        assert torch.equal(ours[0], clean[0]) and torch.equal(ours[2], clean[2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("topology", "dtype"), [*(("micro", dtype) for dtype in DTYPES), ("2.1", torch.float32)], ids=lambda p: str(p)
)
def test_eager_gives_what_diffusers_gives(topology, dtype, method):
    vae = random_vae(topology).to(dtype)
    plain = copy.deepcopy(vae)
    handle = accelerate(vae, backend="eager")
    check(vae, plain, method, batch(vae, method, 3, 4).to(dtype))
    assert handle.report().as_dict()["calls"][method] == {"eager": 4}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", ["enable_slicing", "enable_tiling"])
def test_slices_and_bands_give_what_the_whole_gives(micro, option, method):
    """Bands are exact: the value reaches rows in bands that never saw it, as it does untiled in diffusers."""
    plain = copy.deepcopy(micro)
    accelerate(micro, backend="eager")
    options = {} if option == "enable_slicing" else {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
    getattr(micro, option)(**options)
    check(micro, plain, method, batch(micro, method, 17, 5))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_inductor_gives_what_diffusers_gives(tiny, inductor_dir, method):
    plain = copy.deepcopy(tiny)
    config = {"backend": "inductor", "engine_dir": inductor_dir / "dynamic", "on_miss": "error", "multi_profile": True}
    with accelerate(tiny, sizes=["48x48:64x64:96x128"], task="i2i", **config) as handle:
        for value in VALUES:
            x = with_value(batch(tiny, method, 7, 9, count=1), value, image=0)
            assert_same_kinds(METHODS[method](tiny, x), METHODS[method](plain, x))
        assert handle.report().as_dict()["calls"][method] == {"inductor": 3}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_give_what_diffusers_gives(micro, dtype, method):
    vae = micro.to(dtype)
    plain = copy.deepcopy(vae)
    accelerate(vae, backend="eager")
    x, largest = batch(vae, method, 3, 4).to(dtype), torch.finfo(dtype).max
    for value in (largest, -largest, torch.finfo(dtype).tiny):
        assert_same_kinds(METHODS[method](vae, with_value(x, value)), METHODS[method](plain, with_value(x, value)))


@pytest.mark.parametrize("method", METHODS)
def test_what_overflows_in_float16_is_nan_and_no_wrong_image(micro, method, monkeypatch):
    """Where a sum lies near the largest number, its rounding decides whether it overflows, in diffusers too, layer by layer.

    What must hold: an image is all numbers and right, or all NaN.
    """
    as_if_on(monkeypatch, "float16")
    x = batch(micro, method, 3, 4, count=1)
    network = micro.decoder if method == "decode" else micro.encoder
    network.conv_in.weight *= 1000
    vae = copy.deepcopy(micro).half()
    accelerate(vae, backend="eager")
    overflowed = []
    for factor in (1.0, 100.0, 6e4):
        value = (x / x.abs().max() * factor).half()
        ours, exact = METHODS[method](vae, value), METHODS[method](micro, value.float())
        overflowed.append(bool(kinds(ours).any()))
        assert ours.isnan().all() if overflowed[-1] else (ours.float() - exact).norm() < 0.05 * exact.norm()
    assert overflowed[0] is False and overflowed[-1] is True
