"""What the image model does not do goes the original way, and is counted with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.errors import HandleError, UnsupportedVAEError
from tests.conftest import random_vae
from tests.contract import X, Z, assert_same, calls, fast, outputs, references
from tests.helpers import Reference, decoded, distance, moments, picture, randn


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
    before = outputs(micro, x, z)
    handle = accelerate(micro)
    for ours, theirs in zip(outputs(micro, x, z), before, strict=True):
        assert torch.equal(ours, theirs)
    report = handle.report().as_dict()
    assert report["calls"] == {"encode": {"diffusers": 1}, "decode": {"diffusers": 1}}
    assert sorted(f["reason"][:8] for f in report["fallbacks"]) == ["2 frames", "5 frames"]


@pytest.mark.usefixtures("no_grad")
def test_autocast(micro):
    with torch.autocast("cpu", torch.bfloat16):
        before = outputs(micro)
    handle = accelerate(micro)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(outputs(micro), before, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert calls(handle) == {"encode": {"diffusers": 1}, "decode": {"diffusers": 1}}
    assert all("autocast" in f["reason"] for f in handle.report().as_dict()["fallbacks"])
    decoded(micro, Z)
    assert calls(handle)["decode"] == {"diffusers": 1, "eager": 1}


def test_inference_mode(micro):
    before = references(micro)
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
    z = moments(micro, X)[:, :4]
    before = Reference(micro, "decode", z)
    handle = accelerate(micro)
    before.check(micro(X).sample)
    assert calls(handle) == fast(encode=1, decode=1)


def observe(vae: nn.Module) -> None:
    vae.decoder.mid_block.register_forward_hook(lambda module, inputs, output: output * 0.5)


def patch_module(vae: nn.Module) -> None:
    own = vae.decoder.conv_out.forward
    vae.decoder.conv_out.forward = lambda x, *rest: own(x, *rest) * 0.5


def patch_method(vae: nn.Module) -> None:
    own = vae.decode
    vae.decode = lambda z, return_dict=True: own(z * 0.5, return_dict=return_dict)


def subclass(vae: nn.Module) -> None:
    class Watermarked(type(vae)):
        def _decode(self, z, return_dict=True):
            return super()._decode(z * 0.5, return_dict=return_dict)

    vae.__class__ = Watermarked


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("change", [observe, patch_module, patch_method, subclass])
def test_what_somebody_changed_is_kept(micro, change):
    plain = random_vae()
    change(plain)
    before = outputs(plain)
    change(micro)
    handle = accelerate(micro)
    assert torch.equal(decoded(micro, Z), before[1])
    (fallback,) = handle.report().as_dict()["fallbacks"]
    assert fallback["method"] == "decode"
    what = {observe: "decoder.mid_block has hooks", patch_module: "decoder.conv_out has a forward() of its own",
            patch_method: "vae.decode was patched before accelerate()", subclass: "Watermarked overrides _decode"}  # fmt: skip
    assert what[change] in fallback["reason"]
    moments(micro, X)
    assert calls(handle) == {"encode": {"eager": 1}, "decode": {"diffusers": 1}}


@pytest.mark.usefixtures("no_grad")
def test_hooks_come_and_go(micro):
    before = Reference(micro, "decode", Z)
    handle = accelerate(micro)
    decoded(micro, Z)
    hook = micro.decoder.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5, *inputs[1:]))
    assert distance(decoded(micro, Z)[:, :, 0], before.theirs, "decode") > 0.01
    hook.remove()
    torch.nn.Conv2d(1, 1, 1).register_forward_hook(print)  # somebody else's
    before.check(decoded(micro, Z))
    assert calls(handle)["decode"] == {"eager": 2, "diffusers": 1}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("compiled", ["decode", "decoder.forward", "decoder"])
def test_what_torch_compiled_is_no_change(micro, compiled):
    """``vae.decode = torch.compile(vae.decode)``, as diffusers' documents have it."""
    before = Reference(micro, "decode", Z)
    if compiled == "decode":
        micro.decode = torch.compile(micro.decode)
    elif compiled == "decoder":
        micro.decoder.compile()
    else:
        micro.decoder.forward = torch.compile(micro.decoder.forward)
    handle = accelerate(micro)
    before.check(decoded(micro, Z))
    assert calls(handle)["decode"] == {"eager": 1}


def compile_decoder(vae: nn.Module) -> None:
    vae.decoder = torch.compile(vae.decoder, backend="eager")


def normalise_weights(vae: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(vae.decoder.conv_in)


def replace_block(vae: nn.Module) -> None:
    vae.decoder.mid_block = nn.Identity()


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (compile_decoder, "decoder is of class OptimizedModule, in diffusers of QwenImageDecoder3d"),
        (
            normalise_weights,
            "decoder.conv_in is of class ParametrizedQwenImageCausalConv3d, in diffusers of QwenImageCausalConv3d",
        ),
        (replace_block, "decoder.mid_block is of class Identity, in diffusers of QwenImageMidBlock"),
    ],
)
def test_a_network_that_becomes_another(micro, change, reason):
    plain = random_vae()
    change(plain)
    expected = plain.decode
    handle = accelerate(micro)
    decoded(micro, Z)
    change(micro)
    try:
        wanted = expected(Z).sample
    except TypeError as error:  # diffusers' own way does not work either
        with pytest.raises(type(error)):
            decoded(micro, Z)
    else:
        assert torch.equal(decoded(micro, Z), wanted)
    moments(micro, X)
    assert calls(handle) == {"encode": {"eager": 1}, "decode": {"eager": 1, "diffusers": 1}}
    assert handle.report().as_dict()["fallbacks"][0]["reason"] == reason
    with pytest.raises(UnsupportedVAEError, match=reason):
        handle.warmup(progress=False)


@pytest.mark.usefixtures("no_grad")
def test_restore_inside_a_call(micro):
    handle = accelerate(micro)
    network = handle._source.model("decode", torch.float32, torch.device("cpu"))
    inside = network.conv_out.register_forward_pre_hook(lambda *_: handle.restore())
    with pytest.raises(HandleError, match="inside a call"):
        decoded(micro, Z)
    inside.remove()
    assert calls(handle)["decode"] == {}
    decoded(micro, Z)
    handle.restore()
