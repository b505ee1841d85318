"""Every convolution kernel against its reference; outputs start as NaN, so an unwritten element fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen_vae_accel.kernels.layout import Grid, from_flat
from qwen_vae_accel.kernels.triton.conv3x3 import conv, conv_reference
from qwen_vae_accel.kernels.triton.conv_in import conv_in, conv_in_reference
from qwen_vae_accel.kernels.triton.conv_out import conv_out, conv_out_reference, head_products, sum_taps, sum_taps_reference
from qwen_vae_accel.kernels.triton.downsample_conv import downsample_conv, downsample_conv_reference
from qwen_vae_accel.kernels.triton.upsample_conv import upsample_conv, upsample_conv_reference
from qwen_vae_accel.kernels.tuning.configs import ConvConfig
from qwen_vae_accel.kernels.weights import Norm, Packer
from tests.kernels.cases import (
    CONFIG,
    DEVICES,
    DTYPES,
    GRIDS,
    NO_TMA,
    TMA,
    assert_close,
    assert_halo_zero,
    poisoned,
    random_flat,
    random_gamma,
    random_layer,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter tests; the GPU has test_gpu.py")
HOST = torch.device("cpu")
EPILOGUES = ["norm", "x", "residual x", "plain norm", "residual norm head", "residual x norm"]


def pointers_once(cases):
    """Every case with bulk copies, the last one also with plain pointers: the interpreter takes seconds for those."""
    return [(*case, gpu) for gpu in (TMA, NO_TMA) for case in (cases if gpu.bulk_copies else cases[-1:])]


@pytest.mark.parametrize(("epilogue", "dtype", "gpu"), pointers_once([(e, d) for d in DTYPES for e in EPILOGUES]))
def test_conv3x3(epilogue, dtype, gpu):
    for grid in GRIDS:
        channels = 96
        a = random_flat(grid, channels, dtype)
        state = random_layer("conv", channels, channels, 3) | random_layer("out", 3, channels, 3)
        pack = Packer(state, dtype, HOST)
        weights = pack.conv("conv")
        residual = random_flat(grid, channels, dtype, seed=3) if "residual" in epilogue else None
        norm = Norm(random_gamma(channels), silu="plain" not in epilogue) if "norm" in epilogue else None
        head = pack.head("out")[0] if "head" in epilogue else None
        x = poisoned(grid.rows, channels, dtype=dtype) if "x" in epilogue.split() else None
        normed = poisoned(grid.rows, channels, dtype=dtype) if norm and head is None else None
        products = poisoned(27, grid.rows, dtype=torch.float32) if head is not None else None
        conv(a, grid, weights, config=CONFIG, gpu=gpu, x=x, normed=normed, norm=norm, residual=residual,
             head=head, products=products)  # fmt: skip
        expected = conv_reference(a, grid, weights, norm=norm, residual=residual, head=head)
        if x is not None:
            assert_close(x, expected[0], dtype)
            assert_halo_zero(x, grid)
        if normed is not None:
            assert_close(normed, expected[1], dtype)
            assert_halo_zero(normed, grid)
        if products is not None:
            assert_close(products, expected[2][:27], dtype)
            assert_halo_zero(products.T, grid)


@pytest.mark.parametrize(("channels", "out"), [(192, 384), (96, 192)])
def test_conv3x3_with_shortcut(channels, out):
    """96 shortcut channels are no multiple of the 64 the main loop takes at a time."""
    dtype, grid = torch.bfloat16, GRIDS[1]
    state = random_layer("conv2", out, out, 3) | random_layer("short", out, channels, 1, seed=4)
    weights = Packer(state, dtype, HOST).conv("conv2", "short")
    a, x_in = random_flat(grid, out, dtype), random_flat(grid, channels, dtype, seed=5)
    x, normed = (poisoned(grid.rows, out, dtype=dtype) for _ in range(2))
    norm = Norm(random_gamma(out))
    conv(a, grid, weights, config=ConvConfig(32, 64, 4, 2), gpu=TMA, x=x, normed=normed, norm=norm, shortcut=x_in)
    want_x, want_normed, _ = conv_reference(a, grid, weights, norm=norm, shortcut=x_in)
    assert_close(x, want_x, dtype)
    assert_close(normed, want_normed, dtype)
    main = F.conv2d(from_flat(a, grid).float(), state["conv2.weight"], state["conv2.bias"], padding=1)
    short = F.conv2d(from_flat(x_in, grid).float(), state["short.weight"], state["short.bias"])
    assert_close(from_flat(x, grid), main + short, dtype)


def test_conv3x3_in_place_and_persistent():
    dtype, grid = torch.float16, GRIDS[1]
    weights = Packer(random_layer("conv", 96, 96, 3), dtype, HOST).conv("conv")
    a, residual = random_flat(grid, 96, dtype), random_flat(grid, 96, dtype, seed=3)
    expected = conv_reference(a, grid, weights, residual=residual)[0]
    conv(a, grid, weights, config=ConvConfig(32, 32, 4, 2, per_sm=1), gpu=TMA, x=residual, residual=residual)
    assert_close(residual, expected, dtype)


def test_conv3x3_refuses_what_does_not_fit():
    dtype, grid = torch.float16, GRIDS[1]
    weights = Packer(random_layer("conv", 96, 96, 3), dtype, HOST).conv("conv")
    with pytest.raises(ValueError, match="input: expected"):
        conv(random_flat(grid, 192, dtype), grid, weights, config=CONFIG, gpu=TMA)
    with pytest.raises(ValueError, match="multiple of block_k"):
        conv(random_flat(grid, 96, dtype), grid, weights, config=ConvConfig(32, 64, 4, 2), gpu=TMA)


@pytest.mark.parametrize(("dtype", "gpu"), pointers_once([(d,) for d in DTYPES]))
def test_upsample_conv(dtype, gpu):
    state = random_layer("up", 96, 192, 3)
    weights = Packer(state, dtype, HOST).upsample("up")
    norm = Norm(random_gamma(96))
    for grid in GRIDS[:2]:
        a, large = random_flat(grid, 192, dtype), grid.doubled()
        x, normed = (poisoned(large.rows, 96, dtype=dtype) for _ in range(2))
        upsample_conv(a, grid, weights, x=x, normed=normed, norm=norm, config=CONFIG, gpu=gpu)
        want_x, want_normed = upsample_conv_reference(a, grid, state["up.weight"], state["up.bias"], norm)
        assert_close(x, want_x, dtype)
        assert_close(normed, want_normed, dtype)
        assert_halo_zero(x, large)
        assert_halo_zero(normed, large)


@pytest.mark.parametrize(
    ("grid", "dtype", "gpu"), pointers_once([(g, d) for d in DTYPES for g in (Grid(1, 4, 5), Grid(2, 5, 7), Grid(2, 6, 8))])
)
def test_downsample_conv(grid, dtype, gpu):
    weights = Packer(random_layer("down", 96, 96, 3), dtype, HOST).conv("down")
    norm, small = Norm(random_gamma(96)), grid.halved()
    a = random_flat(grid, 96, dtype)
    x, normed = (poisoned(small.rows, 96, dtype=dtype) for _ in range(2))
    downsample_conv(a, grid, weights, x=x, normed=normed, norm=norm, config=CONFIG, gpu=gpu)
    want_x, want_normed = downsample_conv_reference(a, grid, weights, norm)
    assert_close(x, want_x, dtype)
    assert_close(normed, want_normed, dtype)
    assert_halo_zero(x, small)
    assert_halo_zero(normed, small)


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "pointwise"), [(3, None), (4, None), (16, "before")])
def test_conv_in(channels, pointwise, dtype, gpu):
    state = random_layer("in", 96, channels, 3) | random_layer("before", channels, channels, 1, seed=4)
    weights = Packer(state, dtype, HOST).conv_after_pointwise("in", pointwise)
    grid, norm = Grid(2, 5, 6), Norm(random_gamma(96))
    image = torch.randn(2, channels, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(2, 3)
    x, normed = (poisoned(grid.rows, 96, dtype=dtype) for _ in range(2))
    conv_in(image, weights, x=x, normed=normed, norm=norm, config=CONFIG, gpu=gpu)
    before = None if pointwise is None else (state["before.weight"], state["before.bias"])
    want_x, want_normed = conv_in_reference(image, state["in.weight"], state["in.bias"], norm, before)
    assert_close(x, want_x, dtype)
    assert_close(normed, want_normed, dtype)
    assert_halo_zero(x, grid)
    assert_halo_zero(normed, grid)


@pytest.mark.parametrize("channels", [3, 4])
def test_conv_out_of_the_decoder(channels):
    """Products of the head summed over neighbours are the 3x3 convolution, clamped."""
    dtype, grid = torch.float16, Grid(2, 5, 6)
    state = random_layer("out", channels, 96, 3)
    head, bias = Packer(state, dtype, HOST).head("out")
    a = random_flat(grid, 96, dtype)
    products = poisoned(9 * channels, grid.rows, dtype=torch.float32)
    head_products(a, head, products, gpu=TMA, block_rows=32)
    assert_close(products, (a.float() @ head.float())[:, : 9 * channels].T, dtype)
    image = poisoned(2, channels, 5, 6, dtype=dtype)
    sum_taps(products, bias, grid, image, block=32)
    expected = F.conv2d(from_flat(a, grid).float(), state["out.weight"], state["out.bias"], padding=1).clamp(-1, 1)
    assert expected.abs().max() == 1  # the clamp is exercised
    assert_close(image, expected, dtype)
    assert_close(sum_taps_reference(products, bias, grid), expected, dtype)


@pytest.mark.parametrize("gpu", DEVICES)
def test_conv_out_of_the_encoder(gpu):
    dtype, grid = torch.bfloat16, Grid(2, 3, 6)
    state = random_layer("out", 32, 384, 3) | random_layer("after", 32, 32, 1, seed=4)
    weights = Packer(state, dtype, HOST).conv_before_pointwise("out", "after")
    a = random_flat(grid, 384, dtype)
    image = poisoned(2, 32, 3, 6, dtype=dtype)
    conv_out(a, grid, weights, image, gpu=gpu, block_rows=32)
    assert_close(image, conv_out_reference(a, grid, weights), dtype)
    unfolded = F.conv2d(from_flat(a, grid).float(), state["out.weight"], state["out.bias"], padding=1)
    assert_close(image, F.conv2d(unfolded, state["after.weight"], state["after.bias"]), dtype)
