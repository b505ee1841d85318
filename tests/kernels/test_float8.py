"""Float8 kernels against their references; the accuracy of the choice of layers, simulated on the trained tiny VAE."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F

from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.fused.calibration import measured_peaks
from qwen_vae_accel.engines.selfcheck import psnr_db
from qwen_vae_accel.kernels import FusedConfig, FusedDecoder
from qwen_vae_accel.kernels.float8 import (
    FLOAT8,
    LARGEST,
    block_layers,
    calibrated_layers,
    input_scales,
    quantize,
    quantize_weight,
    simulate,
)
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import from_flat
from qwen_vae_accel.kernels.network import published
from qwen_vae_accel.kernels.triton.conv3x3 import conv, conv_reference
from qwen_vae_accel.kernels.triton.upsample_conv import upsample_conv
from qwen_vae_accel.kernels.weights import Norm, Packer
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.ranges import activation_peaks
from tests.helpers import CPU, TINY_VAE, photo
from tests.kernels.cases import (
    CONFIG,
    DEVICES,
    DTYPES,
    GRIDS,
    NO_TMA,
    SMALL_TUNING,
    TMA,
    assert_close,
    assert_halo_zero,
    assert_rounded,
    float8_norm,
    folded_upsample,
    poisoned,
    random_flat,
    random_layer,
    random_vae,
)
from tests.kernels.test_network import StandInLayers, meta, run_poisoned

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter tests; the GPU has test_gpu.py")


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_quantize_saturates():
    value = torch.tensor([1e9, -1e9, 500.0, 0.3, 0.0])
    assert quantize(value, 1.0).float().tolist() == [448, -448, 448, 0.3125, 0]


def test_quantize_keeps_nan_and_makes_it_of_infinity():
    assert quantize(torch.tensor([float("nan"), float("inf"), -float("inf")]), 2.0).isnan().all()


def test_weight_scales_use_the_range_and_beat_the_largest_value_alone():
    matrix = torch.randn(64, 96 * 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    rounded, factor = quantize_weight(matrix)
    assert rounded.float().abs().amax(1).min() >= 448 / 2
    error = (rounded.float() * factor[:, None] - matrix).square().sum(1)
    full = LARGEST / matrix.abs().amax(1, keepdim=True)
    plain = (quantize(matrix, full).float() / full - matrix).square().sum(1)
    assert (error <= 1.0001 * plain).all() and error.sum() < plain.sum()
    assert not quantize_weight(torch.zeros(2, 4))[0].float().any()


@pytest.mark.parametrize("peak", [0.0, float("nan"), float("inf"), None])
def test_calibration_that_gives_no_scale_is_refused(peak):
    state = {name: torch.ones(shape) for name, shape in published("decode").parameters().items()}
    peaks = dict.fromkeys(calibrated_layers(published("decode")).values(), 3.0)
    scales = input_scales(state, peaks)
    assert len(scales) == 26 and scales["up_blocks.3.resnets.0.conv1"] == pytest.approx(448 / 96**0.5)
    first = next(iter(peaks))
    broken = {name: value for name, value in peaks.items() if name != first} | ({} if peak is None else {first: peak})
    with pytest.raises(ValueError, match="calibration of up_blocks.1"):
        input_scales(state, broken)


# ---- accuracy -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    diffusers = pytest.importorskip("diffusers")
    return ModelSource(diffusers.AutoencoderKLQwenImage.from_pretrained(TINY_VAE, torch_dtype=torch.float32).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_least_46_db_on_photos(tiny, dtype):
    """Calibrated without the photos; the layers that are not float8 in ``dtype``."""
    with torch.no_grad():
        exact = tiny.model("decode", torch.float32, CPU)
        peaks = measured_peaks(tiny, Job("decode", tiny.topology, torch.float32, CPU))
        network = simulate(tiny.model("decode", dtype, CPU), input_scales(tiny.state("decode"), peaks))
        for name in ("coffee", "astronaut", "chelsea"):
            z = tiny.model("encode", torch.float32, CPU)(photo(name)[:, :, 0])[:, :16]
            psnr = psnr_db(network(z.to(dtype)), exact(z), "decode")
            assert 46 <= psnr < 55, name  # above 55, some layer was not quantised


def test_photos_stay_within_the_calibrated_range(tiny):
    with torch.no_grad():
        exact = tiny.model("decode", torch.float32, CPU)
        peaks = measured_peaks(tiny, Job("decode", tiny.topology, torch.float32, CPU))
        scales = input_scales(tiny.state("decode"), peaks)
        z = tiny.model("encode", torch.float32, CPU)(photo("astronaut")[:, :, 0])[:, :16]
        found = activation_peaks(exact, z)
        for name, module in calibrated_layers(published("decode")).items():
            assert found[module] * scales[name] < LARGEST


# ---- kernels --------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_conv_of_float8(grid, dtype, device):
    """Every combination the decoder uses of 8 and 16 bits in and out."""
    state = random_layer("conv", 96, 96, 3)
    eight, sixteen = (Packer(state, dtype, CPU, scales).conv("conv") for scales in ({"conv": 50.0}, {}))
    assert eight.weight.dtype == FLOAT8 and eight.nbytes < sixteen.nbytes
    plain, norm = random_flat(grid, 96, dtype), float8_norm(96)
    a = quantize(plain, 50.0)
    residual = random_flat(grid, 96, dtype, seed=3)
    out8, out16 = (lambda: poisoned(grid.rows, 96, dtype=FLOAT8)), (lambda: poisoned(grid.rows, 96, dtype=dtype))

    # conv1: float8 -> float8
    normed = out8()
    conv(a, grid, eight, config=CONFIG, gpu=device, normed=normed, norm=norm)
    assert_rounded(normed, conv_reference(a, grid, eight, norm=norm)[1])
    assert_halo_zero(normed.float(), grid)
    # what float8 is there for: the convolution of the unrounded numbers
    exact = conv_reference(plain, grid, sixteen, norm=norm)[1]
    assert (normed.float() - exact).norm() < 0.08 * exact.norm()
    # conv2: float8 -> x in 16 bits, normed in float8
    x, normed = out16(), out8()
    conv(a, grid, eight, config=CONFIG, gpu=device, x=x, normed=normed, norm=norm, residual=residual)
    want = conv_reference(a, grid, eight, norm=norm, residual=residual)
    assert_close(x, want[0], dtype)
    assert_rounded(normed, want[1])
    assert_halo_zero(x, grid)
    # before an upsampling: x alone, in float8, its largest values clamped
    x = out8()
    conv(a, grid, eight, config=CONFIG, gpu=device, x=x, residual=residual, x_scale=300.0)
    want = conv_reference(a, grid, eight, residual=residual, x_scale=300.0)[0]
    assert_rounded(x, want.clamp(-LARGEST, LARGEST))
    assert grid.pixels < 10 or (want.abs() > LARGEST).any()
    # the middle's last block: 16 bits -> float8
    normed = out8()
    conv(plain, grid, sixteen, config=CONFIG, gpu=device, x=out16(), normed=normed, norm=norm)
    assert_rounded(normed, conv_reference(plain, grid, sixteen, norm=norm)[1])


@interpreted
@pytest.mark.parametrize("device", DEVICES)
def test_shortcut_of_float8_keeps_16_bits(device):
    dtype, grid = torch.bfloat16, GRIDS[1]
    state = random_layer("conv", 192, 192, 3) | random_layer("short", 192, 96, 1, seed=5)
    weights = Packer(state, dtype, CPU, {"conv": 60.0}).conv("conv", "short")
    assert weights.shortcut_weight.dtype == dtype and weights.weight.shape == (192, 9 * 192)
    plain, extra, norm = random_flat(grid, 192, dtype), random_flat(grid, 96, dtype, seed=4), float8_norm(192)
    a = quantize(plain, 60.0)
    x, normed = poisoned(grid.rows, 192, dtype=dtype), poisoned(grid.rows, 192, dtype=FLOAT8)
    conv(a, grid, weights, config=CONFIG, gpu=device, x=x, normed=normed, norm=norm, shortcut=extra)
    want = conv_reference(a, grid, weights, norm=norm, shortcut=extra)
    assert_close(x, want[0], dtype)
    assert_rounded(normed, want[1])
    main = F.conv2d(from_flat(plain, grid).float(), state["conv.weight"], state["conv.bias"], padding=1)
    short = F.conv2d(from_flat(extra, grid).float(), state["short.weight"], state["short.bias"])
    assert (from_flat(x, grid) - main - short).norm() < 0.05 * (main + short).norm()


@interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_upsample_of_float8(dtype, device):
    state = random_layer("up", 96, 192, 3)
    weights = Packer(state, dtype, CPU, {"up": 40.0}).upsample("up")
    norm = float8_norm(96)
    for grid in GRIDS[:2]:
        a, large = quantize(random_flat(grid, 192, dtype), 40.0), grid.doubled()
        x, normed = poisoned(large.rows, 96, dtype=dtype), poisoned(large.rows, 96, dtype=FLOAT8)
        upsample_conv(a, grid, weights, x=x, normed=normed, norm=norm, config=CONFIG, gpu=device)
        want = folded_upsample(a, grid, weights, norm)
        assert_close(x, want[0], dtype)
        assert_rounded(normed, want[1])
        assert_halo_zero(x, large)
        assert_halo_zero(normed.float(), large)


def test_float8_is_refused_where_it_has_no_meaning():
    with pytest.raises(ValueError, match="SiLU only"):
        Norm(torch.ones(96), silu=False, scale=2.0)
    weights = Packer(random_layer("conv", 96, 96, 3), torch.bfloat16, CPU, {"conv": 9.0}).conv("conv")
    grid = GRIDS[1]
    with pytest.raises(ValueError, match="input: expected contiguous torch.float8_e4m3fn"):
        conv(random_flat(grid, 96, torch.bfloat16), grid, weights, config=CONFIG, gpu=TMA)
    assert math.isfinite(weights.rescale.sum().item())


# ---- network --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_decoder():
    """The published widths with random weights, calibrated, and its simulation."""
    source = ModelSource(random_vae())
    with torch.no_grad():
        exact = source.model("decode", torch.float32, CPU)
        peaks = activation_peaks(exact, torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)))
    return source, input_scales(source.state("decode"), peaks)


@interpreted
@pytest.mark.parametrize(("dtype", "sm90"), [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True)])
def test_decoder_of_float8(random_decoder, dtype, sm90):
    """With ``sm90`` the other kernels: convolutions by layer objects, but for the one with a shortcut."""
    source, scales = random_decoder
    network = FusedDecoder(
        source.state("decode"), dtype=dtype, device=CPU, float8=scales, config=FusedConfig(tuning=SMALL_TUNING, gpu=TMA)
    )
    if sm90:
        network._sm90 = StandInLayers(torch.device("cpu"), SMALL_TUNING)
    z = torch.randn(1, 16, 1, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = run_poisoned(network, z).float()
    with torch.no_grad():
        exact = source.model("decode", torch.float32, CPU)(z.float())
        simulated = simulate(source.model("decode", torch.float32, CPU), scales)(z.float())
    # The simulation rounds the same numbers, up to what 16 bits move across a rounding boundary.
    noise = (simulated - exact).norm() / exact.norm()
    error = (out - exact).norm() / exact.norm()
    assert 0.5 * noise < error < 1.3 * noise
    assert (out - simulated).norm() / exact.norm() < noise
    assert sum("float8" in step.kernel for step in network.launches(tuple(z.shape)).steps) == 26
    if sm90:
        layers = [layer for _, layer in network._sm90._layers.values()]
        assert [layer.calls for layer in layers] == [1] * 30


def decoder_on(gpu, *, float8):
    """A decoder without values, to look at its launches."""
    network = published("decode")
    scales = dict.fromkeys([*block_layers(network), *calibrated_layers(network)], 1.0)
    assert len(scales) == 26
    config = FusedConfig(gpu=gpu)
    return FusedDecoder(
        meta("decode"), dtype=torch.bfloat16, device=torch.device("meta"), float8=scales if float8 else {}, config=config
    )


def test_float8_needs_less_memory_and_the_same_arithmetic():
    listed = [decoder_on(Gpu(132, 232448, True), float8=float8).launches((1, 16, 128, 128)) for float8 in (False, True)]
    assert listed[0].flops == listed[1].flops
    assert listed[1].scratch_bytes < 0.85 * listed[0].scratch_bytes


@pytest.mark.parametrize("device", [NO_TMA, Gpu(132, 232448, True)], ids=["pointers", "large"])
def test_no_size_needs_a_float8_kernel_that_was_not_compiled_ahead(device):
    network = decoder_on(device, float8=True)
    compiled = network.kernels(network.usual_shapes())
    assert len(compiled) <= 40
    draw = random.Random(0)
    for _ in range(30):
        shape = (draw.choice((1, 2, 4)), 16, draw.randint(8, 240), draw.randint(8, 240))
        assert network.kernels([shape]).keys() <= compiled.keys(), shape
