"""Whole decoder and encoder against float64 beside diffusers, under the interpreter; plans, topology, lazy import."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading

import pytest
import torch

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder, compiling, device_reasons, state_reasons
from qwen_vae_accel.kernels.float8 import FLOAT8, quantize
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.memory import Arena, Traffic
from qwen_vae_accel.kernels.network import decoder_shapes, encoder_shapes
from qwen_vae_accel.kernels.sm90.layers import HopperConvs
from qwen_vae_accel.kernels.sm90.schedules import Mode, choose_schedule, ends_early, lines_of
from qwen_vae_accel.kernels.triton.conv3x3 import Norm, conv_reference
from qwen_vae_accel.kernels.triton.downsample_conv import downsample_conv_reference
from qwen_vae_accel.kernels.triton.upsample_conv import upsample_conv
from qwen_vae_accel.kernels.tuning.selection import Device, Tuning
from qwen_vae_accel.model import ModelSource
from tests.helpers import Reference
from tests.kernels.cases import CONFIG, NO_TMA, SMALL_TUNING, TMA, image_state, random_vae

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter tests; the GPU has test_gpu.py")


def meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def reference(vae, part, image):
    method = {"decoder": "decode", "encoder": "encode"}[part]
    double = ModelSource(vae).model(method, torch.float64, torch.device("cpu"))
    return Reference(vae, method, image, torch.float16, double)


def run_poisoned(network, image):
    """Scratch full of NaN: a halo or an element that nobody writes shows in the result."""
    program = network.program(tuple(image.shape))
    memory = program.memory(image, torch.full((program.scratch_bytes,), 255, dtype=torch.uint8))
    memory.output.fill_(float("nan"))
    program.run(memory)
    return memory.output


class StandIn:
    """A layer of sm90/ by the references and the folded upsample kernel, with its signature."""

    multiprocessors = 4  # few, so that small images have several rounds of tiles

    def __init__(self, weights, mode, device=None, schedules=(), keep=None):
        self.weights, self.mode, self.calls = weights, mode, 0

    def schedule(self, grid):
        tiled = grid.halved() if self.mode is Mode.DOWNSAMPLE else grid
        place = tiled.batch, tiled.height, tiled.width, self.multiprocessors
        return choose_schedule(self.mode, self.weights.in_channels, self.weights.out_channels, *place), place

    def lines(self, grid):
        schedule, (_, height, width, _) = self.schedule(grid)
        return lines_of(schedule, self.mode, height, width)

    def ends_early(self, grid):
        schedule, place = self.schedule(grid)
        return ends_early(schedule, self.mode, *place)

    def __call__(
        self, a, grid, *, x=None, normed=None, gamma=None, silu=True, residual=None, shortcut=None, x_scale=None, n_scale=None,
        done=None, ready=None,
    ):  # fmt: skip
        self.calls += 1
        if ready is not None:  # the launch before has counted all of its tiles there, and nobody else
            counters, lines = ready
            assert counters.numel() == grid.batch * lines.per_image and (counters == lines.finished).all()
            after = grid.doubled() if lines.rows == 32 else grid
            assert (lines.per_image - 1) * lines.rows < after.height
        if done is not None:
            done += self.lines(grid).finished
        norm = None if gamma is None else Norm(gamma, silu, n_scale)
        if self.mode is Mode.UPSAMPLE:
            upsample_conv(a, grid, self.weights, x=x, normed=normed, norm=norm, config=CONFIG, device=TMA)
            return
        if self.mode is Mode.DOWNSAMPLE:
            results = downsample_conv_reference(a, grid, self.weights, norm)
        else:
            results = conv_reference(a, grid, self.weights, norm=norm, residual=residual, shortcut=shortcut, x_scale=x_scale)
        for target, value in zip((x, normed), results, strict=False):
            if target is not None:
                target.copy_(quantize(value, 1.0) if target.dtype == FLOAT8 else value)


@interpreted
@pytest.mark.parametrize(("part", "shape"), [("decoder", (1, 16, 1, 2)), ("encoder", (1, 3, 17, 8))])
def test_network_with_hopper_layers(part, shape):
    """The other plan: convolutions by layer objects, the head's product a kernel of its own."""
    vae = random_vae()
    network = (FusedDecoder if part == "decoder" else FusedEncoder)(
        image_state(vae, part), dtype=torch.float16, device=torch.device("cpu"),
        config=FusedConfig(tuning=SMALL_TUNING, device=TMA),
    )  # fmt: skip
    network._hopper = HopperConvs(torch.device("cpu"), SMALL_TUNING, StandIn)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    out = run_poisoned(network, image.half()).float()
    reference(vae, part, image).check(out)
    layers = [layer for _, layer in network._hopper._layers.values()]
    assert len(layers) == (31 if part == "decoder" else 23)
    assert all(layer.calls == 1 for layer in layers)


