"""Weights that are written without a mark: neither the address of a parameter nor its version counter moves."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.values import PLACES, TURNS, Sample
from tests.contract import Z, calls
from tests.helpers import FakeBackend, Reference, decoded, latents, randn

pytestmark = pytest.mark.usefixtures("no_grad")


def other_values(vae: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    state = vae.state_dict()
    return {name: value * (1 + 0.2 * torch.randn(value.shape, generator=generator).to(value)) for name, value in state.items()}


def fused_optimizer(vae: nn.Module) -> None:
    parameters = list(vae.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-2)
    torch.optim.AdamW(parameters, lr=1e-2, fused=True).step()
    vae.zero_grad()


def copied_into_data(vae: nn.Module) -> None:
    for parameter, value in zip(vae.parameters(), other_values(vae).values(), strict=True):
        parameter.data.copy_(value)


def scaled_data(vae: nn.Module) -> None:
    for parameter in vae.parameters():
        parameter.data.mul_(1.1)


def written_with_numpy(vae: nn.Module) -> None:
    for parameter, value in zip(vae.parameters(), other_values(vae).values(), strict=True):
        parameter.detach().numpy()[...] = value.numpy()


def written_into_the_storage(vae: nn.Module) -> None:
    for parameter in vae.parameters():
        parameter.untyped_storage().copy_((parameter.detach() * 1.1).untyped_storage())


def assigned_and_moved(vae: nn.Module) -> None:
    """A move changes addresses; what changed before it must not pass for a part of it."""
    device = next(vae.parameters()).device
    for parameter, value in zip(vae.parameters(), other_values(vae).values(), strict=True):
        parameter.data = value.clone()
    vae.to("cpu").to(device)


def written_and_moved(vae: nn.Module) -> None:
    scaled_data(vae)
    vae.to("cpu")


def changed_by_what_moves(vae: Any) -> None:
    vae._apply(lambda value: value * 1.1)


def emptied_and_filled(vae: Any) -> None:
    state = other_values(vae)
    vae.to_empty(device="cpu")
    for parameter, value in zip(vae.parameters(), state.values(), strict=True):
        parameter.data.copy_(value)


def one_layer(vae: Any) -> None:
    vae.decoder.conv_out.weight.data.mul_(1.1)


WRITES = [
    fused_optimizer, copied_into_data, scaled_data, written_with_numpy, written_into_the_storage, assigned_and_moved,
    written_and_moved, changed_by_what_moves, emptied_and_filled, one_layer,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_every_write_is_noticed_at_the_next_call(micro, write, compute):
    micro.requires_grad_(False)
    handle = accelerate(micro, backend="eager", dtype=compute)
    before = decoded(micro, Z)
    write(micro)
    fresh = copy.deepcopy(micro)
    reference = Reference(fresh, "decode", Z, getattr(torch, compute))
    after = decoded(micro, Z)
    assert not torch.equal(after, before)
    reference.check(after)
    assert calls(handle)["decode"] == {"eager": 2}


@pytest.mark.parametrize("write", [scaled_data, written_with_numpy, assigned_and_moved], ids=lambda write: write.__name__)
def test_an_engine_of_older_weights_is_not_run(micro, fake: FakeBackend, tmp_path, write):
    micro.requires_grad_(False)
    options = {"backend": "tensorrt", "engine_dir": tmp_path / "engines", "sizes": ["32x32"], "on_miss": "build"}
    accelerate(micro, **options)
    z = latents("32x32")
    decoded(micro, z)
    write(micro)
    Reference(copy.deepcopy(micro), "decode", z).check(decoded(micro, z))
    assert fake.count("build") == 2


def test_a_vae_that_was_made_in_inference_mode(micro):
    with torch.inference_mode():
        vae: Any = copy.deepcopy(micro)
        for module in vae.modules():
            for name, parameter in list(module._parameters.items()):
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        assert next(vae.parameters()).is_inference()
        accelerate(vae, backend="eager")
        decoded(vae, Z)
        vae.load_state_dict(other_values(vae))
        micro.load_state_dict(vae.state_dict())
        after = decoded(vae, Z)
    Reference(micro, "decode", Z).check(after)


def test_weights_that_stay_are_not_read_again(micro):
    source = ModelSource(micro)
    generation = source.generation("decode")
    model = source.model("decode", torch.float32, torch.device("cpu"))
    for _ in range(2 * TURNS):
        assert source.generation("decode") == generation
    with source.moving():
        micro.to("cpu")
    assert source.generation("decode") == generation
    assert source.model("decode", torch.float32, torch.device("cpu")) is not model, "a move drops what pins memory"


# The sample itself.


def tensors() -> list[Tensor]:
    plain = [randn(64, 32, 3, 3), randn(48, 40, 3, 3, 3), randn(7), randn(1), randn(2, 3)]
    strided = [randn(24, 16, 3, 3).to(memory_format=torch.channels_last), randn(30, 20).t(), randn(40, 40)[::2, 3:30]]
    return [*plain, *strided, randn(96).half(), randn(96, 9).bfloat16(), torch.empty(0), torch.empty(5, device="meta")]


def rounds(sample: Sample, count: int = TURNS) -> list[bool]:
    return [sample.same() for _ in range(count)]


@pytest.mark.parametrize("index", range(10))
def test_a_change_of_any_tensor_is_seen_at_once(index):
    values = tensors()
    sample = Sample(values)
    assert all(rounds(sample))
    values[index].data.mul_(3)
    assert not any(rounds(sample))


@pytest.mark.parametrize("index", [0, 1, 5, 6, 7])
def test_a_change_of_one_output_channel_is_seen_within_all_turns(index):
    values = tensors()
    for channel in range(len(values[index])):
        sample = Sample(values)
        values[index][channel].data.add_(1)
        assert not all(rounds(sample)), channel


def test_a_run_of_an_eighth_is_seen_at_once():
    value = randn(100, 80)
    run = -(-2 * value.numel() // PLACES)
    for start in range(0, value.numel() - run, 97):
        sample = Sample([value])
        value.view(-1)[start : start + run].data.add_(1)
        assert not any(rounds(sample)), start


def test_not_a_number_is_like_any_other_value():
    value = randn(100)
    value[3] = torch.nan
    sample = Sample([value])
    assert all(rounds(sample))
    value.data.fill_(torch.nan)
    assert not any(rounds(sample))


def test_tensors_at_odd_addresses_are_read():
    """Weights that are mapped from a file begin wherever they do in the file."""
    memory = torch.zeros(4099, dtype=torch.uint8).numpy()
    values = [torch.from_numpy(memory[start : start + 1024].view(np.float32)) for start in (1, 2051)]
    sample = Sample(values)
    assert all(rounds(sample))
    values[1].add_(1)
    assert not any(rounds(sample))


def test_samples_of_the_same_values_are_equal_wherever_they_are():
    values = tensors()
    copies = [value.clone() for value in values]
    assert Sample(values).equals(Sample(copies))
    copies[3].add_(1)
    assert not Sample(values).equals(Sample(copies))
    assert not Sample(values).equals(Sample(values[:3]))


@pytest.mark.gpu
class TestOnTheGPU:
    """Where the comparison runs beside the call: the first result is dropped if it was of older weights."""

    @pytest.mark.parametrize("backend", ["eager", "fused"])
    @pytest.mark.parametrize("write", [fused_optimizer, copied_into_data, scaled_data, assigned_and_moved])
    def test_every_write_is_noticed_at_the_next_call(self, full, write: Callable[[Any], None], backend):
        vae = copy.deepcopy(full).to("cuda", torch.bfloat16)
        z = randn(1, 16, 1, 12, 16).to("cuda", torch.bfloat16)
        accelerate(vae, backend=backend)
        decoded(vae, z)
        write(vae)
        Reference(copy.deepcopy(vae), "decode", z).check(decoded(vae, z))

    def test_parked_weights(self, tiny):
        vae = tiny.cuda()
        z = randn(1, 16, 1, 6, 6).cuda()
        with accelerate(vae, backend="eager", offload_reference=True):
            decoded(vae, z)
            scaled_data(vae)
            Reference(copy.deepcopy(vae).cuda(), "decode", z).check(decoded(vae, z))

    def test_a_result_of_older_weights_is_dropped_and_not_counted(self, tiny):
        vae = tiny.cuda()
        z = randn(1, 16, 1, 6, 6).cuda()
        handle = accelerate(vae, backend="eager")
        for call in range(1, 4):
            decoded(vae, z)
            scaled_data(vae)
            Reference(copy.deepcopy(vae), "decode", z).check(decoded(vae, z))
            assert calls(handle)["decode"] == {"eager": 2 * call}

    def test_a_network_begun_before_the_look_is_dropped_where_the_look_finds_a_change(self, tiny):
        vae = tiny.cuda()
        z = randn(1, 16, 1, 6, 6).cuda()
        handle = accelerate(vae, backend="eager")
        run, begun = handle._dispatcher.run, []
        handle._dispatcher.run = lambda request, image: begun.append(request.generation) or run(request, image)
        for _ in range(2):
            decoded(vae, z)
        vae.decoder.mid_block.resnets[0].nonlinearity = nn.Identity()
        expected = copy.deepcopy(vae).decode(z, return_dict=False)[0]
        assert torch.allclose(decoded(vae, z), expected)
        assert begun == [1, 1, 1]
        assert calls(handle)["decode"] == {"eager": 2, "diffusers": 1}
        vae.decoder.mid_block.resnets[0].nonlinearity = nn.SiLU()
        for parameter in vae.parameters():
            parameter.mul_(1.1)
        Reference(copy.deepcopy(vae), "decode", z).check(decoded(vae, z))
        assert calls(handle)["decode"] == {"eager": 3, "diffusers": 1}

    def test_weights_that_stay_are_served_once(self, tiny):
        vae = tiny.cuda()
        z = randn(1, 16, 1, 6, 6).cuda()
        handle = accelerate(vae, backend="eager")
        for _ in range(TURNS + 2):
            decoded(vae, z)
        assert calls(handle)["decode"] == {"eager": TURNS + 2}

    def test_nothing_waits_while_a_stream_is_captured(self, tiny):
        vae = tiny.cuda()
        z = randn(1, 16, 1, 6, 6).cuda()
        accelerate(vae, backend="eager")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = decoded(vae, z)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = decoded(vae, z)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)

    def test_the_comparison_takes_little_of_the_host(self, full):
        vae = copy.deepcopy(full).to("cuda", torch.bfloat16)
        source = ModelSource(vae)
        source.generation("decode")
        spans = []
        for _ in range(200):
            torch.cuda.synchronize()
            start = time.thread_time()
            source.compare("decode", 1)
            spans.append(time.thread_time() - start)
        assert sorted(spans)[20] < 100e-6
