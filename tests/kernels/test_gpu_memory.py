"""On a GPU: what the fused backend holds between calls, and what happens when there is no room for it."""

from __future__ import annotations

import pytest
import torch

from qwen_vae_accel import accelerate
from tests.kernels.cases import random_vae

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("no_grad"),
]
MIB = 2**20


@pytest.fixture
def vae():
    return random_vae().to("cuda", torch.bfloat16)


def draw(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(1, 16, 1, height, width, generator=generator, device="cuda").bfloat16()


def test_only_weights_are_held_between_calls(vae):
    z = draw(128, 128)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with accelerate(vae, backend="fused"):
        for _ in range(4):
            vae.decode(z)
        held = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        vae.decode(z)
        peak = torch.cuda.max_memory_allocated() - before
    assert held < 160 * MIB, "packed weights, a graph's input and output"
    assert peak - held < 700 * MIB
    with accelerate(vae, backend="fused", offload_reference=True):
        for _ in range(4):
            vae.decode(z)
        assert torch.cuda.memory_allocated() < before, "less than the plain VAE"


def test_what_stays_does_not_hold_blocks_of_what_went(vae):
    """A plain decode leaves gigabytes of free blocks; so do the fused ones of several sizes."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    vae.decode(draw(96, 96))
    with accelerate(vae, backend="fused"):
        for _ in range(3):
            for height, width in ((128, 128), (64, 96), (104, 160)):
                image = vae.decode(draw(height, width)).sample
                vae.encode(image)
                del image
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - before < 260 * MIB, "two networks' weights, inputs and outputs of graphs"


def test_without_room_it_serves_in_bands(vae):
    z = draw(128, 128)
    with accelerate(vae, backend="fused") as handle:
        small = vae.decode(draw(16, 16)).sample
        expected = vae.decode(z).sample
        torch.cuda.empty_cache()
        # The fused decoder needs 600 MiB at once, and less than this leaves in bands.
        total, held = torch.cuda.get_device_properties(0).total_memory, torch.cuda.memory_reserved()
        try:
            torch.cuda.set_per_process_memory_fraction((held + 420 * MIB) / total)
            image = vae.decode(z).sample
            calls = handle.report().as_dict()["calls"]["decode"]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert calls == {"fused": 3} and torch.equal(image, expected)
        (bands,) = handle.report().as_dict()["bands"]
        assert bands["bands"] > 1 and "there was no room for" in bands["reason"]
        assert torch.equal(vae.decode(z).sample, expected), "nothing is poisoned"
        assert torch.equal(vae.decode(draw(16, 16)).sample, small)
        assert handle.report().as_dict()["calls"]["decode"] == {"fused": 5}
        assert handle.report().as_dict()["fallbacks"] == []
