"""NaN and infinity pass through every kernel as through PyTorch, and from no image of a batch into another.

On the CPU the Triton kernels under the interpreter; on a GPU (marker gpu) both kernel sets, and networks against diffusers.
References are computed on the CPU: a GPU's may convolve by Winograd's algorithm, which spreads NaN over a tile.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.fused.calibration import measured_peaks
from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.float8 import FLOAT8, input_scales, quantize
from qwen_vae_accel.kernels.gpu import describe_gpu
from qwen_vae_accel.kernels.layout import Grid, from_flat
from qwen_vae_accel.kernels.reasons import FLOAT8_CAPABILITY
from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3
from qwen_vae_accel.kernels.sm90.schedules import Mode
from qwen_vae_accel.kernels.triton.attention import attention, attention_reference, qkv, qkv_reference
from qwen_vae_accel.kernels.triton.conv3x3 import conv, conv_reference
from qwen_vae_accel.kernels.triton.conv_in import conv_in, conv_in_reference
from qwen_vae_accel.kernels.triton.conv_out import conv_out, conv_out_reference, sum_taps, sum_taps_reference
from qwen_vae_accel.kernels.triton.downsample_conv import downsample_conv, downsample_conv_reference
from qwen_vae_accel.kernels.triton.upsample_conv import upsample_conv
from qwen_vae_accel.kernels.triton.wide_attention import TILE
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig, ConvConfig
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.tuning.tables import ATTENTION_KEY
from qwen_vae_accel.kernels.weights import Norm, Packer, with_each
from qwen_vae_accel.model import ModelSource
from tests.kernels.cases import (
    CONFIG,
    DEVICES,
    DTYPES,
    NO_TMA,
    TMA,
    assert_halo_zero,
    float8_norm,
    folded_upsample,
    image_state,
    poisoned,
    random_flat,
    random_gamma,
    random_layer,
    random_vae,
    run_wide_attention,
)
from tests.not_finite import INF, NAN, VALUES, assert_same_kinds, with_value

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter tests")
GRID = Grid(3, 3, 4)
TILES = ConvConfig(128, 32, 4, 3) if torch.cuda.is_available() else CONFIG
NUMERICS = pytest.mark.filterwarnings(
    "ignore:invalid value|overflow|divide by zero|All-NaN:RuntimeWarning"
)  # numpy's, in the interpreter
pytestmark = NUMERICS


def cuda(value):
    """Tensors, weights and norms on the GPU if there is one, for the kernels."""
    if not torch.cuda.is_available():
        return value
    if isinstance(value, Norm):
        return Norm(value.gamma.cuda(), value.silu, value.scale)
    return with_each(torch.Tensor, torch.Tensor.cuda, value)


def device_of_kernels():
    return describe_gpu(torch.device("cuda")) if torch.cuda.is_available() else TMA


def new(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return cuda(poisoned(rows, columns, dtype=dtype))


def flat_with(value: float, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A random flat matrix with ``value`` in one channel of one pixel of the middle image."""
    flat = random_flat(GRID, channels, dtype, seed)
    from_flat(flat, GRID)[1, channels // 2 + 1, 1, 2] = value
    return flat


def check(actual: torch.Tensor, expected: torch.Tensor, grid: Grid) -> None:
    assert_same_kinds(actual, expected)
    assert_halo_zero(actual.float().cpu(), grid)
    assert expected.isfinite().any() and not expected.isfinite().all()


# ---- one convolution ------------------------------------------------------------------------------------------------


def run_conv(layer, a, weights, *, x=None, normed=None, norm=None, residual=None, x_scale=None):
    """By Triton, or by ``layer`` of sm90/."""
    a, residual, norm = cuda(a), cuda(residual) if residual is not None else None, cuda(norm) if norm is not None else None
    if layer is None:
        conv(a, GRID, cuda(weights), config=TILES, gpu=device_of_kernels(), x=x, normed=normed, norm=norm,
             residual=residual, x_scale=x_scale)  # fmt: skip
        return
    extra = {} if norm is None else {"gamma": norm.gamma, "silu": norm.silu, "n_scale": norm.scale}
    layer(a, GRID, x=x, normed=normed, residual=residual, x_scale=x_scale, **extra)


def check_input(make_layer, dtype: torch.dtype) -> None:
    weights = Packer(random_layer("conv", 96, 96, 3), dtype, torch.device("cpu")).conv("conv")
    layer = make_layer(weights, Mode.CONV)
    for value in VALUES:
        a, norm = flat_with(value, 96, dtype), Norm(random_gamma(96))
        x, normed = new(GRID.rows, 96, dtype), new(GRID.rows, 96, dtype)
        run_conv(layer, a, weights, x=x, normed=normed, norm=norm)
        expected = conv_reference(a, GRID, weights, norm=norm)
        check(x, expected[0], GRID)
        check(normed, expected[1], GRID)


def check_residual(make_layer, dtype: torch.dtype) -> None:
    """One channel of a pixel is infinite: that channel's norm is NaN, the others' is 0; of NaN all are NaN."""
    weights = Packer(random_layer("conv", 96, 96, 3), dtype, torch.device("cpu")).conv("conv")
    layer = make_layer(weights, Mode.CONV)
    for silu in (True, False):
        for value in VALUES:
            a, residual = random_flat(GRID, 96, dtype), flat_with(value, 96, dtype, seed=3)
            norm = Norm(random_gamma(96), silu=silu)
            x, normed = new(GRID.rows, 96, dtype), new(GRID.rows, 96, dtype)
            run_conv(layer, a, weights, x=x, normed=normed, norm=norm, residual=residual)
            expected = conv_reference(a, GRID, weights, norm=norm, residual=residual)
            check(x, expected[0], GRID)
            check(normed, expected[1], GRID)
            assert expected[1].isnan().sum() == (96 if value != value else 1)


def check_float8(make_layer, dtype: torch.dtype) -> None:
    """Infinity becomes NaN, as e4m3 has none; a number that is too large is clamped."""
    weights = Packer(random_layer("conv", 96, 96, 3), dtype, torch.device("cpu"), {"conv": 50.0}).conv("conv")
    layer = make_layer(weights, Mode.CONV)
    for value in (*VALUES, 1e4):
        residual, norm = flat_with(value, 96, dtype, seed=3), float8_norm(96)
        clean, bad = (quantize(flat, 50.0) for flat in (random_flat(GRID, 96, dtype), flat_with(value, 96, dtype)))
        x = new(GRID.rows, 96, FLOAT8)
        run_conv(layer, clean, weights, x=x, residual=residual, x_scale=20.0)
        expected = quantize(conv_reference(clean, GRID, weights, residual=residual)[0], 20.0)
        assert_same_kinds(x, expected)
        assert expected.isnan().sum() == (0 if value == 1e4 else 1)
        normed = new(GRID.rows, 96, FLOAT8)
        run_conv(layer, bad, weights, normed=normed, norm=norm)
        assert_same_kinds(normed, conv_reference(bad, GRID, weights, norm=norm)[1])
        assert normed.float().isnan().any() == (value != 1e4)


def check_resampling(make_layer, dtype: torch.dtype, kind: str) -> None:
    pack = Packer(random_layer("c", 96, 192 if kind == "up" else 96, 3), dtype, torch.device("cpu"))
    weights = pack.upsample("c") if kind == "up" else pack.conv("c")
    layer = make_layer(weights, Mode.UPSAMPLE if kind == "up" else Mode.DOWNSAMPLE)
    after, norm = GRID.doubled() if kind == "up" else GRID.halved(), Norm(random_gamma(96))
    for value in (NAN, INF):
        a = flat_with(value, weights.in_channels, dtype)
        x, normed = new(after.rows, 96, dtype), new(after.rows, 96, dtype)
        if layer is None:
            function = upsample_conv if kind == "up" else downsample_conv
            function(cuda(a), GRID, cuda(weights), x=x, normed=normed, norm=cuda(norm), config=TILES,
                     gpu=device_of_kernels())  # fmt: skip
        else:
            layer(cuda(a), GRID, x=x, normed=normed, gamma=cuda(norm).gamma)
        reference = folded_upsample if kind == "up" else downsample_conv_reference
        expected = reference(a, GRID, weights, norm)
        check(x, expected[0], after)
        check(normed, expected[1], after)


def triton_kernel(weights, mode):
    return None


def sm90_kernel(weights, mode):
    return Conv3x3(cuda(weights), mode)


CHECKS = {
    "input": check_input,
    "residual": check_residual,
    "float8": check_float8,
    "upsample": lambda make, dtype: check_resampling(make, dtype, "up"),
    "downsample": lambda make, dtype: check_resampling(make, dtype, "down"),
}


@interpreted
@pytest.mark.parametrize(
    ("what", "dtype"), [*((what, torch.float16) for what in CHECKS), ("residual", torch.bfloat16)], ids=str
)
def test_a_convolution_passes_them_on(what, dtype):
    CHECKS[what](triton_kernel, dtype)


@interpreted
def test_the_first_convolution_passes_them_on():
    dtype, norm = torch.float16, Norm(random_gamma(96))
    state = random_layer("in", 96, 4, 3)
    weights = Packer(state, dtype, torch.device("cpu")).conv_after_pointwise("in", None)
    image = torch.randn(GRID.batch, 4, GRID.height, GRID.width, generator=torch.Generator().manual_seed(0)).to(dtype)
    for value in VALUES:
        bad = with_value(image, value)
        x, normed = (poisoned(GRID.rows, 96, dtype=dtype) for _ in range(2))
        conv_in(bad, weights, x=x, normed=normed, norm=norm, config=CONFIG, gpu=TMA)
        expected = conv_in_reference(bad, state["in.weight"], state["in.bias"], norm)
        check(x, expected[0], GRID)
        check(normed, expected[1], GRID)


@interpreted
def test_the_last_convolution_clamps_infinity_and_keeps_nan():
    products = random_flat(GRID, 27, torch.float32).T.contiguous()
    bias = torch.zeros(3)
    for value in VALUES:
        bad = products.clone()
        bad[13, GRID.rows // 2 + 2] = value
        image = poisoned(3, 3, 3, 4, dtype=torch.float16)
        sum_taps(bad, bias, GRID, image)
        expected = sum_taps_reference(bad, bias, GRID)
        assert_same_kinds(image, expected)
        assert expected.isnan().any() == (value != value) and (image[image.isfinite()].abs() <= 1).all()
    weights = Packer(random_layer("out", 32, 384, 3), torch.float16, torch.device("cpu")).conv("out")
    a = flat_with(INF, 384, torch.float16)
    moments = poisoned(3, 32, 3, 4, dtype=torch.float16)
    conv_out(a, GRID, weights, moments, gpu=TMA)
    assert_same_kinds(moments, conv_out_reference(a, GRID, weights))


# ---- attention ------------------------------------------------------------------------------------------------------

ATTENTION = AttentionConfig(block_queries=32, block_keys=16, warps=4, stages=1)


def run_attention(tokens, grid, device, config=ATTENTION, splits=1):
    """Of the middle image's last keys a tile is not full, and what lies beside it is the next image's."""
    assert grid.height * grid.width % config.block_keys
    out = cuda(torch.zeros(grid.rows, 384, dtype=tokens.dtype))
    partial, tops = new(splits * grid.pixels, 384, torch.float32), new(splits * grid.pixels, 1, torch.float32)
    attention(cuda(tokens), grid, out, config=config, gpu=device, splits=splits, partial=partial, tops=tops)
    return out


def random_tokens(grid: Grid, dtype: torch.dtype, channels: int = 384) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(grid.batch, grid.height * grid.width, 3 * channels, generator=draw).to(dtype)


def check_attention(dtype, device, config=ATTENTION, splits=1, grid=None):
    check_images_apart(dtype, grid or Grid(3, 3, 7), 384, lambda *of: run_attention(*of, device, config, splits))


def check_images_apart(dtype, grid, channels, run):
    """One value of the middle image, in its queries, keys or values."""
    tokens = random_tokens(grid, dtype, channels)
    clean = run(tokens.view(-1, 3 * channels), grid)
    assert clean.isfinite().all()
    for part in range(3):
        for value in (NAN, INF):
            bad = tokens.clone()
            bad[1, 2, channels * part + 5] = value
            bad = bad.view(-1, 3 * channels)
            out = run(bad, grid)
            expected = attention_reference(bad, grid)
            check(out, expected, grid)
            ours, before = from_flat(out, grid), from_flat(clean, grid)
            assert torch.equal(ours[0], before[0]) and torch.equal(ours[2], before[2])


def check_scores_of_minus_infinity(dtype, device, config=ATTENTION, splits=1, grid=None):
    """Keys with a score of -Inf weigh nothing, even where a whole tile or a whole split sees no other."""
    grid = grid or Grid(1, 3, 13)
    tiles = -(-grid.pixels // config.block_keys)
    first = (tiles // splits if splits > 1 else 1) * config.block_keys
    check_first_keys_left_out(dtype, grid, 384, first, lambda *of: run_attention(*of, device, config, splits))


def check_first_keys_left_out(dtype, grid, channels, first, run):
    tokens = random_tokens(grid, dtype, channels)
    tokens[:, :, 5] = -1.0
    tokens[0, :first, channels + 5] = INF
    flat = tokens.view(-1, 3 * channels)
    out, expected = run(flat, grid), attention_reference(flat, grid)
    assert expected.isfinite().all()
    assert (out.float().cpu() - expected).abs().max() < 2**-6
    tokens[:, :, channels + 5] = INF  # nothing else is left: NaN
    assert from_flat(run(flat, grid), grid).isnan().all()


@interpreted
@pytest.mark.parametrize("device", DEVICES)
def test_attention_passes_them_on_within_an_image(device):
    check_attention(torch.float16, device)


@interpreted
def test_attention_in_splits_passes_them_on_within_an_image():
    check_attention(torch.float16, TMA, splits=2)


@interpreted
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_without_a_finite_score(splits):
    check_scores_of_minus_infinity(torch.float16, TMA, splits=splits, grid=Grid(1, 5, 18))


def run_wide(device):
    """Attention of many channels; its result's halo is checked by the way."""
    return lambda tokens, grid: run_wide_attention(cuda(tokens), grid, device)


@interpreted
@pytest.mark.parametrize("device", DEVICES)
def test_wide_attention_passes_them_on_within_an_image(device):
    check_images_apart(torch.float16, Grid(3, 3, 7), 768, run_wide(device))


@interpreted
def test_wide_attention_without_a_finite_score():
    """A whole tile of keys, and one of its neighbours."""
    check_first_keys_left_out(torch.float16, Grid(1, 9, 17), 768, TILE + 1, run_wide(TMA))


@interpreted
def test_queries_keys_and_values_of_other_images_stay_finite():
    weights = Packer(random_layer("to_qkv", 1152, 384, 1), torch.float16, torch.device("cpu")).conv("to_qkv")
    a, tokens = flat_with(NAN, 384, torch.float16), poisoned(GRID.pixels, 1152, dtype=torch.float16)
    qkv(a, GRID, weights, tokens, config=CONFIG, gpu=TMA)
    assert_same_kinds(tokens, qkv_reference(a, GRID, weights))


# ---- on a GPU -------------------------------------------------------------------------------------------------------

_GPU = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not _GPU, reason="needs a CUDA GPU")]
_HOPPER = _GPU and torch.cuda.get_device_capability() == (9, 0)
SETS = [
    pytest.param(False, id="triton"),
    pytest.param(True, id="sm90", marks=pytest.mark.skipif(not _HOPPER, reason="needs compute capability 9.0")),
]


@pytest.fixture(scope="module")
def vae():
    return random_vae().cuda()


class TestOnGpu:
    pytestmark = [*gpu, NUMERICS]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("what", CHECKS)
    @pytest.mark.parametrize("sm90", SETS)
    def test_a_convolution_passes_them_on(self, what, dtype, sm90):
        if what == "float8" and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
            pytest.skip("needs compute capability 8.9")
        CHECKS[what](sm90_kernel if sm90 else triton_kernel, dtype)

    @pytest.mark.parametrize("splits", [1, 2])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("sm90", SETS)
    def test_attention_passes_them_on_within_an_image(self, dtype, sm90, splits):
        device = replace(device_of_kernels(), sm90=sm90)
        config = Tuning().attention_on(ATTENTION_KEY, device)
        check_attention(dtype, device, config, splits, Grid(3, 5, 9))
        check_attention(dtype, NO_TMA if not sm90 else device, config, splits, Grid(3, 20, 20))
        if dtype == torch.float16:
            check_scores_of_minus_infinity(dtype, device, config, splits, Grid(1, 15, 15))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("channels", [768, 1152])
    def test_wide_attention_passes_them_on_within_an_image(self, dtype, channels):
        for device in (device_of_kernels(), NO_TMA):
            check_images_apart(dtype, Grid(3, 20, 20), channels, run_wide(device))
            if dtype == torch.float16:
                check_first_keys_left_out(dtype, Grid(1, 15, 15), channels, TILE + 1, run_wide(device))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("part", ["decoder", "encoder"])
    @pytest.mark.parametrize("sm90", SETS)
    def test_networks_give_what_diffusers_gives(self, vae, part, dtype, sm90):
        cls = FusedDecoder if part == "decoder" else FusedEncoder
        config = FusedConfig(graph_after=1, tuning=Tuning(sm90=sm90))
        network = cls(image_state(vae, part), dtype=dtype, device=torch.device("cuda"), config=config)
        self.check(network, copy.deepcopy(vae).to(dtype), part, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("sm90", SETS)
    def test_float8_gives_what_diffusers_gives(self, vae, dtype, sm90):
        if torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
            pytest.skip("needs compute capability 8.9")
        source = ModelSource(vae)
        job = Job("decode", source.topology, dtype, torch.device("cuda", 0), float8=True)
        scales = input_scales(source.state("decode"), measured_peaks(source, job))
        config = FusedConfig(graph_after=1, tuning=Tuning(sm90=sm90))
        network = FusedDecoder(source.state("decode"), dtype=dtype, device=torch.device("cuda"), config=config, float8=scales)
        self.check(network, copy.deepcopy(vae).to(dtype), "decoder", dtype)

    def check(self, network, plain, part, dtype):
        """Of three images the middle one has the value; by plain launches, and by a graph that has seen numbers before."""
        shape = (3, 16, 5, 7) if part == "decoder" else (3, 3, 41, 58)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
        clean = network.run_plain(x)
        assert clean.isfinite().all()
        for _ in range(2):
            assert torch.equal(network(x), clean)
        largest = torch.finfo(dtype).max
        for value in (*VALUES, largest, -largest):
            bad = with_value(x, value)
            with torch.no_grad():
                if part == "decoder":
                    expected = plain.decode(bad[:, :, None]).sample[:, :, 0]
                else:
                    expected = plain.encode(bad[:, :, None]).latent_dist.parameters[:, :, 0]
            for ours in (network.run_plain(bad), network(bad)):
                assert_same_kinds(ours, expected)
                assert torch.equal(ours[0], clean[0]) and torch.equal(ours[2], clean[2])
            assert expected[1].isnan().all() == (value not in (largest, -largest))
        assert torch.equal(network(x), clean)  # nothing of it is left in buffers
