"""What the image model does not do goes the original way, and is counted with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen_vae_accel import accelerate
from tests.conftest import random_vae
from tests.contract import X, Z, assert_same, calls, exact, fast
from tests.helpers import decoded, distance, moments, picture, randn


def test_gradients(micro):
    x, z = X.clone().requires_grad_(), Z.clone().requires_grad_()
    plain = random_vae()

    def values_and_grads(vae: nn.Module) -> list[torch.Tensor]:
        vae.zero_grad()
        outputs = moments(vae, x), decoded(vae, z)
        sum(o.square().sum() for o in outputs).backward()
        grads = [x.grad.clone(), z.grad.clone(), *(p.grad.clone() for p in vae.parameters() if p.grad is not None)]
        x.grad = z.grad = None
        return [*(o.detach() for o in outputs), *grads]

    expected = values_and_grads(plain)
    handle = accelerate(micro)
    for ours, theirs in zip(values_and_grads(micro), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert calls(handle) == {"encode": {"diffusers": 1}, "decode": {"diffusers": 1}}
    assert {f["method"] for f in handle.report().as_dict()["fallbacks"]} == {"encode", "decode"}
    assert all("gradients" in f["reason"] for f in handle.report().as_dict()["fallbacks"])


def test_gradients_that_nobody_can_ask_for(micro):
    """Frozen weights and an input without gradient: nothing to differentiate, so the fast path serves."""
    micro.requires_grad_(False)
    handle = accelerate(micro)
    assert not decoded(micro, Z).requires_grad
    assert decoded(micro, Z.clone().requires_grad_()).requires_grad
    assert calls(handle)["decode"] == {"eager": 1, "diffusers": 1}


@pytest.mark.usefixtures("no_grad")
def test_several_frames(micro):
    x, z = picture(1, 3, 5, 48, 64), randn(1, 4, 2, 6, 8)
    before = exact(micro, x, z)
    handle = accelerate(micro)
    for ours, theirs in zip(exact(micro, x, z), before, strict=True):
        assert torch.equal(ours, theirs)
    report = handle.report().as_dict()
    assert report["calls"] == {"encode": {"diffusers": 1}, "decode": {"diffusers": 1}}
    assert sorted(f["reason"][:8] for f in report["fallbacks"]) == ["2 frames", "5 frames"]


@pytest.mark.usefixtures("no_grad")
def test_autocast(micro):
    with torch.autocast("cpu", torch.bfloat16):
        before = exact(micro)
    handle = accelerate(micro)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(exact(micro), before, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert calls(handle) == {"encode": {"diffusers": 1}, "decode": {"diffusers": 1}}
    assert all("autocast" in f["reason"] for f in handle.report().as_dict()["fallbacks"])
    decoded(micro, Z)
    assert calls(handle)["decode"] == {"diffusers": 1, "eager": 1}


def test_inference_mode(micro):
    with torch.no_grad():
        before = exact(micro)
    handle = accelerate(micro)
    with torch.inference_mode():
        assert_same(micro, before)
    assert calls(handle) == fast(encode=1, decode=1)


@pytest.mark.usefixtures("no_grad")
def test_a_fallback_is_logged_once_per_reason(micro, caplog):
    accelerate(micro)
    for _ in range(3):
        decoded(micro, randn(1, 4, 2, 6, 8))
    assert sum("2 frames" in record.message for record in caplog.records) == 1


@pytest.mark.usefixtures("no_grad")
def test_forward_goes_through_the_image_model(micro):
    before = micro(X).sample
    handle = accelerate(micro)
    assert distance(micro(X).sample, before, "decode") <= 1e-5
    assert calls(handle) == fast(encode=1, decode=1)