@interpreted
@pytest.mark.parametrize(("part", "shape"), [("decoder", (1, 16, 1, 1)), ("encoder", (1, 4, 8, 9))])
def test_network_agrees_with_diffusers(part, shape):
    channels = 4 if part == "encoder" else 3
    vae = random_vae(channels)
    network = (FusedDecoder if part == "decoder" else FusedEncoder)(
        image_state(vae, part), dtype=torch.float16, device=torch.device("cpu"),
        config=FusedConfig(tuning=SMALL_TUNING, device=TMA),
    )  # fmt: skip
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    out = run_poisoned(network, image.half()).float()
    reference(vae, part, image).check(out)


def test_weights_of_the_published_size_are_packed_once():
    config = FusedConfig(device=Device(132, 232448, True, True))
    decoder = FusedDecoder(meta(decoder_shapes(3)), dtype=torch.bfloat16, device=torch.device("meta"), config=config)
    # 25.3 M parameters, of which the three upsamples' kernels are stored as sixteen 1x1 instead of nine.
    assert 50e6 < decoder.nbytes < 56e6


@pytest.mark.parametrize("cls", [FusedDecoder, FusedEncoder])
def test_scratch_of_a_megapixel(cls):
    config = FusedConfig(device=Device(132, 232448, True, True))
    shapes = decoder_shapes(3) if cls is FusedDecoder else encoder_shapes(3)
    network = cls(meta(shapes), dtype=torch.bfloat16, device=torch.device("meta"), config=config)
    program = network.program((1, 16, 128, 128) if cls is FusedDecoder else (1, 3, 1024, 1024))
    three_matrices = 3 * 1026 * 1025 * 96 * 2
    assert three_matrices <= program.scratch_bytes < 1.01 * three_matrices
    assert abs(program.flops / 1e12 - (4.28 if cls is FusedDecoder else 2.85)) < 0.02


@pytest.mark.parametrize("device", [TMA, NO_TMA, Device(132, 232448, True)], ids=["tma", "pointers", "large"])
@pytest.mark.parametrize("cls", [FusedDecoder, FusedEncoder])
def test_no_size_needs_a_kernel_that_was_not_compiled_ahead(cls, device):
    shapes = decoder_shapes(3) if cls is FusedDecoder else encoder_shapes(3)
    network = cls(meta(shapes), dtype=torch.bfloat16, device=torch.device("meta"), config=FusedConfig(device=device))
    usual = network.usual_shapes()
    compiled = network.kernels(usual)
    assert 8 <= len(compiled) <= 40
    unit = usual[0][-1] // 8
    draw = random.Random(0)
    for _ in range(60):
        shape = (draw.choice((1, 1, 2, 4)), network.channels, draw.randint(8, 240) * unit, draw.randint(8, 240) * unit)
        assert network.kernels([shape]).keys() <= compiled.keys(), shape


def test_compiling_runs_every_task_and_tells_of_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    done, told = [], []
    tasks = {index: (lambda index=index: done.append(index)) for index in range(30)}
    compiling.run(tasks, torch.device("cuda", 0), lambda *step: told.append(step))
    assert sorted(done) == list(range(30)) and told == [(count, 30) for count in range(1, 31)]
    tasks[7] = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        compiling.run(tasks, torch.device("cuda", 0))
    assert len(done) == 59, "the others are compiled all the same"


