"""Where and in which dtype a network computes, told from its weights and hooks; devices that are not here as plain values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, CpuOffload, LayerwiseCastingHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.errors import InvalidInputError
from qwen_vae_accel.model.offload import Placement, as_tensors_name_it, execution_device, values
from qwen_vae_accel.model.topology import METHODS, PARTS
from tests.conftest import random_vae
from tests.contract import X, Z, assert_same, calls, outputs, references
from tests.helpers import decoded, moments
from tests.offloading import CPU, LEAVES

pytestmark = pytest.mark.usefixtures("no_grad")
META, CUDA = torch.device("meta"), torch.device("cuda", 0)


def place(vae: nn.Module, hook: object, *paths: str) -> None:
    """Put ``hook`` where accelerate would, without moving anything to a device that is not here."""
    for path in paths:
        vae.get_submodule(path)._hf_hook = hook


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("cpu", "cpu"),
        (torch.device("cpu", 0), "cpu"),
        ("meta", "meta"),
        ("cuda:1", "cuda:1"),
        (1, "cuda:1"),
        ("xpu", "xpu:0"),
        ("mps", "mps:0"),
        (torch.device("xpu", 1), "xpu:1"),
    ],
)
def test_devices_are_named_as_tensors_name_them(given, named):
    if isinstance(given, int) and torch.accelerator.current_accelerator() is not None:
        named = f"{torch.accelerator.current_accelerator().type}:{given}"
    assert str(as_tensors_name_it(given)) == named


def test_the_nearest_hook_says_where(micro):
    assert Placement.of(micro, "decode") == Placement(CPU, torch.float32)
    place(micro, CpuOffload(execution_device=0), "")
    root = Placement.of(micro, "decode")
    assert root.device == CUDA and not root.moves_input and not root.hooked and root.reason == ""
    place(micro, AlignDevicesHook(execution_device="cuda:1"), "encoder", "quant_conv")
    assert Placement.of(micro, "encode").device == torch.device("cuda", 1)
    assert Placement.of(micro, "decode").device == CUDA
    assert execution_device(micro) == torch.device("cuda", 1)


def test_leaves_that_hooks_load_one_by_one(micro):
    apply_group_offloading(micro, onload_device=CUDA, offload_device=CPU, **LEAVES)
    for method in ("encode", "decode"):
        assert Placement.of(micro, method) == Placement(CUDA, torch.float32, hooked=True, moves_input=True)


@pytest.mark.parametrize("name", ["xpu", "mps", "cuda"])
def test_accelerators_of_every_kind(micro, name):
    apply_group_offloading(micro, onload_device=torch.device(name), offload_device=CPU, **LEAVES)
    assert str(accelerate(micro)._source.placement("decode").device) == f"{name}:0"


def test_hooks_that_come_after_the_first_call_are_seen(micro):
    handle = accelerate(micro)
    decoded(micro, Z)
    apply_group_offloading(micro, onload_device=CUDA, offload_device=CPU, **LEAVES)
    assert handle._source.placement("decode").device == CUDA
    other = AlignDevicesHook(execution_device="cuda:1", io_same_device=True)
    for module in micro.decoder.modules():
        add_hook_to_module(module, SimpleNamespace(init_hook=lambda module: module, **vars(other)))
    assert handle._source.placement("decode").reason == "its weights are spread over cuda:1 and cuda:0"


def test_hooks_that_return_the_output_leave_it_to_diffusers(micro):
    apply_group_offloading(micro, onload_device=CUDA, offload_device=CPU, **LEAVES)
    place(micro, AlignDevicesHook(execution_device=CUDA, io_same_device=True), "decoder")
    assert Placement.of(micro, "encode").moves_input and not Placement.of(micro, "decode").moves_input


def test_weights_spread_over_devices(micro):
    place(micro, AlignDevicesHook(execution_device=0), "decoder.conv_in", "decoder.mid_block")
    place(micro, AlignDevicesHook(execution_device=1), "decoder.up_blocks", "decoder.conv_out", "decoder.norm_out")
    place(micro, AlignDevicesHook(execution_device=0), "post_quant_conv")
    assert "spread over cuda:0 and cuda:1" in Placement.of(micro, "decode").reason
    assert Placement.of(micro, "encode").reason == ""


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_network_without_weights_leaves_the_other_one_fast(micro, method):
    """One of them given back its memory, before or after ``accelerate``."""
    before = references(micro)
    gone, kept = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")
    gone, kept = (gone, kept) if method == "decode" else (kept, gone)
    for name in gone[:1]:
        getattr(micro, name).to("meta")
    handle = accelerate(micro)
    for name in gone[1:]:
        getattr(micro, name).to("meta")
    ours = decoded(micro, Z) if method == "decode" else moments(micro, X)
    before[method == "decode"].check(ours)
    with pytest.raises((RuntimeError, NotImplementedError)):
        decoded(micro, Z) if method == "encode" else moments(micro, X)
    handle.warmup(progress=False)
    other = "decode" if method == "encode" else "encode"
    assert calls(handle) == {method: {"eager": 1}, other: {"diffusers": 1}}
    assert "on the meta device" in handle.report().as_dict()["fallbacks"][0]["reason"]


def test_everything_on_meta_is_shapes_only(micro):
    micro.to("meta")
    handle = accelerate(micro)
    assert decoded(micro, Z.to("meta")).shape == (1, 3, 1, 48, 64)
    assert calls(handle)["decode"] == {"diffusers": 1}


def test_emptied_and_filled_again(micro):
    """``to_empty`` leaves memory without content; what is loaded into it counts."""
    weights = {name: value.clone() for name, value in micro.state_dict().items()}
    before = references(micro)
    handle = accelerate(micro)
    assert_same(micro, before)
    micro.to_empty(device="cpu")
    micro.load_state_dict(weights)
    assert_same(micro, before)
    micro.to_empty(device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        decoded(micro, Z)
    micro.load_state_dict(weights, assign=True)
    assert_same(micro, before)
    assert calls(handle) == {"encode": {"eager": 3}, "decode": {"eager": 3, "diffusers": 1}}


def test_an_input_elsewhere_is_for_hooks_to_move(micro):
    """``device_map`` leaves hooks that move what passes through; with a plain VAE nobody would."""
    accelerate(micro)
    with pytest.raises(InvalidInputError, match="on meta, but the VAE is on cpu"):
        decoded(micro, Z.to("meta"))
    dispatch_model(micro, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert Placement.of(micro, "decode").moves_input
    place(micro, AlignDevicesHook(execution_device="cpu", io_same_device=True), "decoder")
    handle = accelerate(micro)
    with pytest.raises(Exception) as error:  # diffusers' own
        decoded(micro, Z.to("meta"))
    assert not isinstance(error.value, InvalidInputError)
    assert "input is on meta and the network on cpu" in handle.report().as_dict()["fallbacks"][0]["reason"]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_each_network_has_its_own_dtype(micro, dtypes):
    for method, dtype in zip(METHODS, dtypes, strict=True):
        for part in PARTS[method]:
            getattr(micro, part).to(dtype)
    inputs = X.to(dtypes[0]), Z.to(dtypes[1])
    before = outputs(micro, *inputs)
    exact = references(random_vae(), *inputs)
    handle = accelerate(micro)
    ours = outputs(micro, *inputs)
    assert tuple(output.dtype for output in ours) == tuple(output.dtype for output in before) == dtypes
    exactly = dtypes.index(torch.float32)
    exact[exactly].check(ours[exactly])
    assert calls(handle) == {"encode": {"eager": 1}, "decode": {"eager": 1}}


def test_a_network_in_two_dtypes_is_left_to_diffusers(micro):
    handle = accelerate(micro)
    micro.decoder.conv_out.bfloat16()
    with pytest.raises(RuntimeError, match="dtype|type"):
        decoded(micro, Z)
    assert "in float32 and bfloat16" in handle.report().as_dict()["fallbacks"][0]["reason"]


def test_storage_in_another_dtype_computes_in_that_of_the_hook(micro):
    hook = LayerwiseCastingHook(torch.bfloat16, torch.float32, False)
    place(micro, hook, *(name for name, module in micro.named_modules() if module._parameters and name.startswith("decoder")))
    assert Placement.of(micro.bfloat16(), "decode").reason == "its weights are in float32 and bfloat16"
    place(micro, hook, "post_quant_conv")
    assert Placement.of(micro, "decode") == Placement(CPU, torch.float32, hooked=True)


def test_values_that_a_stream_brings_are_read_from_where_they_come(micro):
    """Under way to the GPU the parameter may hold anything: a group with a stream has its own copy."""
    apply_group_offloading(micro, onload_device=CPU, offload_device=CPU, **LEAVES)
    expected = {name: value.clone() for name, value in values(micro, "decode").items()}
    for module in micro.modules():
        registry = getattr(module, "_diffusers_hook", None)
        group = registry and registry.get_hook("group_offloading").group
        for parameter in (*module._parameters.values(),) if group else ():
            if parameter is not None:
                group.cpu_param_dict[parameter] = parameter.data
                parameter.data = torch.full_like(parameter, torch.nan)
    found = values(micro, "decode")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_maps_of_sequential_offload_in_another_dtype(micro):
    """accelerate casts what it reads to the dtype of the parameter that it fills."""
    cpu_offload(micro, execution_device=CPU, state_dict={name: value.double() for name, value in micro.state_dict().items()})
    assert {value.dtype for value in values(micro, "decode").values()} == {torch.float32}


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["shard", "accelerate"])
@pytest.mark.parametrize("how", ["fsdp", "dtensor"])
def test_sharded_weights_are_left_to_diffusers(micro, mesh, first, how):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    before = decoded(micro, Z)
    handle = accelerate(micro) if first == "accelerate" else None
    if how == "fsdp":
        for part in (micro.decoder, micro.post_quant_conv):
            fully_shard(part, mesh=mesh)
    else:
        distribute_module(micro, mesh)
    handle = handle or accelerate(micro)
    image = decoded(micro, Z if how == "fsdp" else distribute_tensor(Z, mesh, [Replicate()]))
    assert torch.equal(image.to_local() if isinstance(image, DTensor) else image, before)
    assert calls(handle)["decode"] == {"diffusers": 1}


def test_hooks_of_the_vae_itself_are_seen_at_the_next_call(micro):
    """Group offloading by blocks leaves no hook inside the networks."""
    handle = accelerate(micro)
    decoded(micro, Z)
    assert not handle._source.placement("decode").hooked
    cpu = torch.device("cpu")
    apply_group_offloading(micro, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)
    assert handle._source.placement("decode").hooked
