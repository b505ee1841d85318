"""Float8 in the kernel of sm90: packing and reasons on the CPU; results against the references on a GPU (marker gpu)."""

from __future__ import annotations

import pytest
import torch

from qwen_vae_accel.kernels.float8 import FLOAT8, LARGEST, quantize
from qwen_vae_accel.kernels.layout import Grid, pixel_rows
from qwen_vae_accel.kernels.network import Kind
from qwen_vae_accel.kernels.sm90 import driver, nvrtc
from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3, unsupported
from qwen_vae_accel.kernels.sm90.layers import Sm90Layers
from qwen_vae_accel.kernels.sm90.packing import channel_order, pack
from qwen_vae_accel.kernels.sm90.schedules import FLOAT8_SCHEDULES, Mode, Room, Variant, choose_schedule
from qwen_vae_accel.kernels.triton.conv3x3 import conv_reference
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.weights import Norm, Packer
from tests.kernels.cases import (
    check_schedule,
    float8_norm,
    folded_upsample,
    poisoned,
    random_flat,
    random_gamma,
    random_layer,
    variants_of,
)

CASES = [(*key, index) for key, schedules in FLOAT8_SCHEDULES.items() for index in range(len(schedules))]
INPUT_SCALE = 60.0


# ---- CPU ------------------------------------------------------------------------------------------------------------


def unpack(packed: torch.Tensor, columns: int, kc: int, split: int, parities: int) -> torch.Tensor:
    """Undo swizzle and permutation by address arithmetic, as the hardware does: ``[split, parity, step, column, kc]``."""
    blocks = packed.reshape(parities, -1, split, columns * kc).permute(2, 0, 1, 3)
    out = torch.empty(*blocks.shape[:3], columns, kc, dtype=packed.dtype)
    mask = 0x70 if kc == 128 else 0x30
    k = torch.arange(kc)
    for n in range(columns):
        address = n * kc + k
        out[..., channel_order(columns)[n], :] = blocks[..., address ^ (address >> 3 & mask)]
    return out


