"""``offload_reference``: the VAE's own weights in CPU memory while copies do the work."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from qwen_vae_accel import accelerate
from tests.helpers import Reference, decoded, moments, picture, randn

pytestmark = pytest.mark.usefixtures("no_grad")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_a_vae_on_the_cpu_stays_as_it_is(micro):
    addresses = [p.data_ptr() for p in micro.parameters()]
    z = randn(1, 4, 1, 6, 5)
    with accelerate(micro, backend="eager"):
        expected = decoded(micro, z)
    with accelerate(micro, backend="eager", offload_reference=True) as handle:
        assert torch.equal(decoded(micro, z), expected)
        assert handle.report().as_dict()["offloaded_bytes"] == 0
    assert [p.data_ptr() for p in micro.parameters()] == addresses


@pytest.fixture
def vae(tiny):
    return copy.deepcopy(tiny).cuda()


class TestOnTheGPU:
    pytestmark = gpu

    def test_same_results_less_memory(self, vae):
        z, x = randn(1, 16, 1, 9, 12).cuda(), picture(1, 3, 1, 64, 40).cuda()
        expected = Reference(vae, "decode", z), Reference(vae, "encode", x)
        before = torch.cuda.memory_allocated()
        with accelerate(vae, backend="eager", offload_reference=True) as handle:
            held = torch.cuda.memory_allocated()
            saved = handle.report().as_dict()["offloaded_bytes"]
            assert saved > 0.9 * sum(p.nbytes for p in vae.parameters())
            assert before - held > 0.9 * saved
            assert vae.device.type == "cuda"
            expected[0].check(decoded(vae, z))
            expected[1].check(moments(vae, x))
        assert {p.device.type for p in vae.parameters()} == {"cuda"}

    def test_the_original_path_brings_them_back(self, vae):
        video = randn(1, 16, 2, 6, 6).cuda()
        expected = vae.decode(video).sample
        with accelerate(vae, backend="eager", offload_reference=True) as handle:
            assert torch.equal(vae.decode(video).sample, expected)
            assert handle.report().as_dict()["offloaded_bytes"] == 0

    @pytest.mark.parametrize("mode", [FlopCounterMode, partial(FakeTensorMode, allow_non_fake_inputs=True)])
    def test_under_a_mode_they_come_back_as_values(self, vae, mode):
        """Nothing that watches the call sees the weights move, and they are no fakes afterwards."""
        z = randn(1, 16, 1, 6, 6).cuda()
        expected = decoded(vae, z)
        with accelerate(vae, backend="eager", offload_reference=True) as handle:
            with mode():
                vae.decode(z)
            assert handle.report().as_dict()["offloaded_bytes"] == 0
            assert {type(p.data) for p in vae.parameters()} == {torch.Tensor}
        assert torch.equal(decoded(vae, z), expected)

    def test_moves_and_new_weights_are_followed(self, vae):
        z = randn(1, 16, 1, 6, 6).cuda()
        other = {name: value * 0.9 for name, value in vae.state_dict().items()}
        with accelerate(vae, backend="eager", offload_reference=True) as handle:
            first = decoded(vae, z)
            vae.load_state_dict(other)
            changed = decoded(vae, z)
            assert not torch.equal(first, changed)
            vae.to("cpu")
            assert handle.report().as_dict()["offloaded_bytes"] == 0
            assert {p.device.type for p in vae.parameters()} == {"cpu"}
            vae.to("cuda", torch.bfloat16)
            assert handle.report().as_dict()["offloaded_bytes"] > 0
            assert decoded(vae, z.bfloat16()).dtype == torch.bfloat16
        assert {(p.device.type, p.dtype) for p in vae.parameters()} == {("cuda", torch.bfloat16)}
