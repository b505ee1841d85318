"""On a GPU: bands of rows at real widths give the bits of one piece, and take the memory that was planned."""

from __future__ import annotations

import pytest
import torch

from qwen_vae_accel import accelerate
from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.float8 import block_layers, calibrated_layers
from qwen_vae_accel.kernels.network import QWEN_IMAGE, QWEN_IMAGE_21, describe, network_of
from qwen_vae_accel.kernels.reasons import FLOAT8_CAPABILITY
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.model.image_vae import ImageEncoder
from tests.kernels.cases import random_vae
from tests.kernels.test_network import random_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("no_grad"),
]
MIB = 2**20
CUDA = torch.device("cuda")
TOPOLOGIES = {"Qwen-Image": QWEN_IMAGE, "Qwen-Image 2.1": QWEN_IMAGE_21}
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def states():
    return {
        (name, method): random_state(describe(topology, method))
        for name, topology in TOPOLOGIES.items()
        for method in ("decode", "encode")
    }


@pytest.fixture(scope="module")
def make(states):
    """Networks by VAE, method, dtype and whether float8; each is packed once, and ``limit`` set anew."""
    made = {}

    def network(name, method, dtype, limit, float8=False, sm90=True):
        key = name, method, dtype, float8, sm90
        if key not in made:
            state = states[name, method]
            described = network_of(state)
            scales = dict.fromkeys([*block_layers(described), *calibrated_layers(described)], 8.0) if float8 else {}
            cls = FusedDecoder if method == "decode" else FusedEncoder
            config = FusedConfig(tuning=Tuning(sm90=sm90))
            made[key] = cls(state, dtype=dtype, device=CUDA, config=config, float8=scales)
        found = made[key]
        found.limit_memory(limit)
        return found

    yield network
    made.clear()
    torch.cuda.empty_cache()


def draw(name: str, method: str, width: int, height: int, dtype: torch.dtype, batch: int = 1) -> torch.Tensor:
    topology = TOPOLOGIES[name]
    scale, channels = (topology.scale, topology.z_dim) if method == "decode" else (1, topology.image_channels)
    generator = torch.Generator("cuda").manual_seed(width)
    return torch.randn(batch, channels, height // scale, width // scale, generator=generator, device=CUDA).to(dtype)


# Shares of what one piece takes: other counts of bands, at other levels.
SHARES = (0.75, 0.5, 0.35)


def assert_bits_of_one_piece(make, name, method, dtype, batch=1, size=(1024, 1040), exact=None, **options) -> None:
    """``exact``: the same network in float32, if another schedule of kernels may serve a band than serves the whole: then the
    result in bands is no further from it."""
    x = draw(name, method, *size, dtype, batch)
    network = make(name, method, dtype, 2**40, **options)
    assert network.plan(x.shape).bands == 1
    need, whole = network.plan(x.shape).scratch_bytes, network(x)
    assert whole.isfinite().all()
    seen = set()
    for share in SHARES:
        network = make(name, method, dtype, int(share * need), **options)
        plan = network.plan(x.shape)
        assert plan.bands > 1 and plan.fits
        seen.add((plan.level, plan.bands))
        for _ in range(3):  # plainly, while a graph is captured, and from the graph
            image = network(x)
            if exact is None:
                assert torch.equal(image, whole), (share, plan.level, plan.bands)
            else:
                truth = exact(x.float())
                errors = [(result.float() - truth).norm().item() for result in (image, whole)]
                assert errors[0] <= 1.05 * errors[1], (share, plan.level, plan.bands, errors)
    assert len(seen) > 1, "divisions differ"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", ["decode", "encode"])
@pytest.mark.parametrize("name", list(TOPOLOGIES))
def test_bands_give_what_one_piece_gives(name, method, dtype, make, states):
    exact = None
    if method == "encode":  # small bands of its levels have schedules of their own, whose norms add up in another order
        torch.backends.cudnn.allow_tf32 = False
        exact = ImageEncoder({key: value.cuda() for key, value in states[name, method].items()})
    assert_bits_of_one_piece(make, name, method, dtype, exact=exact)


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_the_kernels_of_other_gpus_take_parts_of_matrices(method, make):
    assert_bits_of_one_piece(make, "Qwen-Image", method, torch.bfloat16, sm90=False)


@pytest.mark.parametrize("method", ["decode", "encode"])
@pytest.mark.parametrize("name", list(TOPOLOGIES))
def test_batches_in_bands_give_the_bits_of_one_piece(name, method, make):
    assert_bits_of_one_piece(make, name, method, torch.bfloat16, batch=2, size=(720, 1056))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < FLOAT8_CAPABILITY, reason="needs float8"
)
def test_float8_in_bands_gives_the_bits_of_one_piece(make):
    assert_bits_of_one_piece(make, "Qwen-Image", "decode", torch.bfloat16, float8=True)


