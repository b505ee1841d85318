"""Whole decoder and encoder against float64 beside diffusers, under the interpreter; plans, topology, lazy import."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder, compiling, device_reasons, state_reasons
from qwen_vae_accel.kernels.float8 import FLOAT8, quantize
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.launches import Traffic
from qwen_vae_accel.kernels.layout import Grid, from_flat, to_flat
from qwen_vae_accel.kernels.memory import Arena
from qwen_vae_accel.kernels.network import QWEN_IMAGE_21, Kind, describe, published
from qwen_vae_accel.kernels.sm90.layers import Sm90Layers
from qwen_vae_accel.kernels.sm90.schedules import FLOAT8_SCHEDULES, SCHEDULES, Mode, Room, choose_schedule, ends_early, lines_of
from qwen_vae_accel.kernels.triton.conv3x3 import conv_reference
from qwen_vae_accel.kernels.triton.downsample_conv import downsample_conv_reference
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.tuning.tables import ATTENTION_KEY
from qwen_vae_accel.kernels.weights import Norm
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.image_vae import ImageDecoder, ImageEncoder
from tests.helpers import Reference
from tests.kernels.cases import NO_TMA, SMALL_TUNING, TMA, folded_upsample, image_state, random_vae

TMA_SM90 = dataclasses.replace(TMA, sm90=True)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter tests; the GPU has test_gpu.py")


def meta(method, image_channels=3, latents=16):
    """Weights of a published network without values."""
    shapes = published(method, image_channels).parameters()
    if latents == 64:
        shapes = describe(dataclasses.replace(QWEN_IMAGE_21, image_channels=image_channels), method).parameters()
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def random_state(network):
    """Random weights of a described network."""
    draw = torch.Generator().manual_seed(3)

    def values(name, shape):
        if name.endswith("gamma"):
            return 1 + 0.1 * torch.randn(shape, generator=draw)
        scale = 0.1 if name.endswith("bias") else torch.tensor(shape[1:]).prod() ** -0.5
        return torch.randn(shape, generator=draw) * scale

    return {name: values(name, shape) for name, shape in network.parameters().items()}


def reference(vae, part, image):
    method = {"decoder": "decode", "encoder": "encode"}[part]
    double = ModelSource(vae).model(method, torch.float64, torch.device("cpu"))
    return Reference(vae, method, image, torch.float16, double)


def published_on(gpu, cls):
    """A published network without values."""
    weights = meta("decode" if cls is FusedDecoder else "encode")
    return cls(weights, dtype=torch.bfloat16, device=torch.device("meta"), config=FusedConfig(gpu=gpu))


def run_poisoned(network, image):
    """Scratch full of NaN: a halo or an element that nobody writes shows in the result."""
    launches = network.launches(tuple(image.shape))
    memory = launches.memory(image, torch.full((launches.scratch_bytes,), 255, dtype=torch.uint8))
    memory.output.fill_(float("nan"))
    launches.run(memory)
    return memory.output


def copied(residual, grid, channels, lower):
    """What an upsampling adds to its four outputs of every pixel: [doubled rows, channels], fp32."""
    image = from_flat(residual.float(), grid)
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :channels].clone()
    large[:, :, 1::2] = image[:, lower : lower + channels].repeat_interleave(2, 3)
    return to_flat(large)


class StandIn:
    """A layer of sm90/ by the references and the folded upsample kernel, with its signature."""

    room = Room(4)  # so that small images have several rounds of tiles

    def __init__(self, weights, mode, device=None, schedules=(), keep=None):
        self.weights, self.mode, self.calls = weights, mode, 0

    def schedule(self, grid):
        tiled = grid.halved() if self.mode is Mode.DOWNSAMPLE else grid
        place = tiled.batch, tiled.height, tiled.width, self.room
        known = (self.mode, self.weights.in_channels, self.weights.out_channels)
        return choose_schedule(*(known if known in SCHEDULES else (Mode.CONV, 192, 192)), *place), place

    def lines(self, grid):
        schedule, (_, height, width, _) = self.schedule(grid)
        return lines_of(schedule, self.mode, height, width)

    def ends_early(self, grid):
        schedule, place = self.schedule(grid)
        return ends_early(schedule, self.mode, *place)

    def __call__(
        self, a, grid, *, x=None, normed=None, gamma=None, silu=True, residual=None, shortcut=None, x_scale=None, n_scale=None,
        lower=0, done=None, ready=None,
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
            copies = None if residual is None else copied(residual, grid, self.weights.out_channels, lower)
            results = folded_upsample(a, grid, self.weights, norm, copies)
        elif self.mode is Mode.DOWNSAMPLE:
            if residual is not None:
                residual = F.pad(residual, (0, self.weights.out_channels - residual.shape[1]))
            results = downsample_conv_reference(a, grid, self.weights, norm, residual)
        else:
            results = conv_reference(a, grid, self.weights, norm=norm, residual=residual, shortcut=shortcut, x_scale=x_scale)
        for target, value in zip((x, normed), results, strict=False):
            if target is not None:
                target.copy_(quantize(value, 1.0) if target.dtype == FLOAT8 else value)


class StandInLayers(Sm90Layers):
    """Layers of sm90/ that need no GPU: stand-ins of the widths that it has."""

    def __init__(self, device, tuning, every=False):
        super().__init__(device, tuning, StandIn)
        self.every = every

    def _reasons(self, mode, channels, out, dtype):
        if self.every:
            return []
        return [] if (mode, channels, out) in (FLOAT8_SCHEDULES if dtype == FLOAT8 else SCHEDULES) else ["no kernel"]


@interpreted
@pytest.mark.parametrize(("part", "shape"), [("decoder", (1, 16, 1, 2)), ("encoder", (1, 3, 17, 8))])
def test_network_with_sm90_layers(part, shape):
    """The other plan: convolutions by layer objects, the head's product a kernel of its own."""
    vae = random_vae()
    network = (FusedDecoder if part == "decoder" else FusedEncoder)(
        image_state(vae, part), dtype=torch.float16, device=torch.device("cpu"),
        config=FusedConfig(tuning=SMALL_TUNING, gpu=TMA),
    )  # fmt: skip
    network._sm90 = StandInLayers(torch.device("cpu"), SMALL_TUNING)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    out = run_poisoned(network, image.half()).float()
    reference(vae, part, image).check(out)
    layers = [layer for _, layer in network._sm90._layers.values()]
    assert len(layers) == (31 if part == "decoder" else 23)
    assert all(layer.calls == 1 for layer in layers)


