"""The handle: one per VAE, and the way back; copies of an accelerated VAE are plain ones."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qwen_vae_accel import AccelConfig, accelerate
from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline
from qwen_vae_accel.errors import HandleError, InvalidInputError
from qwen_vae_accel.plugin.methods import handle_of
from tests.conftest import random_vae
from tests.contract import Z, assert_same, calls, fast, generate, outputs, references
from tests.helpers import decoded, randn


def test_the_same_config_gives_the_same_handle(micro, tmp_path):
    handle = accelerate(micro, task="i2i")
    assert accelerate(micro, AccelConfig(task="i2i")) is handle
    assert accelerate(micro, {"task": "i2i"}) is handle
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"task": "i2i"}))
    assert accelerate(micro, path) is accelerate(micro, str(path)) is handle
    assert accelerate(tiny_pipeline(micro), task="i2i") is handle
    with pytest.raises(HandleError, match="restore"):
        accelerate(micro, task="t2i")
    with pytest.raises(HandleError, match="t2i.*\n.*|.*i2i"):
        accelerate(micro)
    assert handle.config == AccelConfig(task="i2i") and accelerate(micro, task="i2i") is handle
    handle.restore()
    assert accelerate(micro).config == AccelConfig()


def test_anything_with_a_vae_is_a_pipeline(micro):
    """Also an object that no weak reference can point to."""
    holder = SimpleNamespace(vae=micro)
    handle = accelerate(holder)
    assert accelerate(holder) is accelerate(micro) is handle
    holder.vae = None
    assert "replaced after accelerate()" in handle.report().as_dict()["note"]
    handle.restore()


def test_a_pipeline_that_cannot_be_taken_leaves_the_vae_alone(micro, monkeypatch):
    keys = set(vars(micro))
    monkeypatch.setattr("qwen_vae_accel.plugin.handle.processors_of", lambda pipeline: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        accelerate(SimpleNamespace(vae=micro))
    assert set(vars(micro)) == keys


def test_restore_leaves_no_trace(micro):
    with torch.no_grad():
        before = outputs(micro)  # diffusers itself leaves its caches behind
        attributes = {name: id(value) for name, value in vars(micro).items()}
        modules = {name: dict(vars(module)) for name, module in micro.named_modules()}
        methods = micro.encode, micro.decode, micro._apply
        handle = accelerate(micro)
        decoded(micro, Z)
        handle.restore()
        assert {name: id(value) for name, value in vars(micro).items()} == attributes
        assert (micro.encode, micro.decode, micro._apply) == methods
        for name, module in micro.named_modules():
            assert vars(module).keys() == modules[name].keys()
        for ours, theirs in zip(outputs(micro), before, strict=True):
            assert torch.equal(ours, theirs)


def test_restore_at_the_end_of_a_block(micro):
    keys = set(vars(micro))
    with accelerate(micro, backend="eager") as handle:
        assert set(vars(micro)) > keys
    assert set(vars(micro)) == keys
    with pytest.raises(ZeroDivisionError), accelerate(micro) as handle:
        _ = 1 // 0
    assert set(vars(micro)) == keys
    with accelerate(micro) as handle:
        handle.restore()
    assert set(vars(micro)) == keys


@pytest.mark.usefixtures("no_grad")
def test_restore_after_an_exception_in_a_call(micro):
    before, image = references(micro), decoded(micro, Z)
    handle = accelerate(micro)
    with pytest.raises(InvalidInputError):
        micro.decode(Z[0])
    network = handle._source.model("decode", torch.float32, torch.device("cpu"))
    failing = network.conv_out.register_forward_pre_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        decoded(micro, Z)
    failing.remove()
    assert_same(micro, before)
    handle.restore()
    assert not {"encode", "decode", "_apply"} & set(vars(micro))
    assert torch.equal(decoded(micro, Z), image)


def test_restore_twice(micro):
    handle = accelerate(micro)
    handle.restore()
    with pytest.raises(HandleError, match="restored already"):
        handle.restore()
    assert "restored" in handle.report().as_dict()["note"]
    with pytest.raises(HandleError, match="restored"):
        handle.warmup(progress=False)


@pytest.mark.usefixtures("no_grad")
def test_the_patch_of_somebody_else_is_kept(micro):
    """Patched before: it serves, and comes back. Patched after: restore() says so and changes nothing."""
    plain = micro.decode
    mine = lambda z, return_dict=True: plain(z, return_dict=return_dict)  # noqa: E731
    micro.decode = mine
    handle = accelerate(micro)
    assert torch.equal(decoded(micro, Z), plain(Z).sample)
    theirs = micro.decode
    micro.decode = lambda *args, **kwargs: theirs(*args, **kwargs)
    with pytest.raises(HandleError, match="patched again"):
        handle.restore()
    assert calls(handle)["decode"] == {"diffusers": 1}
    micro.decode = theirs
    handle.restore()
    assert vars(micro)["decode"] is mine


def test_the_vae_is_freed_with_its_handle():
    vae = random_vae()
    gone = weakref.ref(vae)
    with torch.no_grad():
        accelerate(vae)
        decoded(vae, Z)
    del vae
    gc.collect()
    assert gone() is None


# Copies.


def copied(vae: nn.Module) -> nn.Module:
    return copy.deepcopy(vae)


def pickled(vae: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(vae))


def saved(vae: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(vae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("duplicate", [copied, pickled, saved])
def test_copies_are_plain_vaes(micro, duplicate):
    before, plain = references(micro), outputs(micro)
    frames = decoded(micro, randn(1, 4, 2, 6, 8))
    handle = accelerate(micro)
    decoded(micro, Z)
    counted = calls(handle)
    other = duplicate(micro)
    for ours, theirs in zip(outputs(other), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert other.to(torch.bfloat16).dtype == torch.bfloat16 and micro.dtype == torch.float32
    other.float()
    assert calls(handle) == counted, "the copy does not go through our handle"
    # A copy can be accelerated in its own right, with everything that may fall back to diffusers.
    second = accelerate(other, task="i2i")
    assert second is not handle
    assert_same(other, references(other))  # its weights were in bfloat16 meanwhile
    assert torch.equal(decoded(other, randn(1, 4, 2, 6, 8)), decoded(other, randn(1, 4, 2, 6, 8)))
    assert frames.shape == decoded(other, randn(1, 4, 2, 6, 8)).shape
    other.to(torch.bfloat16)
    assert calls(second)["decode"]["eager"] == 1
    second.restore()
    decoded(other, Z.bfloat16())
    # The first is untouched by all that.
    assert_same(micro, before)
    assert calls(handle)["decode"] == {"eager": counted["decode"]["eager"] + 1}


def replica_of(module: nn.Module, scale: float) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` makes of a module; its gains tell it from the original."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            replica.__dict__[name] = parameter.detach() * (scale if name == "gamma" else 1)
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child, scale)
    return replica


def shallow_copy(vae: nn.Module, scale: float) -> nn.Module:
    """``copy.copy`` with parts of its own."""
    other = copy.copy(vae)
    other._modules = copy.deepcopy(vae._modules)
    scale_gains(other, scale)
    return other


def bare_copy(vae: nn.Module, scale: float) -> nn.Module:
    """A copy by whoever knows nothing of copying: the same class, the same attributes."""
    other = type(vae).__new__(type(vae))
    other.__dict__ = dict(vae.__dict__)
    other._modules = copy.deepcopy(vae._modules)
    scale_gains(other, scale)
    return other


def scale_gains(vae: nn.Module, scale: float) -> None:
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.mul_(scale)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("duplicate", [replica_of, shallow_copy, bare_copy])
def test_copies_compute_with_their_own_weights(micro, duplicate):
    plain = random_vae()
    scale_gains(plain, 1.5)
    expected, before = outputs(plain), references(micro)
    handle = accelerate(micro)
    assert_same(micro, before)
    assert all(map(torch.equal, outputs(duplicate(micro, 1.5)), expected))
    assert_same(micro, before)
    assert calls(handle) == fast(encode=2, decode=2), "the copy does not go through our handle"
    assert handle_of(duplicate(micro, 1.5)) is None


@pytest.mark.usefixtures("no_grad")
def test_what_others_patched_goes_along_into_copies(micro):
    """As without us."""
    plain = micro.decode
    micro.decode = lambda z, return_dict=True: plain(z * 0.5, return_dict=return_dict)
    expected = decoded(micro, Z)
    accelerate(micro)
    for other in (copy.copy(micro), copy.deepcopy(micro)):
        assert torch.equal(decoded(other, Z), expected) and type(other) is type(random_vae())


def test_the_class_of_an_accelerated_vae(micro):
    """A subclass of the same name, one for all VAEs of a class; ``restore()`` gives the own class back."""
    cls = type(micro)
    with accelerate(micro), accelerate(random_vae()) as other:
        ours = type(micro)
        assert ours is not cls and isinstance(micro, cls) and ours is type(other.vae)
        assert ours == cls and cls == ours and ours in (cls,) and ours in {cls} and isinstance(random_vae(), ours)
        assert not isinstance(nn.Linear(1, 1), ours) and ours != nn.Linear
        assert repr(ours) == repr(cls) and inspect.signature(ours.decode) == inspect.signature(cls.decode)
        micro.__class__ = type("Theirs", (ours,), {})
        with pytest.raises(HandleError, match="vae.__class__ was changed"):
            handle_of(micro).restore()
        micro.__class__ = ours
    assert type(micro) is cls


def test_a_deep_copy_of_a_pipeline(micro):
    pipe = tiny_pipeline(micro)
    before = generate(pipe)
    handle = accelerate(pipe)
    other = copy.deepcopy(pipe)
    assert torch.equal(generate(other), before)
    assert calls(handle) == fast()
