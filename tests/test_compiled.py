"""``torch.compile`` of code around an accelerated VAE: one operator for the compiler, served by whoever serves plain calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.accuracy import measure
from qwen_vae_accel.errors import HandleError, InvalidInputError
from tests.conftest import random_vae
from tests.contract import X, Z, calls, fast, references
from tests.helpers import Reference, decoded, exact_vae, latents, moments, open_engines, randn

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler that keeps what it was given, and runs it as it is."""

    def __init__(self) -> None:
        self.operators: list[str] = []
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.count += 1
        self.operators += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph.forward


def test_the_compiler_sees_one_operator(micro):
    before = references(micro)
    handle = accelerate(micro)
    graphs = Graphs()

    @torch.compile(backend=graphs, fullgraph=True)
    def around(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return moments(micro, x * 2) / 2, micro.decode(z * 1.0).sample + 1

    for _ in range(2):
        ours = around(X / 2, Z)
        before[0].check(ours[0] * 2)
        before[1].check(ours[1] - 1)
    assert graphs.count == 1 and sum("qwen_vae_accel" in name for name in graphs.operators) == 2
    assert not any("conv" in name for name in graphs.operators)
    assert calls(handle) == fast(encode=2, decode=2)


@pytest.mark.parametrize("form", ["method", "module", "in place"])
def test_what_people_compile(micro, form):
    exact, double = Reference(micro, "decode", Z), exact_vae(micro)(X.double()).sample[:, :, 0]
    limit = measure(micro(X).sample[:, :, 0], double).allowed()
    handle = accelerate(micro)
    if form == "method":
        exact.check(torch.compile(micro.decode, backend="eager")(Z).sample)
    elif form == "module":
        assert measure(torch.compile(micro, backend="eager")(X).sample[:, :, 0], double).within(limit)
    else:
        micro.compile(backend="eager")
        assert measure(micro(X).sample[:, :, 0], double).within(limit)
    assert calls(handle)["decode"] == {"eager": 1}


def test_engines_serve_compiled_code(micro, engines):
    handle = open_engines(micro, engines)
    z = latents("32x32")
    image = decoded(micro, z)
    compiled = torch.compile(lambda z: decoded(micro, z * 1.0), backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(z), image)
    assert compiled(latents("48x32")).shape == (1, 3, 1, 32, 48)
    assert calls(handle)["decode"] == {"tensorrt": 3}


def test_compiled_code_follows_the_vae(micro):
    """Another dtype, new weights, the way back, a new handle, a copy: each is seen by the guards or by the operator."""
    graphs = Graphs()
    compiled = torch.compile(lambda vae, z: vae.decode(z).sample * 1.0, backend=graphs)
    exact = Reference(micro, "decode", Z)
    handle = accelerate(micro)
    first = compiled(micro, Z)
    exact.check(first)
    with torch.no_grad():
        micro.decoder.conv_out.bias.add_(0.1)
    brighter = compiled(micro, Z)
    assert torch.equal(brighter, decoded(micro, Z)) and not torch.equal(brighter, first)
    assert graphs.count == 1
    micro.to(torch.bfloat16)
    assert torch.equal(compiled(micro, Z.bfloat16()), decoded(micro, Z.bfloat16()))
    micro.to(torch.float32)
    second_vae = copy.deepcopy(micro)
    second = accelerate(second_vae)
    assert torch.equal(compiled(second_vae, Z), compiled(micro, Z))
    assert calls(second)["decode"] == {"eager": 1}
    served = calls(handle)
    handle.restore()
    assert any("qwen_vae_accel" in name for name in graphs.operators)
    again = accelerate(micro)
    compiled(micro, Z)
    assert calls(handle) == served and calls(again)["decode"] == {"eager": 1}


@pytest.mark.slow
def test_what_the_operator_cannot_do_is_compiled_as_diffusers_has_it(micro):
    """Gradients reach the input and the weights; counted once for each trace."""
    plain = random_vae()
    handle = accelerate(micro)

    def gradients(vae: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        z = Z.clone().requires_grad_()
        loss(vae, z).backward()
        return z.grad, vae.decoder.conv_in.weight.grad

    def loss(vae: nn.Module, z: Tensor) -> Tensor:
        return decoded(vae, z).square().sum()

    with torch.enable_grad():
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        for ours, theirs in zip(gradients(micro, compiled), gradients(plain, loss), strict=True):
            assert torch.equal(ours, theirs)
    assert calls(handle)["decode"] == {"diffusers": 1}
    reason = handle.report().as_dict()["fallbacks"][0]["reason"]
    assert reason.startswith("gradients are asked for") and reason.endswith("(compiled into the code around it)")


def test_frozen_weights_with_gradients_on_are_served(micro):
    micro.requires_grad_(False)
    handle = accelerate(micro)
    with torch.enable_grad():
        image = torch.compile(lambda z: decoded(micro, z), backend="eager", fullgraph=True)(Z)
    assert not image.requires_grad and calls(handle)["decode"] == {"eager": 1}


def test_errors_are_those_of_plain_calls(micro):
    accelerate(micro)
    compiled = torch.compile(lambda z: decoded(micro, z), backend="eager", fullgraph=True)
    with pytest.raises(InvalidInputError, match="4 channels"):
        compiled(Z[:, :2])


def test_an_operator_whose_vae_is_gone_says_so():
    with pytest.raises(HandleError, match="compile it again"):
        torch.ops.qwen_vae_accel.run(randn(1, 4, 1, 2, 2), -1, "decode", 3, 16, 16, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_a_gpu(tiny, mode):
    """With CUDA graphs too: they leave the operator out."""
    tiny.cuda().bfloat16().requires_grad_(False)
    z = randn(1, 16, 1, 16, 16).cuda().bfloat16()
    handle = accelerate(tiny)
    reference = Reference(copy.deepcopy(tiny), "decode", z)
    compiled = torch.compile(lambda z: decoded(tiny, z * 2 / 2) * 1, mode=mode, fullgraph=True)
    for _ in range(4):
        reference.check(compiled(z))
    served = calls(handle)["decode"]
    assert sum(served.values()) == 4 and "diffusers" not in served
