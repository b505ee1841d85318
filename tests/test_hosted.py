"""Modules of other programs over the weights of a VAE, accelerated in place."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.errors import HandleError, UnsupportedVAEError
from tests.helpers import Reference, photo, picture, randn
from tests.programs import ComfyVAE, DiffSynthVAE, Program, WanVAE, small

pytestmark = pytest.mark.usefixtures("no_grad")
PROGRAMS = [ComfyVAE, WanVAE, DiffSynthVAE]


@pytest.fixture(scope="module")
def _narrow() -> nn.Module:
    return small(AutoencoderKLQwenImage)


@pytest.fixture
def narrow(_narrow: nn.Module) -> nn.Module:
    """A narrow VAE of the published depth, as its names in other programs need."""
    return copy.deepcopy(_narrow)


def statistics(vae: nn.Module) -> list[Tensor]:
    """Mean and one over the deviation of the latents, as ``[1, z_dim, 1, 1, 1]``."""
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    return [mean, 1 / std]


class Caller:
    """Calls a program's module as that program does, with and for what diffusers' VAE takes and gives."""

    def __init__(self, module: Program, vae: nn.Module) -> None:
        self.module = module
        self.mean, self.inverse = statistics(vae)
        self.normalised = not isinstance(module, ComfyVAE)
        self.more = ([self.mean.flatten(), self.inverse.flatten()],) if isinstance(module, WanVAE) else ()

    def _run(self, method: Any, x: Tensor, **named: Any) -> Tensor:
        more = tuple([s.to(x) for s in scale] for scale in self.more)
        if isinstance(self.module, DiffSynthVAE):
            return method(x.squeeze(2), device="cpu", **named).unsqueeze(2)
        return method(x, *more, **named)

    def encode(self, x: Tensor, **named: Any) -> Tensor:
        mu = self._run(self.module.encode, x, **named)
        return mu / self.inverse.to(mu) + self.mean.to(mu) if self.normalised else mu

    def decode(self, z: Tensor, **named: Any) -> Tensor:
        z = (z - self.mean.to(z)) * self.inverse.to(z) if self.normalised else z
        return self._run(self.module.decode, z, **named)


def calls(handle: Any, method: str = "decode") -> dict[str, int]:
    return handle.report().as_dict()["calls"][method]


def reasons(handle: Any) -> str:
    return "\n".join(fallback["reason"] for fallback in handle.report().as_dict()["fallbacks"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_programs_module_makes_the_same_images(tiny, program, dtype):
    vae = tiny.to(dtype)
    x, z = photo(width=32, height=48).to(dtype), randn(2, 16, 1, 6, 4, dtype=dtype)
    encode, decode = Reference(vae, "encode", x), Reference(vae, "decode", z)
    encode.exact, encode.theirs = encode.exact.chunk(2, dim=1)[0], encode.theirs.chunk(2, dim=1)[0]
    module = program(vae)
    caller = Caller(module, vae)
    handle = accelerate(module)
    module.calls.clear()
    encode.check(caller.encode(x))
    decode.check(caller.decode(z))
    assert module.calls == ["encode", "decode"], "only to be compared with, once each"
    encode.check(caller.encode(x))
    decode.check(caller.decode(z))
    assert module.calls == ["encode", "decode"]
    assert calls(handle, "encode") == calls(handle) == {"eager": 2} and not reasons(handle)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_module_is_what_it_was_after_restore(narrow, program):
    module = program(narrow)
    kind, keys = type(module), set(vars(module))
    with accelerate(module) as handle:
        assert accelerate(module) is handle and isinstance(module, program)
        assert handle.accelerated is handle.module is module
    assert type(module) is kind and set(vars(module)) == keys
    Caller(module, narrow).decode(randn(1, 4, 1, 2, 2))
    assert module.calls == ["decode"] and calls(handle) == {}


@pytest.mark.parametrize("holder", ["vae", "model", "first_stage_model"])
def test_an_object_that_holds_a_module_is_a_host(narrow, holder):
    module = ComfyVAE(narrow)
    host = SimpleNamespace(**{holder: module})
    handle = accelerate(host)
    assert accelerate(module) is handle and handle.module is module
    setattr(host, holder, ComfyVAE(narrow))
    with pytest.raises(HandleError, match="was replaced after accelerate"):
        handle.warmup(progress=False)


def test_a_module_that_holds_the_module_of_the_weights_is_a_host(narrow):
    """As DiffSynth's WanVideoVAE, which encodes and decodes itself."""

    class WanVideoVAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = WanVAE(narrow)

        def encode(self, videos: Any, device: str) -> Any: ...

        def decode(self, latents: Tensor, device: str) -> Tensor:
            return self.model.decode(latents.to(device), [0.0, 1.0]).clamp_(-1, 1)

    host = WanVideoVAE()
    reference = Reference(narrow, "decode", z := randn(1, 4, 1, 2, 3))
    handle = accelerate(host)
    reference.check(host.decode(z, "cpu"))
    assert handle.module is host.model and calls(handle) == {"eager": 1}


