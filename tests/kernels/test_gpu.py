"""On a GPU: the full-size network with random weights against diffusers in fp32, repeatability, graphs, streams, threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.fused.calibration import measured_peaks
from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.float8 import input_scales, simulate
from qwen_vae_accel.kernels.gpu import describe_gpu
from qwen_vae_accel.kernels.layout import Grid, from_flat
from qwen_vae_accel.kernels.reasons import FLOAT8_CAPABILITY
from qwen_vae_accel.kernels.triton.attention import attention, attention_reference
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.model import ModelSource
from tests.kernels.cases import NO_TMA, image_state, random_flat, random_vae

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DTYPES = [torch.bfloat16, torch.float16]
# Relative error of the whole network. diffusers itself, eager: 1.8e-2 in bfloat16.
LIMIT = {torch.bfloat16: 1.3e-2, torch.float16: 2e-3}
PLAIN = FusedConfig(graphs=0)


@pytest.fixture(scope="module")
def vae():
    torch.backends.cudnn.allow_tf32 = False
    return random_vae().cuda()


@pytest.fixture(scope="module")
def networks(vae):
    return {
        (part, dtype): (FusedDecoder if part == "decoder" else FusedEncoder)(
            image_state(vae, part), dtype=dtype, device=torch.device("cuda"), config=FusedConfig(graphs=2)
        )
        for part in ("decoder", "encoder")
        for dtype in DTYPES
    }


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def reference(vae, part: str, image: torch.Tensor) -> torch.Tensor:
    scale = 1 if part == "decoder" else 8
    if image.is_cuda and image.shape[2] // scale * (image.shape[3] // scale) == 1:
        # Of one latent pixel diffusers' attention fails on the GPU: "query is not correctly aligned".
        return reference(copy.deepcopy(vae).cpu(), part, image.cpu()).cuda()
    with torch.no_grad():
        if part == "decoder":
            return vae.decode(image[:, :, None]).sample[:, :, 0]
        return vae.encode(image[:, :, None]).latent_dist.parameters[:, :, 0]


LATENTS = [
    (1, 1, 1), (1, 3, 2), (2, 7, 5), (1, 16, 16), (4, 9, 13), (1, 23, 40), (3, 20, 30), (1, 64, 64), (1, 60, 106),
    (2, 33, 17), (1, 128, 96), (1, 116, 208),
]  # fmt: skip
IMAGES = [
    (1, 8, 8), (1, 15, 9), (2, 61, 47), (1, 128, 128), (4, 72, 100), (1, 181, 324), (3, 160, 240), (1, 512, 512),
    (1, 480, 848), (2, 265, 130), (1, 1024, 768), (1, 928, 1664),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", LATENTS, ids=str)
def test_decoder(networks, vae, size, dtype):
    batch, height, width = size
    z = draw(batch, 16, height, width)
    out = networks["decoder", dtype].run_plain(z.to(dtype))
    assert out.is_contiguous() and out.abs().max() <= 1
    assert relative(out, reference(vae, "decoder", z)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_encoder(networks, vae, size, dtype):
    batch, height, width = size
    image = draw(batch, 3, height, width)
    out = networks["encoder", dtype].run_plain(image.to(dtype))
    expected = reference(vae, "encoder", image)
    assert out.shape == expected.shape == (batch, 32, height // 8, width // 8)
    assert relative(out, expected) < LIMIT[dtype]


def test_four_image_channels():
    vae = random_vae(4).cuda()
    z, image = draw(1, 16, 8, 9), draw(1, 4, 50, 40)
    for part, value, cls in (("decoder", z, FusedDecoder), ("encoder", image, FusedEncoder)):
        network = cls(image_state(vae, part), dtype=torch.float16, device=torch.device("cuda"), config=PLAIN)
        assert relative(network(value.half()), reference(vae, part, value)) < LIMIT[torch.float16]


def test_half_the_error_of_eager(networks, vae):
    z = draw(1, 16, 40, 56)
    expected = reference(vae, "decoder", z)
    eager = relative(reference(copy.deepcopy(vae).bfloat16(), "decoder", z.bfloat16()), expected)
    assert relative(networks["decoder", torch.bfloat16](z.bfloat16()), expected) < 0.75 * eager


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_scratch_may_hold_anything(networks, part):
    network = networks[part, torch.bfloat16]
    image = draw(2, network.description.in_channels, *((9, 11) if part == "decoder" else (77, 90)), dtype=torch.bfloat16)
    launches = network.launches(tuple(image.shape))
    outputs = []
    for fill in (255, 0):
        memory = launches.memory(image, torch.full((launches.scratch_bytes,), fill, dtype=torch.uint8, device="cuda"))
        memory.output.fill_(float("nan"))
        launches.run(memory)
        outputs.append(memory.output)
    assert torch.equal(*outputs) and not outputs[0].isnan().any()


@pytest.mark.parametrize("latents", [(1, 60, 106), (1, 112, 148), (3, 33, 47), (1, 166, 166)], ids=str)
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_overlapping_kernels_change_no_bit(networks, part, latents):
    batch, height, width = latents
    network, scale = networks[part, torch.bfloat16], 1 if part == "decoder" else 8
    image = draw(batch, network.description.in_channels, height * scale, width * scale, dtype=torch.bfloat16)
    launches = network.launches(tuple(image.shape))

    def run(overlapped: bool) -> torch.Tensor:
        memory = launches.memory(image, torch.full((launches.scratch_bytes,), 255, dtype=torch.uint8, device="cuda"))
        launches.run(memory, overlapped=overlapped)
        return memory.output

    apart = run(False)
    other, square = torch.cuda.Stream(), draw(4096, 4096, dtype=torch.bfloat16)
    for i in range(6):
        if i % 2:  # some multiprocessors are late
            with torch.cuda.stream(other):
                square @ square
        assert torch.equal(run(True), apart)
    for _ in range(6):  # by graph from the second on
        assert torch.equal(network(image), apart)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_repeats_graphs_and_plain_launches_are_bitwise_equal(networks, part, monkeypatch):
    network = networks[part, torch.bfloat16]
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    shapes = [(1, network.description.in_channels, s, s + 8) for s in ((24, 32, 40) if part == "decoder" else (128, 192, 256))]
    for _ in range(3):  # three shapes in two graphs: captured, replayed, dropped, captured again
        for shape in shapes:
            image = draw(*shape, dtype=torch.bfloat16)
            plain = network.run_plain(image)
            assert torch.equal(plain, network(image))
            assert torch.equal(plain, network(image))
    assert len(network._graphs) == 2 and len(replays) >= 3
    before = network(image)
    network(image + 1)
    assert torch.equal(before, plain)  # a later call does not touch an earlier result
    network.release()
    assert torch.equal(plain, network(image))


def test_a_capture_that_fails_costs_no_result(vae, monkeypatch, caplog):
    def fail(graph, **options):
        raise RuntimeError("not now")

    config = FusedConfig(graph_after=1)
    network = FusedDecoder(image_state(vae, "decoder"), dtype=torch.float16, device=torch.device("cuda"), config=config)
    image = draw(1, 16, 8, 12, dtype=torch.float16)
    plain = network.run_plain(image)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", fail)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", lambda graph: None)
    for _ in range(3):
        assert torch.equal(plain, network(image))
    assert len(network._graphs) == 0 and caplog.text.count("a capture failed") == 1


def test_non_contiguous_input(networks):
    z = draw(1, 16, 20, 12, dtype=torch.float16)
    network = networks["decoder", torch.float16]
    assert torch.equal(network(z.transpose(2, 3)), network(z.transpose(2, 3).contiguous()))


def test_streams_and_threads(networks):
    network = networks["decoder", torch.bfloat16]
    inputs = [draw(1, 16, 32, 24 + 8 * (i % 2), dtype=torch.bfloat16) + i for i in range(8)]
    expected = [network.run_plain(z) for z in inputs]
    results: dict[int, torch.Tensor] = {}

    def work(start: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                for i in range(start, len(inputs), 2):
                    results[i] = network(inputs[i]) if start else network.run_plain(inputs[i])
        stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(expected):
        assert torch.equal(results[i], want)


def test_pointer_loads(networks, vae):
    """The path of GPUs without bulk tensor copies."""
    config = FusedConfig(graphs=0, gpu=NO_TMA)
    for part, shape, cls in (("decoder", (2, 16, 7, 9), FusedDecoder), ("encoder", (1, 3, 70, 50), FusedEncoder)):
        network = cls(image_state(vae, part), dtype=torch.float16, device=torch.device("cuda"), config=config)
        image = draw(*shape)
        assert relative(network(image.half()), reference(vae, part, image)) < LIMIT[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("sm90", [False, True])
def test_attention(sm90, splits, dtype):
    """Tiles that end in the next image or past the last, an odd number of tiles, fewer keys than a tile."""
    config = attention_config(sm90)
    for grid in (Grid(2, 21, 17), Grid(1, 40, 64), Grid(3, 8, 16), Grid(1, 58, 61), Grid(2, 3, 5), Grid(1, 1, 1)):
        if splits > -(-grid.height * grid.width // config.block_keys):
            continue
        tokens = (2 * draw(grid.pixels, 1152)).to(dtype)
        outs = [run_attention(tokens, grid, config, splits) for _ in range(3)]
        expected = from_flat(attention_reference(tokens, grid), grid)
        assert relative(from_flat(outs[0], grid), expected) < {torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("sm90", [False, True])
def test_attention_with_growing_scores(sm90):
    """Scores near 1000 overflow without a running maximum; here every block of keys has a larger one than those before."""
    grid, dtype = Grid(1, 40, 64), torch.float16
    tokens = draw(grid.pixels, 1152)
    tokens[:, 384:768] *= torch.linspace(0.1, 40, grid.pixels, device="cuda")[:, None]
    tokens = tokens.to(dtype)
    expected = from_flat(attention_reference(tokens, grid), grid)
    for splits in (1, 3):
        out = run_attention(tokens, grid, attention_config(sm90), splits)
        assert relative(from_flat(out, grid), expected) < 1e-3


def attention_config(sm90: bool) -> AttentionConfig:
    if sm90 and not describe_gpu(torch.device("cuda")).sm90:
        pytest.skip("needs compute capability 9.0")
    return AttentionConfig(128, 32, 8, 2, sm90=sm90)


def run_attention(tokens: torch.Tensor, grid: Grid, config: AttentionConfig, splits: int) -> torch.Tensor:
    """The result, where the halo was zero before."""
    out = random_flat(grid, 384, tokens.dtype).cuda()
    partial = torch.full((splits * grid.pixels, 384), float("nan"), device="cuda")
    tops = torch.full((splits * grid.pixels, 1), float("nan"), device="cuda")
    device = describe_gpu(torch.device("cuda"))
    attention(tokens, grid, out, config=config, gpu=device, splits=splits, partial=partial, tops=tops)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_convolutions(networks, vae, dtype):
    """What other GPUs run; here the networks above use the CUDA C++ convolutions."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the networks above run them")
    assert all(network._sm90 is not None for network in networks.values())
    config = FusedConfig(tuning=Tuning(sm90=False), graph_after=1)
    for part, cls, shapes in (
        ("decoder", FusedDecoder, [(1, 16, 1, 1), (2, 16, 9, 13), (1, 16, 64, 64)]),
        ("encoder", FusedEncoder, [(1, 3, 15, 9), (2, 3, 77, 100), (1, 3, 512, 512)]),
    ):
        network = cls(image_state(vae, part), dtype=dtype, device=torch.device("cuda"), config=config)
        for shape in shapes:
            image = draw(*shape)
            plain = network.run_plain(image.to(dtype))
            assert relative(plain, reference(vae, part, image)) < LIMIT[dtype]
            for _ in range(2):  # captured, replayed
                assert torch.equal(plain, network(image.to(dtype)))