@pytest.mark.parametrize(
    ("name", "method", "size", "limit"),
    [
        ("Qwen-Image", "decode", (1024, 1040), None), ("Qwen-Image", "decode", (2048, 2048), 700 * MIB),
        ("Qwen-Image", "encode", (1536, 2048), 500 * MIB), ("Qwen-Image 2.1", "decode", (1024, 1536), 1000 * MIB),
    ],
)  # fmt: skip
def test_the_measured_peak_is_the_planned_one(name, method, size, limit, make):
    network, x = make(name, method, torch.bfloat16, limit), draw(name, method, *size, torch.bfloat16)
    plan = network.plan(x.shape)
    assert limit is None or plan.bands > 1
    network.run_plain(x)  # layers are packed at their first use
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats()
        network(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert abs(peak() / plan.call_bytes - 1) < 0.05, "without a graph"
    assert abs(peak() / plan.peak_bytes - 1) < 0.05, "while it is captured"
    assert abs(peak() / plan.peak_bytes - 1) < 0.05, "from the graph"
    assert abs((torch.cuda.memory_allocated() - before) - plan.held_bytes) < 0.05 * plan.held_bytes + 4 * MIB


def room_for(nbytes: int) -> float:
    """The fraction of the GPU's memory that leaves so many bytes beside what is held now."""
    torch.cuda.empty_cache()
    return (torch.cuda.memory_reserved() + nbytes) / torch.cuda.get_device_properties(0).total_memory


def test_what_has_no_room_is_taken_in_bands(make):
    network, x = make("Qwen-Image", "decode", torch.bfloat16, None), draw("Qwen-Image", "decode", 1536, 1536, torch.bfloat16)
    expected, need = network(x), network.plan(x.shape).scratch_bytes
    network.release()
    torch.cuda.set_per_process_memory_fraction(room_for(need // 2))
    try:
        images = [network(x) for _ in range(3)]
        plan = network.plan(x.shape)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert plan.bands > 1 and plan.scratch_bytes < need // 2 and "no room" in plan.reason
    assert all(torch.equal(image, expected) for image in images)


def test_where_nothing_fits_the_error_is_torchs_own_and_the_next_call_works(make):
    network, x = make("Qwen-Image", "decode", torch.bfloat16, None), draw("Qwen-Image", "decode", 1024, 1024, torch.bfloat16)
    expected = network(x)
    network.release()
    torch.cuda.set_per_process_memory_fraction(room_for(20 * MIB))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            network(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(network(x), expected) and network.plan(x.shape).bands == 1


def test_a_users_own_graph_is_not_captured_twice(make):
    """Within a capture of the caller nothing is listed again: the memory of a graph is the caller's affair."""
    network = make("Qwen-Image", "decode", torch.bfloat16, 300 * MIB)
    x = draw("Qwen-Image", "decode", 1024, 1040, torch.bfloat16)
    expected = network.run_plain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = network(x)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_tiled_calls_are_served_in_bands():
    vae = random_vae().to("cuda", torch.bfloat16)
    z = torch.randn(1, 16, 1, 128, 130, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
    with accelerate(vae) as handle:
        image = vae.decode(z).sample
        moments = vae.encode(image).latent_dist.parameters
        vae.enable_tiling()
        assert torch.equal(vae.decode(z).sample, image)
        assert torch.equal(vae.encode(image).latent_dist.parameters, moments)
        report = handle.report().as_dict()
    assert report["calls"] == {"decode": {"fused": 2}, "encode": {"fused": 2}} and report["fallbacks"] == []
    assert [entry["method"] for entry in report["bands"]] == ["decode", "encode"]
    assert all(entry["bands"] > 1 and "use_tiling is on" in entry["reason"] for entry in report["bands"])


def test_the_configurations_limit_reaches_the_kernels():
    vae = random_vae().to("cuda", torch.bfloat16)
    z = torch.randn(1, 16, 1, 128, 130, generator=torch.Generator("cuda").manual_seed(0), device="cuda").bfloat16()
    with accelerate(vae) as handle:
        expected = vae.decode(z).sample
        assert handle.report().as_dict()["bands"] == []
    for limit in ("250 MiB", 0.003):
        with accelerate(vae, memory_limit=limit) as handle:
            assert torch.equal(vae.decode(z).sample, expected)
            (entry,) = handle.report().as_dict()["bands"]
        assert entry["bands"] > 1 and "memory_limit" in entry["reason"] and entry["count"] == 1
