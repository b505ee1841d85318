"""Offloading as accelerate and diffusers do it, and whole pipelines, on the CPU."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline
from qwen_vae_accel.errors import HandleError
from qwen_vae_accel.plugin.methods import handle_of
from tests.conftest import random_vae
from tests.contract import assert_same, calls, decoder_input, fast, generate, outputs, references
from tests.helpers import Reference, decoded, randn


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("first", ["offload", "accelerate"])
def test_model_offload_with_hooks(micro, first):
    before = references(micro)
    moved = []
    if first == "accelerate":
        handle = accelerate(micro)
    other = nn.Linear(2, 2)
    _, other_hook = cpu_offload_with_hook(other, "cpu")
    _, hook = cpu_offload_with_hook(micro, "cpu", prev_module_hook=other_hook)
    if first == "offload":
        handle = accelerate(micro)
    pre_forward = micro._hf_hook.pre_forward
    micro._hf_hook.pre_forward = lambda module, *args: moved.append(module) or pre_forward(module, *args)
    assert_same(micro, before)
    hook.offload()
    assert_same(micro, before)
    assert moved == [micro] * 4, "the hook runs before every call"
    assert calls(handle) == fast(encode=2, decode=2)


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("first", ["offload", "accelerate"])
@pytest.mark.parametrize("config", [{}, {"dtype": "bfloat16"}])
def test_sequential_offload(micro, first, config):
    """Parameters live on the meta device; their values are in the hooks' maps."""
    before = references(micro, dtype=torch.bfloat16 if config else None)
    if first == "accelerate":
        handle = accelerate(micro, **config)
    cpu_offload(micro, execution_device=torch.device("cpu"))
    assert next(micro.parameters()).is_meta
    if first == "offload":
        handle = accelerate(micro, **config)
    assert_same(micro, before)
    assert calls(handle) == fast(encode=1, decode=1)
    # The original path still works under the hooks, and after them so does ours.
    frames = decoded(micro, randn(1, 4, 2, 6, 8))
    assert torch.equal(frames, decoded(random_vae(), randn(1, 4, 2, 6, 8)))
    assert_same(micro, before)
    handle.restore()
    remove_hook_from_module(micro, recurse=True)


# Pipelines.


@pytest.mark.numeric
@pytest.mark.parametrize("offload", [False, True])
def test_a_whole_pipeline(micro, offload):
    pipe = tiny_pipeline(micro)
    before = generate(pipe, count=2)
    reference = Reference(micro, "decode", decoder_input(pipe, lambda: generate(pipe, count=2)))
    if offload:
        pipe.enable_model_cpu_offload(device="cpu")
    handle = accelerate(pipe)
    reference.check(generate(pipe, count=2) * 2 - 1)
    assert calls(handle) == fast(decode=1), "the pipeline ran without gradients, through the image model"
    handle.restore()
    assert torch.equal(generate(pipe, count=2), before)


def test_a_pipeline_that_is_saved_and_loaded(micro, tmp_path):
    plain = copy.deepcopy(micro)
    accelerate(micro).report()
    micro.save_pretrained(tmp_path)
    again = type(micro).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for ours, theirs in zip(outputs(again), outputs(plain), strict=True):
            assert torch.equal(ours, theirs)


def test_the_vae_of_a_pipeline_replaced_after_accelerate(micro):
    pipe = tiny_pipeline(micro)
    handle = accelerate(pipe)
    assert handle.report().as_dict()["note"] == ""
    other = random_vae("micro")
    pipe.vae = other
    assert "replaced after accelerate()" in handle.report().as_dict()["note"]
    with pytest.raises(HandleError, match="replaced after accelerate"):
        handle.warmup(progress=False)
    second = accelerate(pipe)
    assert second is not handle and second.vae is other
    handle.restore()
    assert handle_of(micro) is None and handle_of(other) is second
    second.restore()


def test_a_pipeline_that_is_gone_is_not_kept_alive(micro):
    pipe = tiny_pipeline(micro)
    handle = accelerate(pipe)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None and handle.report().as_dict()["note"] == ""
