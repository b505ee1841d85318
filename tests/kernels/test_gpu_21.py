"""On a Hopper GPU: Qwen-Image 2.1's encoder and decoder of full size with random weights against diffusers in fp32."""

from __future__ import annotations

import copy

import pytest
import torch

from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.fused.calibration import measured_peaks
from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.float8 import input_scales, simulate
from qwen_vae_accel.kernels.gpu import describe_gpu
from qwen_vae_accel.kernels.layout import Grid, from_flat
from qwen_vae_accel.kernels.sm90.schedules import SCHEDULES
from qwen_vae_accel.kernels.triton.attention import attention_reference
from qwen_vae_accel.kernels.triton.flatten import flatten, flatten_reference
from qwen_vae_accel.kernels.triton.pool import pool, pool_reference
from qwen_vae_accel.model import ModelSource
from tests.kernels.cases import NO_TMA, assert_halo_zero, poisoned, random_flat, random_vae_21, run_wide_attention
from tests.kernels.test_gpu import DTYPES, LIMIT, compiled_kernels, draw, relative
from tests.not_finite import VALUES, assert_same_kinds, with_value

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
    ),
]
PARTS = ("decoder", "encoder")
METHODS = {"decoder": "decode", "encoder": "encode"}
CUDA = torch.device("cuda")
PLAIN = FusedConfig(graphs=0)


@pytest.fixture(scope="module", autouse=True)
def exact_fp32_reference():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def vae():
    return random_vae_21()


def fused(vae, part: str, dtype: torch.dtype, config: FusedConfig = PLAIN, **options) -> FusedDecoder | FusedEncoder:
    kind = FusedDecoder if part == "decoder" else FusedEncoder
    return kind(ModelSource(vae).state(METHODS[part]), dtype=dtype, device=CUDA, config=config, **options)


@pytest.fixture(scope="module")
def networks(vae):
    return {(part, dtype): fused(vae, part, dtype, FusedConfig(graphs=2)) for part in PARTS for dtype in DTYPES}


def reference(vae, part: str, image: torch.Tensor) -> torch.Tensor:
    scale = 1 if part == "decoder" else 16
    if image.is_cuda and image.shape[2] // scale * (image.shape[3] // scale) == 1:
        # Of one latent pixel diffusers' attention fails on the GPU: "query is not correctly aligned".
        return reference(copy.deepcopy(vae).cpu(), part, image.cpu()).cuda()
    with torch.no_grad():
        if part == "decoder":
            return vae.decode(image[:, :, None]).sample[:, :, 0]
        return vae.encode(image[:, :, None]).latent_dist.parameters[:, :, 0]


def input_of(part: str, batch: int, height: int, width: int, dtype: torch.dtype = torch.float32, channels: int = 4):
    """For ``height`` x ``width`` pixels of the latent."""
    if part == "decoder":
        return draw(batch, 64, height, width, dtype=dtype)
    return draw(batch, channels, 16 * height, 16 * width, dtype=dtype)


# ---- the networks ---------------------------------------------------------------------------------------------------