# What is left to the module.


def test_video_is_the_modules_own(narrow):
    module = ComfyVAE(narrow)
    z = randn(1, 4, 3, 2, 2)
    theirs = module.decode(z)
    handle = accelerate(module)
    assert torch.equal(module.decode(z), theirs)
    assert calls(handle) == {"host": 1} and "3 frames: only single images" in reasons(handle)


def test_gradients_are_the_modules_own(narrow):
    module = ComfyVAE(narrow)
    handle = accelerate(module)
    with torch.enable_grad():
        z = randn(1, 4, 1, 2, 2).requires_grad_()
        module.decode(z).sum().backward()
    assert z.grad is not None and calls(handle) == {"host": 1}


def test_arguments_that_ask_for_something_else_are_the_modules_own(narrow):
    wan, synth = WanVAE(narrow), DiffSynthVAE(narrow)
    handles = accelerate(wan), accelerate(synth)
    mu, log_var = wan.encode(picture(1, 3, 1, 16, 16), [0.0, 1.0], return_mu=True)
    assert mu.shape == log_var.shape and "it is called with return_mu=True" in reasons(handles[0])
    image = synth.decode(randn(1, 4, 2, 2), tiled=True, tile_size=64)
    assert image.shape == (1, 3, 16, 16) and "it is called with tiled=True" in reasons(handles[1])
    assert calls(handles[1]) == {"host": 1}, "and so are its tiles, which are not clamped before they are blended"


class Casting(ComfyVAE):
    """Brings weights to the device and into the dtype of the input as its layers run, as ComfyUI's can."""

    def cast(self, weight: Tensor, x: Tensor) -> Tensor:
        return weight.to(x)


def test_an_input_of_another_dtype_is_the_modules_own(narrow):
    module = Casting(narrow).to(torch.bfloat16)
    z = randn(1, 4, 1, 2, 2)
    theirs = module.decode(z)
    handle = accelerate(module)
    assert torch.equal(module.decode(z), theirs), "in float32, not in bfloat16"
    assert calls(handle) == {"host": 1} and "its input is float32, and its weights are bfloat16" in reasons(handle)


@pytest.mark.gpu
def test_weights_that_rest_on_the_cpu_are_copied_to_where_the_input_is(narrow):
    module, z = Casting(narrow), randn(1, 4, 1, 4, 4)
    reference = Reference(narrow, "decode", z)
    handle = accelerate(module)
    for device in ("cuda", "cpu", "cuda"):
        output = module.decode(z.to(device))
        assert output.device.type == device
        reference.check(output.cpu())
    assert "host" not in calls(handle) and all(p.device.type == "cpu" for p in module.parameters())


def test_errors_are_the_modules_own(narrow):
    module = ComfyVAE(narrow)
    accelerate(module)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'z'"):
        module.decode()
    with pytest.raises(TypeError, match="unexpected keyword argument 'tiles'"):
        module.decode(randn(1, 4, 1, 2, 2), tiles=2)
    wan = WanVAE(narrow)
    handle = accelerate(wan)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        wan.decode(randn(1, 4, 1, 2, 2), [0.0])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'scale'"):
        wan.decode(randn(1, 4, 1, 2, 2))
    assert "it is called with scale=[0.0], no pair" in reasons(handle)


def test_a_module_without_the_statistics_that_its_convention_applies_is_refused(narrow):
    module = DiffSynthVAE(narrow)
    del module.mean
    with pytest.raises(UnsupportedVAEError, match="called in a way that is not known"):
        accelerate(module)


