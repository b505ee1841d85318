"""Only plain tensors that nobody traces or watches reach engines and kernels; all else is diffusers' own, with its reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from qwen_vae_accel import accelerate
from qwen_vae_accel.plugin.methods import handle_of
from qwen_vae_accel.plugin.plain import not_plain
from tests.contract import Z, calls
from tests.helpers import Reference, decoded

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def plain(_micro):
    """The same VAE, never accelerated. A call that fails leaves its tensors in the VAE."""
    return copy.deepcopy(_micro).requires_grad_(False)


class Own(Tensor):
    """A subclass that does nothing."""


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Decoder(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


def outcome(call: Callable[[], Any]) -> Any:
    """What ``call`` gives, or the type of its error."""
    try:
        return call()
    except Exception as error:
        return type(error)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, TwoTensor):
        ours, theirs = ours.a, theirs.a
    if not isinstance(theirs, Tensor) or theirs.is_meta:
        return type(ours) is type(theirs) and str(ours) == str(theirs)
    return type(ours) is type(theirs) and torch.equal(ours, theirs)


INPUTS = {
    "TwoTensor": lambda: TwoTensor(Z.clone(), Z.clone()),
    "Own": lambda: Z.as_subclass(Own),
    "sparse": lambda: Z.to_sparse(),
    "mkldnn": lambda: Z.to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([Z[0], Z[0]]),
    "NestedTensor": lambda: torch.nested.nested_tensor([Z[0], Z[0]], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_tensors_that_are_not_plain(micro, plain, kind):
    micro.requires_grad_(False)
    handle = accelerate(micro)
    x = INPUTS[kind]()
    assert same(outcome(lambda: decoded(micro, x)), outcome(lambda: decoded(plain, x)))
    assert calls(handle)["decode"] == {"diffusers": 1}
    (fallback,) = handle.report().as_dict()["fallbacks"]
    assert "not a plain tensor" in fallback["reason"] and kind in fallback["reason"]


VIEWS = {
    "a parameter": lambda: nn.Parameter(Z.clone(), requires_grad=False),
    "negative bit": lambda: torch._neg_view(Z),
    "imaginary part of a conjugate": lambda: torch.complex(Z, Z).conj().imag,
    "expanded": lambda: Z.expand(3, -1, -1, -1, -1),
    "every second column": lambda: torch.cat([Z, Z], -1)[..., ::2],
    "channels last": lambda: Z.to(memory_format=torch.channels_last_3d),
    "transposed": lambda: Z.transpose(3, 4),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_views_are_served_with_the_values_they_show(micro, plain, kind):
    micro.requires_grad_(False)
    handle = accelerate(micro)
    run = handle._dispatcher.run
    read = []
    handle._dispatcher.run = lambda request, image: read.append(image.is_neg()) or run(request, image)
    x = VIEWS[kind]()
    Reference(plain, "decode", x).check(decoded(micro, x))
    assert calls(handle)["decode"] == {"eager": 1} and read == [False], "kernels read memory as it is"


def dual(vae: nn.Module) -> Any:
    with forward_ad.dual_level():
        return decoded(vae, forward_ad.make_dual(Z, Z))


def fake(vae: nn.Module) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return decoded(vae, mode.from_tensor(Z)).shape


def under(mode: Any) -> Callable[[nn.Module], Any]:
    def call(vae: nn.Module) -> Any:
        with mode():
            return decoded(vae, Z)

    return call


def flops(vae: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        decoded(vae, Z)
    return counter.get_total_flops()


def gradient(vae: nn.Module) -> Any:
    with torch.enable_grad():
        return torch.func.grad(lambda z: decoded(vae, z).sum())(Z)


def traced(trace: Callable[[Decoder], Any]) -> Callable[[nn.Module], Any]:
    """Trace the accelerated VAE with one input, run the trace with another; the plain VAE just runs."""

    def call(vae: nn.Module) -> Any:
        return (trace(Decoder(vae)) if handle_of(vae) else Decoder(vae))(2 * Z)

    return call


TRACES = {
    "vmap": (lambda vae: torch.func.vmap(Decoder(vae))(torch.stack([Z, 2 * Z])), "torch.func"),
    "grad": (gradient, "torch.func"),
    "jvp": (lambda vae: torch.func.jvp(Decoder(vae), (Z,), (Z,)), "torch.func"),
    "dual": (dual, "forward mode"),
    "fake": (fake, "FakeTensor"),
    "make_fx": (traced(lambda decoder: make_fx(decoder)(Z)), "ProxyTorchDispatchMode"),
    "jit.trace": (traced(lambda decoder: torch.jit.trace(decoder, Z, check_trace=False)), "torch.jit"),
    "symbolic_trace": (lambda vae: torch.fx.symbolic_trace(Decoder(vae)), "torch.fx"),
    "flops": (flops, "FlopCounterMode"),
    "function mode": (under(Functions), "Functions"),
    "dispatch mode": (under(Operations), "Operations"),
    "export": (traced(lambda decoder: torch.export.export(decoder, (Z,), strict=False).module()), "FakeTensor|Functional"),
}


@pytest.mark.parametrize("kind", TRACES)
@pytest.mark.filterwarnings("ignore")
def test_whoever_traces_or_watches_sees_the_operations_of_diffusers(micro, plain, kind):
    micro.requires_grad_(False)
    handle = accelerate(micro)
    call, reason = TRACES[kind]
    assert same(outcome(lambda: call(micro)), outcome(lambda: call(plain)))
    assert calls(handle)["decode"] == {"diffusers": 1}
    (fallback,) = handle.report().as_dict()["fallbacks"]
    assert any(word in fallback["reason"] for word in reason.split("|")), fallback["reason"]
    decoded(micro, Z)
    assert calls(handle)["decode"] == {"diffusers": 1, "eager": 1}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_is_no_obstacle(micro, plain, device):
    """It says where new tensors are made; the networks make theirs where their input is."""
    micro.requires_grad_(False)
    handle = accelerate(micro)
    torch.set_default_device(device)
    try:
        ours = decoded(micro, Z)
        with torch.device(device):
            again = decoded(micro, Z)
    finally:
        torch.set_default_device(None)
    Reference(plain, "decode", Z).check(ours)
    assert torch.equal(ours, again)
    assert calls(handle)["decode"] == {"eager": 2}


def test_inputs_made_in_inference_mode(micro, plain):
    micro.requires_grad_(False)
    handle = accelerate(micro)
    with torch.inference_mode():
        z = Z * 1
    Reference(plain, "decode", Z).check(decoded(micro, z))
    assert calls(handle)["decode"] == {"eager": 1}


def test_plain_is_what_costs_nothing_to_tell():
    assert not_plain(Z) == not_plain(nn.Parameter(Z)) == not_plain(None) == ""
