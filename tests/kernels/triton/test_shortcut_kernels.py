"""What the residual networks need beside convolutions: means of 2x2 pixels, and latents of many channels in the flat layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen_vae_accel.kernels.layout import Grid, from_flat
from qwen_vae_accel.kernels.network import stored_channels
from qwen_vae_accel.kernels.triton.conv3x3 import conv_reference
from qwen_vae_accel.kernels.triton.conv_out import head_products
from qwen_vae_accel.kernels.triton.flatten import flatten, flatten_reference
from qwen_vae_accel.kernels.triton.pool import pool, pool_reference
from qwen_vae_accel.kernels.weights import Packer
from tests.kernels.cases import (
    DEVICES,
    DTYPES,
    assert_close,
    assert_halo_zero,
    poisoned,
    random_flat,
    random_layer,
)
from tests.not_finite import VALUES, assert_same_kinds, with_value

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter tests; the GPU has test_gpu.py")
HOST = torch.device("cpu")
# Of the large image: odd sides, of which the last row and column belong to no block, batch 2, and one block alone.
LARGE = [Grid(1, 2, 2), Grid(2, 5, 8), Grid(1, 4, 71), Grid(2, 7, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", LARGE, ids=str)
def test_means_of_2x2_pixels(grid, dtype):
    a, small = random_flat(grid, 96, dtype), grid.halved()
    pooled = poisoned(small.rows, 96, dtype=dtype)
    pool(a, grid, pooled)
    assert_close(pooled, pool_reference(a, grid), dtype)
    assert_close(from_flat(pooled, small), F.avg_pool2d(from_flat(a, grid).float(), 2), dtype)
    assert_halo_zero(pooled, small)


def test_means_of_2x2_pixels_pass_on_what_is_not_finite():
    grid = Grid(3, 4, 6)
    for value in VALUES:
        a = random_flat(grid, 32, torch.float16)
        from_flat(a, grid)[1, 3, 2, 5] = value
        pooled = poisoned(grid.halved().rows, 32, dtype=torch.float16)
        pool(a, grid, pooled)
        assert_same_kinds(pooled, pool_reference(a, grid))
        assert (~pooled.isfinite()).sum() == 1


def test_means_are_refused_where_they_do_not_fit():
    grid = Grid(1, 4, 4)
    with pytest.raises(ValueError, match="pooled: expected"):
        pool(random_flat(grid, 32, torch.float16), grid, poisoned(grid.rows, 32, dtype=torch.float16))
    with pytest.raises(ValueError, match="input: expected"):
        pool(random_flat(grid, 32, torch.float16)[1:], grid, poisoned(grid.halved().rows, 32, dtype=torch.float16))


def image_of(channels: int, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """With strides of its own."""
    shape = (grid.batch, channels, grid.width, grid.height)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(2, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 6, 48])
@pytest.mark.parametrize("grid", [Grid(1, 1, 1), Grid(2, 5, 7), Grid(1, 3, 70)], ids=str)
def test_a_latent_in_the_flat_layout(grid, channels, dtype):
    """Bit for bit: its channels, one of ones inside the image, and zeros."""
    image = image_of(channels, grid, dtype)
    flat = poisoned(grid.rows, stored_channels(channels), dtype=dtype)
    flatten(image, flat)
    assert torch.equal(flat, flatten_reference(image))
    inside = from_flat(flat, grid)
    assert torch.equal(inside[:, :channels], image) and inside[:, channels].eq(1).all() and not inside[:, channels + 1 :].any()
    assert_halo_zero(flat, grid)


def test_a_latent_that_is_not_finite():
    grid = Grid(3, 3, 4)
    for value in VALUES:
        image = with_value(image_of(64, grid, torch.bfloat16), value)
        flat = poisoned(grid.rows, 80, dtype=torch.bfloat16)
        flatten(image, flat)
        assert_same_kinds(flat, flatten_reference(image))
    with pytest.raises(ValueError, match="flat: expected"):
        flatten(image, poisoned(grid.rows, 64, dtype=torch.bfloat16))


def test_the_first_convolution_of_many_latent_channels_is_that_behind_post_quant_conv():
    """At the borders, too, where the 1x1 convolution's bias is not: padding comes behind it."""
    dtype, grid = torch.float16, Grid(2, 3, 5)
    state = random_layer("in", 96, 64, 3) | random_layer("before", 64, 64, 1, seed=4)
    weights = Packer(state, dtype, HOST).conv_of_latent("in", "before")
    assert (weights.in_channels, weights.taps, tuple(weights.weight.shape)) == (80, 9, (96, 720))
    image = image_of(64, grid, dtype)
    flat = poisoned(grid.rows, 80, dtype=dtype)
    flatten(image, flat)
    found = from_flat(conv_reference(flat, grid, weights)[0], grid)
    before = F.conv2d(image.float(), state["before.weight"], state["before.bias"])
    assert_close(found, F.conv2d(before, state["in.weight"], state["in.bias"], padding=1), dtype)


@pytest.mark.parametrize("gpu", DEVICES)
def test_products_of_a_head_of_144_channels(gpu):
    """No multiple of the 32 channels that a step multiplies elsewhere."""
    dtype, grid = torch.bfloat16, Grid(1, 4, 9)
    head, _ = Packer(random_layer("out", 4, 144, 3), dtype, HOST).head("out")
    a, products = random_flat(grid, 144, dtype), poisoned(36, grid.rows, dtype=torch.float32)
    head_products(a, head, products, gpu=gpu, block_rows=32)
    assert_close(products, (a.float() @ head.float())[:, :36].T, dtype)