@pytest.mark.parametrize(("mode", "channels", "out", "index"), CASES)
def test_packed_weights_hold_every_tap_where_the_kernel_looks(mode, channels, out, index):
    """Chunks that reach past the last channel are filled up with zeros."""
    schedule = FLOAT8_SCHEDULES[mode, channels, out][index]
    taps, parities = (4, 4) if mode == Mode.UPSAMPLE else (9, 1)
    matrix = quantize(torch.randn(out, parities * taps * channels, generator=torch.Generator().manual_seed(0)), 100.0)
    kc, split = schedule.kc, schedule.split
    got = unpack(pack(matrix, mode, channels, kc), out // split, kc, split, parities)
    chunks = -(-channels // kc)
    assert got.shape[2] == chunks * taps == Variant(mode, channels, out, 0, False, True, 2, schedule, a8=True).steps()
    want = torch.zeros(split, out // split, parities, taps, chunks * kc, dtype=torch.uint8)
    want[..., :channels] = matrix.view(torch.uint8).reshape(split, out // split, parities, taps, channels)
    want = want.reshape(split, out // split, parities, taps, chunks, kc).permute(0, 2, 4, 3, 1, 5)
    assert torch.equal(got, want.reshape(got.shape))


@pytest.mark.parametrize("key", FLOAT8_SCHEDULES, ids=str)
def test_every_schedule_fits_into_shared_memory_and_cannot_wait_forever(key):
    for variant in variants_of(*key, float8=True):
        check_schedule(variant.fitted())
        assert variant.defines()["A8"] == variant.defines()["N8"] == 1


def test_a_chunk_of_float8_has_twice_the_channels():
    assert choose_schedule(Mode.CONV, 96, 96, 1, 64, 64, Room(132), float8=True).kc == 64


def test_reasons(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", object)
    monkeypatch.setattr(driver, "library", object)
    assert unsupported((9, 0), Mode.CONV, 96, 96, FLOAT8) == []
    assert "downsample 96 -> 96" in unsupported((9, 0), Mode.DOWNSAMPLE, 96, 96, FLOAT8)[0]


def test_a_shortcut_beside_float8_is_left_to_the_other_kernel():
    state = random_layer("conv", 384, 384, 3) | random_layer("short", 384, 192, 1)
    weights = Packer(state, torch.bfloat16, torch.device("cpu"), {"conv": 1.0}).conv("conv", "short")
    cpu = torch.device("cpu")
    layers = Sm90Layers(cpu, Tuning(), lambda *_, **__: pytest.fail("made"))
    assert layers.layer(weights, Kind.CONV) is None


# ---- GPU ------------------------------------------------------------------------------------------------------------

_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_sm90 = [pytest.mark.gpu, pytest.mark.skipif(not _SM90, reason="needs a GPU of compute capability 9.0")]
# Relative L2. The sums of e4m3 products keep about 14 bits, so they are far from what 16 bits could hold.
SUM_TOLERANCE = 5e-3


@pytest.fixture(autouse=True)
def exact_fp32_reference(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def relative_error(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


def on_gpu(norm):
    return Norm(norm.gamma.cuda(), norm.silu, norm.scale)


def assert_float8(got, want, grid):
    """As near as one rounding to float8 brings it; halo zero."""
    assert not got[~pixel_rows(grid, "cuda")].view(torch.uint8).any()
    want = want.clamp(-LARGEST, LARGEST)
    assert relative_error(got, want) < 1.1 * relative_error(quantize(want, 1.0), want) + 1e-3
    assert not got.float().isnan().any()


def assert_16_bits(got, want, grid):
    assert not got[~pixel_rows(grid, "cuda")].any()
    assert relative_error(got, want) < SUM_TOLERANCE


def gpu_poisoned(rows, columns, dtype):
    return poisoned(rows, columns, dtype=dtype).cuda()


def layer_and_weights(mode, channels, out, dtype, schedule=None, *, float8=True):
    scales = {"c": INPUT_SCALE} if float8 else {}
    pack_layer = Packer(random_layer("c", out, channels, 3), dtype, torch.device("cuda"), scales)
    weights = pack_layer.upsample("c") if mode == Mode.UPSAMPLE else pack_layer.conv("c")
    return Conv3x3(weights, mode, schedules=() if schedule is None else (schedule,)), weights


def run_conv(channels, out, grid, dtype, schedule=None):
    """What a residual block asks of its two convolutions, before another block and before an upsampling."""
    layer, weights = layer_and_weights(Mode.CONV, channels, out, dtype, schedule)
    a = quantize(random_flat(grid, channels, dtype).cuda(), INPUT_SCALE)
    residual = random_flat(grid, out, dtype, seed=3).cuda()
    norm, plain = on_gpu(float8_norm(out)), Norm(random_gamma(out).cuda())
    new = lambda kind: gpu_poisoned(grid.rows, out, kind)  # noqa: E731

    normed = new(FLOAT8)
    layer(a, grid, normed=normed, gamma=norm.gamma, n_scale=norm.scale)
    assert_float8(normed, conv_reference(a, grid, weights, norm=norm)[1], grid)
    x, normed = new(dtype), new(FLOAT8)
    layer(a, grid, x=x, normed=normed, gamma=norm.gamma, n_scale=norm.scale, residual=residual)
    want = conv_reference(a, grid, weights, norm=norm, residual=residual)
    assert_16_bits(x, want[0], grid)
    assert_float8(normed, want[1], grid)
    x = new(FLOAT8)
    layer(a, grid, x=x, residual=residual, x_scale=200.0)  # the largest are clamped
    assert_float8(x, conv_reference(a, grid, weights, residual=residual, x_scale=200.0)[0], grid)
    normed = new(dtype)
    layer(a, grid, normed=normed, gamma=plain.gamma, residual=residual)
    assert_16_bits(normed, conv_reference(a, grid, weights, norm=plain, residual=residual)[1], grid)
    layer(a, grid, x=residual, residual=residual)  # in place
    assert_16_bits(residual, want[0], grid)


class TestOnSm90:
    pytestmark = on_sm90

    @pytest.mark.parametrize(("mode", "channels", "out", "index"), CASES)
    def test_every_kernel_matches_the_reference(self, mode, channels, out, index):
        grid, schedule = Grid(2, 37, 43), FLOAT8_SCHEDULES[mode, channels, out][index]
        if mode == Mode.CONV:
            run_conv(channels, out, grid, torch.bfloat16, schedule)
            return
        layer, weights = layer_and_weights(mode, channels, out, torch.bfloat16, schedule)
        a, large = quantize(random_flat(grid, channels, torch.bfloat16).cuda(), INPUT_SCALE), grid.doubled()
        norm = on_gpu(float8_norm(out))
        x, normed = gpu_poisoned(large.rows, out, torch.bfloat16), gpu_poisoned(large.rows, out, FLOAT8)
        layer(a, grid, x=x, normed=normed, gamma=norm.gamma, n_scale=norm.scale)
        want = folded_upsample(a, grid, weights, norm)
        assert_16_bits(x, want[0], large)
        assert_float8(normed, want[1], large)

    @pytest.mark.parametrize("channels", [96, 384])
    def test_float16_beside_float8(self, channels):
        run_conv(channels, channels, Grid(1, 20, 50), torch.float16)

    @pytest.mark.parametrize("size", [(1, 1, 1), (3, 2, 7), (1, 16, 16), (1, 17, 129), (4, 64, 5)])
    @pytest.mark.parametrize("channels", [96, 192, 384])
    def test_sizes_around_tiles(self, size, channels):
        run_conv(channels, channels, Grid(*size), torch.bfloat16)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits_into_float8(self, dtype):
        """The middle's last convolution and the smallest upsampling."""
        grid, norm = Grid(2, 21, 34), on_gpu(float8_norm(384))
        layer, weights = layer_and_weights(Mode.CONV, 384, 384, dtype, float8=False)
        a, residual = random_flat(grid, 384, dtype).cuda(), random_flat(grid, 384, dtype, seed=3).cuda()
        x, normed = gpu_poisoned(grid.rows, 384, dtype), gpu_poisoned(grid.rows, 384, FLOAT8)
        layer(a, grid, x=x, normed=normed, gamma=norm.gamma, n_scale=norm.scale, residual=residual)
        want = conv_reference(a, grid, weights, norm=norm, residual=residual)
        assert_16_bits(x, want[0], grid)
        assert_float8(normed, want[1], grid)
        layer, weights = layer_and_weights(Mode.UPSAMPLE, 384, 192, dtype, float8=False)
        norm, large = on_gpu(float8_norm(192)), grid.doubled()
        x, normed = gpu_poisoned(large.rows, 192, dtype), gpu_poisoned(large.rows, 192, FLOAT8)
        layer(a, grid, x=x, normed=normed, gamma=norm.gamma, n_scale=norm.scale)
        want = folded_upsample(a, grid, weights, norm)
        assert_16_bits(x, want[0], large)
        assert_float8(normed, want[1], large)

    @pytest.mark.parametrize("channels", [96, 192, 384])
    def test_repeats_and_graphs_agree_bit_for_bit(self, channels):
        grid, norm = Grid(1, 200, 136), on_gpu(float8_norm(channels))
        layer, _ = layer_and_weights(Mode.CONV, channels, channels, torch.bfloat16)
        a = quantize(random_flat(grid, channels, torch.bfloat16).cuda(), INPUT_SCALE)
        residual = random_flat(grid, channels, torch.bfloat16, seed=3).cuda()

        def launch():
            x, normed = gpu_poisoned(grid.rows, channels, torch.bfloat16), gpu_poisoned(grid.rows, channels, FLOAT8)
            run = lambda: layer(  # noqa: E731
                a, grid, x=x, normed=normed, gamma=norm.gamma, n_scale=norm.scale, residual=residual
            )
            run()
            return run, x, normed

        _, first_x, first_normed = launch()
        for _ in range(20):
            _, x, normed = launch()
            assert torch.equal(x, first_x) and torch.equal(normed.view(torch.uint8), first_normed.view(torch.uint8))
        run, x, normed = launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        x.fill_(float("nan"))
        normed.view(torch.uint8).fill_(127)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(x, first_x) and torch.equal(normed.view(torch.uint8), first_normed.view(torch.uint8))

    def test_wrong_calls_are_refused(self):
        grid = Grid(1, 8, 8)
        layer, _ = layer_and_weights(Mode.CONV, 96, 96, torch.bfloat16)
        a = random_flat(grid, 96, torch.bfloat16).cuda()
        with pytest.raises(ValueError, match="input: expected contiguous torch.float8_e4m3fn"):
            layer(a, grid, x=torch.empty_like(a))
        with pytest.raises(ValueError, match="x: expected contiguous torch.float8_e4m3fn"):
            layer(quantize(a, 1.0), grid, x=torch.empty_like(a), x_scale=2.0)