# Qwen-Image 2.1 with a decoder of 4/9 of its widths.
NARROW_21 = dataclasses.replace(QWEN_IMAGE_21, decoder_widths=tuple(width * 4 // 9 for width in QWEN_IMAGE_21.decoder_widths))


@interpreted
@pytest.mark.parametrize(("method", "shape"), [("decode", (2, 64, 2, 3)), ("encode", (1, 4, 48, 32))])
def test_shortcuts_around_levels(method, shape, monkeypatch):
    """Of the residual networks: orders of channels, copies and averages, the wide attention, both ends."""
    described = describe(NARROW_21, method)
    state = random_state(described)
    monkeypatch.setattr("qwen_vae_accel.kernels.fused.network_of", lambda state: described)
    monkeypatch.setattr("qwen_vae_accel.kernels.fused.state_reasons", lambda state, sm90: [])
    network = (FusedDecoder if method == "decode" else FusedEncoder)(
        state, dtype=torch.float16, device=torch.device("cpu"), config=FusedConfig(tuning=SMALL_TUNING, gpu=TMA)
    )
    network._sm90 = StandInLayers(torch.device("cpu"), SMALL_TUNING, every=True)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact = (ImageDecoder if method == "decode" else ImageEncoder)({name: value.double() for name, value in state.items()})
    expected = exact(image.half().double())
    error = (run_poisoned(network, image.half()).double() - expected).norm() / expected.norm()
    assert error < 2e-3  # every number between kernels is rounded to 2^-11
    layers = [layer for _, layer in network._sm90._layers.values()]
    assert len(layers) == (40 if method == "decode" else 29)
    assert all(layer.calls == 1 for layer in layers)


@interpreted
@pytest.mark.parametrize(("part", "shape"), [("decoder", (1, 16, 1, 1)), ("encoder", (1, 4, 8, 9))])
def test_network_agrees_with_diffusers(part, shape):
    channels = 4 if part == "encoder" else 3
    vae = random_vae(channels)
    network = (FusedDecoder if part == "decoder" else FusedEncoder)(
        image_state(vae, part), dtype=torch.float16, device=torch.device("cpu"),
        config=FusedConfig(tuning=SMALL_TUNING, gpu=TMA),
    )  # fmt: skip
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    out = run_poisoned(network, image.half()).float()
    reference(vae, part, image).check(out)


def test_weights_of_the_published_size_are_packed_once():
    config = FusedConfig(gpu=Gpu(132, 232448, True, True))
    decoder = FusedDecoder(meta("decode"), dtype=torch.bfloat16, device=torch.device("meta"), config=config)
    # 25.3 M parameters, of which the three upsamples' kernels are stored as sixteen 1x1 instead of nine.
    assert 50e6 < decoder.nbytes < 56e6


@pytest.mark.parametrize("cls", [FusedDecoder, FusedEncoder])
def test_scratch_of_a_megapixel(cls):
    config = FusedConfig(gpu=Gpu(132, 232448, True, True))
    network = cls(
        meta("decode" if cls is FusedDecoder else "encode"), dtype=torch.bfloat16, device=torch.device("meta"), config=config
    )
    launches = network.launches((1, 16, 128, 128) if cls is FusedDecoder else (1, 3, 1024, 1024))
    three_matrices = 3 * 1026 * 1025 * 96 * 2
    assert three_matrices <= launches.scratch_bytes < 1.01 * three_matrices
    assert abs(launches.flops / 1e12 - (4.28 if cls is FusedDecoder else 2.85)) < 0.02


@pytest.mark.parametrize("device", [TMA, NO_TMA, Gpu(132, 232448, True)], ids=["tma", "pointers", "large"])
@pytest.mark.parametrize("cls", [FusedDecoder, FusedEncoder])
def test_no_size_needs_a_kernel_that_was_not_compiled_ahead(cls, device):
    network = cls(
        meta("decode" if cls is FusedDecoder else "encode"),
        dtype=torch.bfloat16,
        device=torch.device("meta"),
        config=FusedConfig(gpu=device),
    )
    usual = network.usual_shapes()
    compiled = network.kernels(usual)
    assert 8 <= len(compiled) <= 40
    unit = usual[0][-1] // 8
    draw = random.Random(0)
    for _ in range(60):
        shape = (
            draw.choice((1, 1, 2, 4)),
            network.description.in_channels,
            draw.randint(8, 240) * unit,
            draw.randint(8, 240) * unit,
        )
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
    config = FusedConfig(gpu=Gpu(132, 232448, True))
    network = FusedDecoder(meta("decode"), dtype=torch.bfloat16, device=torch.device("meta"), config=config)
    launches = network.launches((1, 16, 128, 128))
    memory = launches.memory(torch.empty(1, 16, 128, 128, dtype=torch.bfloat16, device="meta"))
    counted = []
    with compiling.collecting():
        for step in launches.steps:
            traffic = Traffic(memory)
            step.launch(traffic)
            counted.append(traffic.nbytes)
    matrix = Grid(1, 1024, 1024).rows * 96 * 2
    conv = next(i for i, step in enumerate(launches.steps) if step.kernel == "conv3x3 96->96 residual x norm")
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


def test_an_image_of_which_nothing_is_left_is_refused():
    for shape in ((1, 3, 7, 64), (1, 3, 64, 7)):
        with pytest.raises(ValueError, match="too small"):
            published_on(TMA, FusedEncoder)(torch.empty(shape, dtype=torch.bfloat16, device="meta"))


def test_reasons_for_other_topologies():
    assert state_reasons(meta("decode", 4), sm90=False) == []
    assert state_reasons(meta("encode"), sm90=False) == []
    assert state_reasons(meta("decode", 4, 64), sm90=True) == state_reasons(meta("encode", 3, 64), sm90=True) == []
    assert state_reasons(meta("decode", 7), sm90=True) == ["it has no kernels for these layers of the decoder: conv_out 96->7"]
    narrow = {name: torch.empty([max(s // 6, 3) for s in value.shape], device="meta") for name, value in meta("decode").items()}
    assert state_reasons({**meta("decode"), "norm_out.gamma": torch.empty(16, device="meta")}, sm90=True)
    assert len(state_reasons(narrow | {"conv_out.weight": torch.empty(3, 16, 3, 3)}, sm90=True)) == 4  # three and a count
    with pytest.raises(ValueError, match="cannot run this model"):
        FusedDecoder({}, dtype=torch.float16, device=torch.device("cpu"), config=FusedConfig(gpu=TMA))
    with pytest.raises(ValueError, match="FusedDecoder was given the weights of a network that encodes"):
        FusedDecoder(meta("encode"), dtype=torch.float16, device=torch.device("meta"), config=FusedConfig(gpu=TMA))


def test_reasons_for_devices():
    cuda = torch.device("cuda")
    assert not [r for r in device_reasons(cuda, torch.bfloat16, (8, 0)) if "triton" not in r]
    assert any("8.0" in r for r in device_reasons(cuda, torch.bfloat16, (7, 5)))
    assert any("float32" in r for r in device_reasons(cuda, torch.float32, (9, 0)))
    assert any("NVIDIA" in r for r in device_reasons(torch.device("cpu"), torch.bfloat16, None))


def test_smaller_gpus_get_smaller_tiles():
    key, tuning, small = KernelKey(Kind.CONV, 384, 384, epilogue="norm"), Tuning(), Gpu(84, 99 << 10, False)
    config = tuning.conv(key, Grid(1, 64, 64), small)
    assert config.stages * 2 * (config.block_rows + 384) * config.block_k < 99 << 10
    h200 = Gpu(132, 232448, True, True)
    assert tuning.conv(key, Grid(1, 64, 64), h200).block_rows == 64  # 33 tiles of 128 would do
    assert tuning.conv(key, Grid(1, 128, 128), h200).block_rows == 128
    assert not tuning.attention_on(ATTENTION_KEY, small).sm90
    assert tuning.attention_on(ATTENTION_KEY, h200).sm90


def test_import_needs_no_triton():
    code = """import sys
sys.modules["triton"] = None
from qwen_vae_accel.kernels import state_reasons
print(state_reasons({}, sm90=False))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