LATENTS = [
    (1, 1, 1), (1, 3, 2), (2, 7, 5), (1, 16, 16), (4, 5, 9), (1, 23, 40), (3, 13, 17), (2, 33, 9), (1, 29, 52), (1, 64, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", LATENTS, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_network(networks, vae, part, size, dtype):
    x = input_of(part, *size)
    network = networks[part, dtype]
    out, expected = network.run_plain(x.to(dtype)), reference(vae, part, x)
    batch, height, width = size
    shape = (batch, 4, 16 * height, 16 * width) if part == "decoder" else (batch, 128, height, width)
    assert out.is_contiguous() and tuple(out.shape) == shape == tuple(expected.shape)
    assert part == "encoder" or out.abs().max() <= 1
    assert relative(out, expected) < LIMIT[dtype]


@pytest.mark.parametrize("part", PARTS)
def test_every_convolution_is_a_kernel_of_sm90(networks, part):
    """But the encoder's first and last; nothing is left to kernels that another GPU would run."""
    network = networks[part, torch.bfloat16]
    network.run_plain(input_of(part, 1, 4, 4, torch.bfloat16))
    assert len(network._sm90._layers) == {"decoder": 40, "encoder": 29}[part]
    modes = {(layer.mode, layer.channels, layer.out) for _, layer in network._sm90._layers.values()}
    assert modes <= set(SCHEDULES)


@pytest.mark.parametrize("part", PARTS)
def test_three_image_channels(part):
    vae = random_vae_21(3)
    x = input_of(part, 2, 9, 11, channels=3)
    out = fused(vae, part, torch.float16)(x.half())
    assert relative(out, reference(vae, part, x)) < LIMIT[torch.float16]


@pytest.mark.parametrize("part", PARTS)
def test_it_errs_less_than_eager(networks, vae, part):
    x = input_of(part, 1, 20, 28)
    expected = reference(vae, part, x)
    eager = relative(reference(copy.deepcopy(vae).bfloat16(), part, x.bfloat16()), expected)
    assert relative(networks[part, torch.bfloat16](x.bfloat16()), expected) < 0.75 * eager


@pytest.mark.parametrize("part", PARTS)
def test_scratch_may_hold_anything(networks, part):
    network = networks[part, torch.bfloat16]
    x = input_of(part, 2, 9, 11, torch.bfloat16)
    launches = network.launches(tuple(x.shape))
    outputs = []
    for fill in (255, 0):
        memory = launches.memory(x, torch.full((launches.scratch_bytes,), fill, dtype=torch.uint8, device="cuda"))
        memory.output.fill_(float("nan"))
        launches.run(memory)
        outputs.append(memory.output)
    assert torch.equal(*outputs) and not outputs[0].isnan().any()


@pytest.mark.parametrize("latents", [(1, 30, 53), (3, 17, 23), (1, 58, 64)], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_overlapping_kernels_change_no_bit(networks, part, latents):
    network, x = networks[part, torch.bfloat16], input_of(part, *latents, torch.bfloat16)
    launches = network.launches(tuple(x.shape))

    def run(overlapped: bool) -> torch.Tensor:
        memory = launches.memory(x, torch.full((launches.scratch_bytes,), 255, dtype=torch.uint8, device="cuda"))
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
        assert torch.equal(network(x), apart)


@pytest.mark.parametrize("part", PARTS)
def test_graphs_and_plain_launches_are_bitwise_equal(networks, part):
    network = networks[part, torch.float16]
    for _ in range(3):  # three shapes in two graphs: captured, replayed, dropped, captured again
        for side in (8, 12, 16):
            x = input_of(part, 1, side, side + 5, torch.float16)
            plain = network.run_plain(x)
            assert torch.equal(plain, network(x)) and torch.equal(plain, network(x))
    assert len(network._graphs) == 2
    before = network(x)
    network(x + 1)
    assert torch.equal(before, plain)  # a later call does not touch an earlier result


def test_images_of_a_batch_do_not_depend_on_each_other(networks):
    for part in PARTS:
        x = input_of(part, 3, 6, 7, torch.bfloat16)
        network = networks[part, torch.bfloat16]
        whole = network(x)
        changed = x.clone()
        changed[1] += 1
        assert torch.equal(network(changed)[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("part", PARTS)
def test_non_contiguous_input(networks, part):
    network, x = networks[part, torch.float16], input_of(part, 2, 6, 9, torch.float16).transpose(2, 3)
    assert torch.equal(network(x), network(x.contiguous()))


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_compiled_after_compile(vae, part):
    network = fused(vae, part, torch.float16)
    network.compile()
    before = compiled_kernels()
    for height, width in ((4, 4), (13, 32), (48, 64), (64, 64)):
        network(input_of(part, 1, height, width, torch.float16))
    assert compiled_kernels() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_finite_stays_in_its_image(vae, part, dtype):
    """Of three images the middle one has the value; by plain launches, and by a graph that has seen numbers before."""
    network, plain = fused(vae, part, dtype, FusedConfig(graph_after=1)), copy.deepcopy(vae).to(dtype)
    x = input_of(part, 3, 5, 7, dtype)
    clean = network.run_plain(x)
    assert clean.isfinite().all()
    for _ in range(2):
        assert torch.equal(network(x), clean)
    for value in VALUES:
        bad = with_value(x, value)
        expected = reference(plain, part, bad)
        for ours in (network.run_plain(bad), network(bad)):
            assert_same_kinds(ours, expected)
            assert torch.equal(ours[0], clean[0]) and torch.equal(ours[2], clean[2])
        assert expected[1].isnan().all()
    assert torch.equal(network(x), clean)  # nothing of it is left in buffers


# ---- float8 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float8(vae):
    """Scales, and the simulation of float8 in fp32."""
    source = ModelSource(vae)
    job = Job("decode", source.topology, torch.bfloat16, torch.device("cuda", 0), float8=True)
    scales = input_scales(source.state("decode"), measured_peaks(source, job))
    return scales, simulate(source.model("decode", torch.float32, job.device), scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_decoder(float8, vae, dtype):
    """As far from fp32 as the simulation, plain and from a graph, which agree bit for bit."""
    scales, simulated = float8
    network = fused(vae, "decoder", dtype, FusedConfig(graph_after=1), float8=scales)
    network.compile()
    before = compiled_kernels()
    network.run_plain(input_of("decoder", 1, 32, 32, dtype))
    assert compiled_kernels() == before
    for size in ((1, 2, 2), (2, 9, 13), (1, 23, 40), (1, 48, 48)):
        z = input_of("decoder", *size)
        exact = reference(vae, "decoder", z)
        with torch.no_grad():
            noise = relative(simulated(z), exact)
        plain = network.run_plain(z.to(dtype))
        error = relative(plain, exact)
        print(f"{size} {dtype}: {error:.4f}, simulated {noise:.4f}")
        assert 0.5 * noise < error < 1.3 * noise
        for _ in range(2):  # captured, replayed
            assert torch.equal(plain, network(z.to(dtype)))


def test_float8_scratch_may_hold_anything(float8, vae):
    network = fused(vae, "decoder", torch.bfloat16, float8=float8[0])
    z = input_of("decoder", 2, 9, 11, torch.bfloat16)
    launches = network.launches(tuple(z.shape))
    outputs = []
    for fill in (127, 0):  # 127: NaN in float8
        memory = launches.memory(z, torch.full((launches.scratch_bytes,), fill, dtype=torch.uint8, device="cuda"))
        memory.output.fill_(float("nan"))
        launches.run(memory)
        outputs.append(memory.output)
    assert torch.equal(*outputs) and not outputs[0].isnan().any()


# ---- kernels of their own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [768, 1152])
def test_wide_attention(channels, dtype):
    """Tiles that end in the next image or past the last; several chunks of queries in the last size; also by pointers."""
    for grid in (Grid(1, 1, 1), Grid(2, 21, 17), Grid(3, 8, 16), Grid(1, 40, 64), Grid(2, 96, 96)):
        tokens = (2 * draw(grid.pixels, 3 * channels)).to(dtype)
        expected = from_flat(attention_reference(tokens, grid), grid)
        devices = (describe_gpu(CUDA),) if grid.pixels > 3000 else (describe_gpu(CUDA), NO_TMA)
        for device in devices:
            outs = [run_wide_attention(tokens, grid, device) for _ in range(2)]
            # Stored weights are rounded once, maybe again when their tile's factor multiplies them, and the output is.
            assert relative(from_flat(outs[0], grid), expected) < {torch.bfloat16: 3.5e-3, torch.float16: 1e-3}[dtype]
            assert torch.equal(from_flat(outs[0], grid), from_flat(outs[1], grid))


def test_wide_attention_with_growing_scores():
    """Every tile of keys has a larger score than those before; near 1000 they overflow without a maximum."""
    grid = Grid(1, 40, 64)
    tokens = draw(grid.pixels, 3 * 768)
    tokens[:, 768:1536] *= torch.linspace(0.1, 40, grid.pixels, device="cuda")[:, None]
    tokens = tokens.half()
    expected = from_flat(attention_reference(tokens, grid), grid)
    assert relative(from_flat(run_wide_attention(tokens, grid, describe_gpu(CUDA)), grid), expected) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_and_latents_in_the_flat_layout(dtype):
    for grid in (Grid(1, 2, 2), Grid(2, 37, 70), Grid(1, 301, 5)):
        a, small = random_flat(grid, 96, dtype).cuda(), grid.halved()
        pooled = poisoned(small.rows, 96, dtype=dtype).cuda()
        pool(a, grid, pooled)
        assert relative(pooled, pool_reference(a, grid)) < {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
        assert_halo_zero(pooled.cpu(), small)
        image = draw(grid.batch, 64, grid.width, grid.height, dtype=dtype).transpose(2, 3)
        flat = poisoned(grid.rows, 80, dtype=dtype).cuda()
        flatten(image, flat)
        assert torch.equal(flat, flatten_reference(image))