def compiled_kernels() -> int:
    from qwen_vae_accel.kernels.compiling import TritonKernel
    from qwen_vae_accel.kernels.sm90 import attention as attention_sm90
    from qwen_vae_accel.kernels.sm90 import conv3x3 as conv3x3_sm90
    from qwen_vae_accel.kernels.triton import (
        attention,
        conv3x3,
        conv_in,
        conv_out,
        downsample_conv,
        flatten,
        pool,
        upsample_conv,
        wide_attention,
    )  # fmt: skip

    modules = (attention, conv3x3, conv_in, conv_out, downsample_conv, flatten, pool, upsample_conv, wide_attention)
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, TritonKernel)]
    device = torch.cuda.current_device()
    caches = [module._kernel.cache_info().currsize for module in (attention_sm90, conv3x3_sm90)]
    return sum(len(kernel._jit.device_caches[device][0]) for kernel in kernels) + sum(caches)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
@pytest.mark.parametrize("sm90", [True, False])
def test_nothing_is_compiled_after_compile(vae, part, sm90):
    cls = FusedDecoder if part == "decoder" else FusedEncoder
    config = FusedConfig(graphs=0, tuning=Tuning(sm90=sm90))
    network = cls(image_state(vae, part), dtype=torch.float16, device=torch.device("cuda"), config=config)
    steps: list[tuple[int, int]] = []
    network.compile(lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] == len(steps) >= 8
    before = compiled_kernels()
    for height, width in ((64, 64), (200, 504), (768, 1024), (1328, 1328)):
        scale = 8 if part == "decoder" else 1
        network(draw(1, network.description.in_channels, height // scale, width // scale, dtype=torch.float16))
    assert compiled_kernels() == before


@pytest.fixture(scope="module")
def float8(vae):
    """Source, scales and the simulation of float8 in fp32."""
    source = ModelSource(vae)
    job = Job("decode", source.topology, torch.bfloat16, torch.device("cuda", 0), float8=True)
    if torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        pytest.skip("needs compute capability 8.9")
    scales = input_scales(source.state("decode"), measured_peaks(source, job))
    return source, scales, simulate(source.model("decode", torch.float32, job.device), scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sm90", [False, True])
def test_float8_decoder(float8, vae, dtype, sm90):
    """As far from fp32 as the simulation, plain and from a graph, which agree bit for bit."""
    if sm90 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    source, scales, simulated = float8
    config = FusedConfig(tuning=Tuning(sm90=sm90), graph_after=1)
    network = FusedDecoder(source.state("decode"), dtype=dtype, device=torch.device("cuda"), config=config, float8=scales)
    network.compile()
    before = compiled_kernels()
    network.run_plain(draw(1, 16, 64, 64, dtype=dtype))
    assert compiled_kernels() == before
    for size in [(1, 16, 2, 2), (2, 16, 9, 13), (1, 16, 23, 40), (1, 16, 64, 64)]:
        z = draw(*size)
        exact = reference(vae, "decoder", z)
        with torch.no_grad():
            noise = relative(simulated(z), exact)
        plain = network.run_plain(z.to(dtype))
        error = relative(plain, exact)
        print(f"{size} {dtype} sm90 {sm90}: {error:.4f}, simulated {noise:.4f}")
        assert 0.5 * noise < error < 1.3 * noise
        for _ in range(2):  # captured, replayed
            assert torch.equal(plain, network(z.to(dtype)))
    assert not sm90 or network._sm90._layers


def test_float8_scratch_may_hold_anything(float8):
    source, scales, _ = float8
    network = FusedDecoder(
        source.state("decode"), dtype=torch.bfloat16, device=torch.device("cuda"), config=PLAIN, float8=scales
    )
    z = draw(2, 16, 9, 11, dtype=torch.bfloat16)
    launches = network.launches(tuple(z.shape))
    outputs = []
    for fill in (127, 0):  # 127: NaN in float8
        memory = launches.memory(z, torch.full((launches.scratch_bytes,), fill, dtype=torch.uint8, device="cuda"))
        memory.output.fill_(float("nan"))
        launches.run(memory)
        outputs.append(memory.output)
    assert torch.equal(*outputs) and not outputs[0].isnan().any()


def test_wrong_input_is_refused(networks):
    network = networks["decoder", torch.float16]
    with pytest.raises(ValueError, match="expected torch.float16"):
        network(draw(1, 16, 4, 4))
    with pytest.raises(ValueError, match="too small"):
        networks["encoder", torch.float16](draw(1, 3, 7, 64, dtype=torch.float16))