@pytest.mark.parametrize(
    "change",
    [
        lambda kind: setattr(kind, "decode", lambda self, z: self.run("decode", z) * 0.5),
        lambda kind: setattr(kind, "decode", lambda self, z: self.run("decode", z)[..., :8]),
        lambda kind: setattr(kind, "decode", lambda self, z: (self.run("decode", z),)),
    ],
    ids=["half", "a part", "a tuple"],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_module_that_computes_something_else_is_left_alone(narrow, change, late):
    class Other(ComfyVAE):
        pass

    module, z = Other(narrow), randn(1, 4, 1, 2, 2)
    if not late:
        change(Other)
    handle = accelerate(module)
    if late:
        module.decode(z)
        change(Other)
    theirs = Other.decode(module, z)
    module.calls.clear()
    ours = module.decode(z)
    assert module.calls[-1] == "decode"
    assert torch.equal(torch.as_tensor(ours[0]), torch.as_tensor(theirs[0]))
    assert calls(handle)["host"] == 1 and "its decode " in reasons(handle)


def test_hooks_on_its_layers_are_run(narrow):
    module, seen = ComfyVAE(narrow), []
    handle = accelerate(module)
    module.decode(z := randn(1, 4, 1, 2, 2))
    module.decoder.conv1.register_forward_hook(lambda *call: seen.append(call))
    module.decode(z)
    assert calls(handle) == {"eager": 1, "host": 1} and "hooks" in reasons(handle)


# Weights that move and change.


def test_weights_that_change_are_noticed(narrow):
    module, z = ComfyVAE(narrow), randn(1, 4, 1, 2, 2)
    handle = accelerate(module)
    before = module.decode(z)
    with torch.no_grad():
        module.get_parameter("decoder.head.2.bias").add_(0.25)
        narrow.decoder.conv_out.bias.add_(0.25)
    reference = Reference(narrow, "decode", z)
    reference.check(module.decode(z))
    assert not reference.holds(before) and calls(handle) == {"eager": 2}


def test_parameters_that_are_replaced_are_followed(narrow):
    """As ComfyUI does where it adds a patch to a weight, and takes it away."""
    module, z = ComfyVAE(narrow), randn(1, 4, 1, 2, 2)
    handle = accelerate(module)
    before = module.decode(z)
    head = module.get_submodule("decoder.head.2")
    head.bias = nn.Parameter(head.bias + 0.25, requires_grad=False)
    with torch.no_grad():
        narrow.decoder.conv_out.bias.add_(0.25)
    reference = Reference(narrow, "decode", z)
    reference.check(module.decode(z))
    assert not reference.holds(before) and calls(handle) == {"eager": 2}


def test_layers_that_are_exchanged_are_tried_again(narrow):
    module, z = ComfyVAE(narrow), randn(1, 4, 1, 2, 2)
    handle = accelerate(module)
    module.decode(z)
    head = module.get_submodule("decoder.head")
    head._modules["2"] = copy.deepcopy(head._modules["2"])
    reference = Reference(narrow, "decode", z)
    reference.check(module.decode(z))
    del head._modules["2"]
    with pytest.raises(AttributeError):
        module.decode(z)
    assert calls(handle) == {"eager": 2, "host": 1} and "it has no decoder.head.2.weight any more" in reasons(handle)


def test_a_module_moves_and_converts_as_ever(narrow):
    module = ComfyVAE(narrow)
    handle = accelerate(module)
    z = randn(1, 4, 1, 2, 2)
    module.decode(z)
    module.to(torch.bfloat16)
    assert module.decode(z.bfloat16()).dtype is torch.bfloat16
    assert calls(handle) == {"eager": 2} and handle.vae.dtype is torch.bfloat16


def test_copies_and_pickles_are_plain_modules(narrow):
    module, z = ComfyVAE(narrow), randn(1, 4, 1, 2, 2)
    handle = accelerate(module)
    for copied in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is not type(module)
        copied.decode(z)
    assert calls(handle) == {}


# Modules that are none.


def test_a_module_that_is_called_in_another_way_is_told_what_is_known(narrow):
    class Stranger(Program):
        def encode(self, x: Tensor, frames: int) -> Tensor: ...

        def decode(self, z: Tensor, frames: int) -> Tensor: ...

    with pytest.raises(UnsupportedVAEError, match=r"known: encode\(x, frames\), .*ComfyUI's WanVAE: encode\(x\), decode\(z\)"):
        accelerate(Stranger(narrow))


def test_a_module_with_other_weights_is_told_which(narrow):
    module = ComfyVAE(narrow)
    module.decoder.add_module("more", nn.Linear(1, 1))
    with pytest.raises(UnsupportedVAEError, match="does not know: 'decoder.more.weight', 'decoder.more.bias'"):
        accelerate(module)