def test_traffic_is_counted_by_what_a_launch_asks_for():
    config = FusedConfig(device=Device(132, 232448, True))
    network = FusedDecoder(meta(decoder_shapes(3)), dtype=torch.bfloat16, device=torch.device("meta"), config=config)
    program = network.program((1, 16, 128, 128))
    memory = program.memory(torch.empty(1, 16, 128, 128, dtype=torch.bfloat16, device="meta"))
    counted = []
    with compiling.collecting():
        for step in program.steps:
            traffic = Traffic(memory)
            step.launch(traffic)
            counted.append(traffic.nbytes)
    matrix = Grid(1, 1024, 1024).rows * 96 * 2
    conv = next(i for i, step in enumerate(program.steps) if step.kernel == "conv3x3 96->96 residual x norm")
    assert counted[conv] == 4 * matrix  # hidden and the residual in, x and the normed one out
    assert counted[-1] > memory.output.nbytes


def test_launches_are_listed_in_their_own_thread_only():
    with compiling.collecting() as tasks:
        thread = threading.Thread(target=lambda: seen.append(compiling.listed()))
        seen: list = []
        thread.start()
        thread.join()
        assert compiling.listed() is tasks
    assert seen == [None] and compiling.listed() is None


def test_arena_never_overlaps_what_lives_together():
    arena = Arena()
    a = arena.take(10, 96, torch.float16)
    b = arena.take(1000, 96, torch.float16)
    arena.give(a)
    c = arena.take(500, 96, torch.float16)
    arena.give(b)
    d = arena.take(700, 96, torch.float16)
    offsets, total = arena.place()
    assert total < sum(s.nbytes for s in (a, b, c, d))
    for first, second in ((a, b), (b, c), (c, d)):
        low, high = sorted((first, second), key=lambda s: offsets[s.index])
        assert offsets[low.index] + low.nbytes <= offsets[high.index]
    assert all(offset % 256 == 0 for offset in offsets)


def test_reasons_for_other_topologies():
    assert state_reasons(meta(decoder_shapes(4))) == []
    assert state_reasons(meta(encoder_shapes(3))) == []
    assert "image channels" in state_reasons(meta(decoder_shapes(7)))[0]
    narrow = {name: tuple(max(s // 6, 3) for s in shape) for name, shape in decoder_shapes(3).items()}
    assert state_reasons(meta({**decoder_shapes(3), "norm_out.gamma": (16,)}))
    assert len(state_reasons(meta(narrow | {"conv_out.weight": (3, 16, 3, 3)}))) == 4  # three and a count
    with pytest.raises(ValueError, match="cannot run this model"):
        FusedDecoder({}, dtype=torch.float16, device=torch.device("cpu"))


def test_reasons_for_devices():
    cuda = torch.device("cuda")
    assert not [r for r in device_reasons(cuda, torch.bfloat16, (8, 0)) if "triton" not in r]
    assert any("8.0" in r for r in device_reasons(cuda, torch.bfloat16, (7, 5)))
    assert any("float32" in r for r in device_reasons(cuda, torch.float32, (9, 0)))
    assert any("NVIDIA" in r for r in device_reasons(torch.device("cpu"), torch.bfloat16, None))


def test_smaller_gpus_get_smaller_tiles():
    weights = FusedDecoder(
        meta(decoder_shapes(3)), dtype=torch.bfloat16, device=torch.device("meta"),
        config=FusedConfig(device=Device(84, 99 << 10, False)),
    )._weights.middle[0].conv1  # fmt: skip
    tuning = Tuning()
    config = tuning.conv("conv", weights, Grid(1, 64, 64), Device(84, 99 << 10, False), "norm")
    assert config.stages * 2 * (config.block_rows + 384) * config.block_k < 99 << 10
    h200 = Device(132, 232448, True, True)
    assert tuning.conv("conv", weights, Grid(1, 64, 64), h200, "norm").block_rows == 64  # 33 tiles of 128 would do
    assert tuning.conv("conv", weights, Grid(1, 128, 128), h200, "norm").block_rows == 128
    assert not tuning.attention_on(Device(84, 99 << 10, False)).specialized
    assert tuning.attention_on(Device(132, 232448, True, True)).specialized


def test_import_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import qwen_vae_accel.kernels as k; print(k.state_reasons({}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
