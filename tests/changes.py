"""Ways in which people change how a VAE computes, each as a context that undoes it, with what the report must say of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import accelerate.hooks
import diffusers.hooks
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as source
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrize, prune

Change = Callable[[Any], Any]
CHANGES: dict[str, tuple[Change, str]] = {}


def _change(reason: str) -> Callable[[Callable[[Any], Iterator[None]]], Change]:
    def enter(function: Callable[[Any], Iterator[None]]) -> Change:
        made = contextmanager(function)
        CHANGES[function.__name__] = made, reason
        return made

    return enter


@contextmanager
def _put(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of ``owner`` as in ``values``, and as they were afterwards."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    yield
    for name in values:
        if name in before:
            setattr(owner, name, before[name])
        else:
            delattr(owner, name)


def _halved(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with half its output, in the disguise that most wrappers wear."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 0.5

    return wrapper


# Layers with other settings, other layers.


@_change("decoder.mid_block.attentions.0.to_qkv.padding_mode is 'circular', in diffusers 'zeros'")
def circular_padding(vae: Any) -> Iterator[None]:
    layers = [layer for layer in vae.modules() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        layer.padding_mode = "circular"
    yield
    for layer in layers:
        layer.padding_mode = "zeros"


@_change("decoder.conv_in._padding is (2, 0, 1, 1, 2, 0), in diffusers (1, 1, 1, 1, 2, 0)")
def padding_on_one_side(vae: Any) -> Iterator[None]:
    with _put(vae.decoder.conv_in, _padding=(2, 0, 1, 1, 2, 0)):
        yield


@_change("decoder.mid_block.resnets.0.nonlinearity is of class ReLU, in diffusers of SiLU")
def another_activation(vae: Any) -> Iterator[None]:
    block = vae.decoder.mid_block.resnets[0]
    before, block.nonlinearity = block.nonlinearity, nn.ReLU()
    yield
    block.nonlinearity = before


@_change("decoder.up_blocks.0.upsamplers.0.resample.0.mode is 'bilinear', in diffusers 'nearest-exact'")
def bilinear_upsampling(vae: Any) -> Iterator[None]:
    with _put(vae.decoder.up_blocks[0].upsamplers[0].resample[0], mode="bilinear"):
        yield


@_change("decoder.norm_out.scale is ")
def another_scale_of_a_norm(vae: Any) -> Iterator[None]:
    with _put(vae.decoder.norm_out, scale=vae.decoder.norm_out.scale * 1.1):
        yield


@_change("decoder.norm_out.bias is Tensor, in diffusers 0.0")
def a_bias_in_a_norm(vae: Any) -> Iterator[None]:
    with _put(vae.decoder.norm_out, bias=torch.tensor(0.1)):
        yield


@_change("decoder.conv_in is of class Other, in diffusers of QwenImageCausalConv3d")
def a_layer_of_a_subclass(vae: Any) -> Iterator[None]:
    layer = vae.decoder.conv_in
    kind = type(layer)

    class Other(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, *cache: Any) -> Tensor:
            return super().forward(x, *cache) * 0.5

    layer.__class__ = Other
    yield
    layer.__class__ = kind


@_change("decoder.conv_in is of class Adapter")
def an_adapter_in_place_of_a_layer(vae: Any) -> Iterator[None]:
    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, *args: Any) -> Tensor:
            return self.base_layer(*args) * 1.1

    before, vae.decoder.conv_in = vae.decoder.conv_in, Adapter(vae.decoder.conv_in)
    yield
    vae.decoder.conv_in = before


@_change("decoder.up_blocks.0.resnets holds layers 1, 0, in diffusers 0, 1")
def blocks_in_another_order(vae: Any) -> Iterator[None]:
    layers = vae.decoder.up_blocks[0].resnets._modules
    layers["0"] = layers.pop("0")
    yield
    layers["1"] = layers.pop("1")


@_change("decoder.up_blocks holds layers 0, 1, 2, 3, 4")
def one_more_block(vae: Any) -> Iterator[None]:
    class Mirrored(nn.Module):
        def forward(self, x: Tensor, *cache: Any) -> Tensor:
            return x.flip(-1)

    vae.decoder.up_blocks.append(Mirrored())
    yield
    del vae.decoder.up_blocks[4]


@_change("decoder.conv_in is of class ParametrizedQwenImageCausalConv3d")
def a_parametrization(vae: Any) -> Iterator[None]:
    class Scaled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 1.3

    parametrize.register_parametrization(vae.decoder.conv_in, "weight", Scaled())
    vae.requires_grad_(False)
    yield
    parametrize.remove_parametrizations(vae.decoder.conv_in, "weight", leave_parametrized=False)


@_change("decoder.conv_in has hooks")
def pruning(vae: Any) -> Iterator[None]:
    layer = vae.decoder.conv_in
    before = layer.weight
    prune.l1_unstructured(layer, "weight", amount=0.5)
    yield
    prune.remove(layer, "weight")
    layer.weight = before


# Hooks.


@_change("decoder.mid_block has hooks")
def a_forward_hook(vae: Any) -> Iterator[None]:
    hook = vae.decoder.mid_block.register_forward_hook(lambda module, inputs, output: output * 0.5)
    yield
    hook.remove()


@_change("decoder.mid_block has hooks")
def a_hook_after_all_were_cleared(vae: Any) -> Iterator[None]:
    block = vae.decoder.mid_block
    block._forward_hooks = type(block._forward_hooks)()
    hook = block.register_forward_hook(lambda module, inputs, output: output * 0.5)
    yield
    hook.remove()


@_change("a forward hook of all modules is registered")
def a_hook_of_all_modules(vae: Any) -> Iterator[None]:
    hook = module_globals.register_module_forward_hook(
        lambda m, i, o: o * 0.5 if isinstance(m, source.QwenImageMidBlock) else None
    )
    yield
    hook.remove()


@_change("decoder.mid_block has a forward() of its own or hooks that are not known")
def a_hook_of_accelerate(vae: Any) -> Iterator[None]:
    class Halving(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 0.5

    accelerate.hooks.add_hook_to_module(vae.decoder.mid_block, Halving())
    yield
    accelerate.hooks.remove_hook_from_module(vae.decoder.mid_block)


@_change("decoder.mid_block has a forward() of its own or hooks that are not known")
def a_hook_of_diffusers(vae: Any) -> Iterator[None]:
    class Halving(diffusers.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 0.5

    block = vae.decoder.mid_block
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(Halving(), "halving")
    yield
    registry.remove_hook("halving")
    del block._diffusers_hook
    del block.forward


# Methods of one object.


@_change("decoder.conv_out has a forward() of its own")
def forward_of_one_layer(vae: Any) -> Iterator[None]:
    with _put(vae.decoder.conv_out, forward=_halved(vae.decoder.conv_out.forward)):
        yield


@_change("decoder.conv_out has a _conv_forward() of its own")
def a_private_method_of_one_layer(vae: Any) -> Iterator[None]:
    with _put(vae.decoder.conv_out, _conv_forward=_halved(vae.decoder.conv_out._conv_forward)):
        yield


@_change("vae._decode was patched")
def a_private_method_of_the_vae(vae: Any) -> Iterator[None]:
    own = vae._decode
    with _put(vae, _decode=lambda z, return_dict=True: own(z * 0.5, return_dict=return_dict)):
        yield


@_change("vae.clear_cache was patched")
def a_helper_of_the_vae(vae: Any) -> Iterator[None]:
    def clear_cache(self: Any) -> None:
        type(self).clear_cache(self)
        self._feat_map = None  # no cache: every frame for itself

    with _put(vae, clear_cache=MethodType(clear_cache, vae)):
        yield


@_change("Watermarked overrides _decode")
def the_class_of_the_vae(vae: Any) -> Iterator[None]:
    kind = type(vae)

    class Watermarked(kind):  # type: ignore[misc, valid-type]
        def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
            return super()._decode(z * 0.5, return_dict=return_dict)

    vae.__class__ = Watermarked
    yield
    vae.__class__ = kind


# Classes and functions.


@_change("QwenImageResidualBlock.forward was replaced by code of tests.changes")
def forward_of_a_class_of_diffusers(vae: Any) -> Iterator[None]:
    with _put(source.QwenImageResidualBlock, forward=_halved(source.QwenImageResidualBlock.forward)):
        yield


@_change("Conv3d._conv_forward was replaced by code of tests.changes")
def a_private_method_of_a_class_of_torch(vae: Any) -> Iterator[None]:
    with _put(nn.Conv3d, _conv_forward=_halved(nn.Conv3d._conv_forward)):
        yield


@_change("SiLU.__call__ was replaced by code of tests.changes")
def a_call_of_its_own_for_a_class_of_torch(vae: Any) -> Iterator[None]:
    with _put(nn.SiLU, __call__=_halved(nn.Module.__call__)):
        yield


@_change("Module._call_impl was replaced by code of tests.changes")
def the_call_of_every_module(vae: Any) -> Iterator[None]:
    own = nn.Module._call_impl

    def _call_impl(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        return output * 0.5 if isinstance(self, source.QwenImageMidBlock) else output

    with _put(nn.Module, _call_impl=_call_impl):
        yield


@_change("QwenImageRMS_norm.forward was replaced")
def a_method_taken_from_another_class(vae: Any) -> Iterator[None]:
    with _put(source.QwenImageRMS_norm, forward=nn.Identity.forward):
        yield


@_change("QwenImageRMS_norm.forward was replaced")
def the_code_of_a_method(vae: Any) -> Iterator[None]:
    function = source.QwenImageRMS_norm.forward
    before = function.__code__
    function.__code__ = (lambda self, x: x * 0.5).__code__
    yield
    function.__code__ = before


@_change("QwenImageRMS_norm.forward was replaced")
def a_method_run_as_text_inside_its_module(vae: Any) -> Iterator[None]:
    text = "class QwenImageRMS_norm:\n    def forward(self, x):\n        return x * 0.5\n"
    before = source.QwenImageRMS_norm
    exec(text, vars(source))
    other, source.QwenImageRMS_norm = source.QwenImageRMS_norm, before
    with _put(before, forward=other.forward):
        yield


@_change("AutoencoderKLQwenImage._decode was replaced")
def a_private_method_of_the_class_of_the_vae(vae: Any) -> Iterator[None]:
    own = AutoencoderKLQwenImage._decode
    with _put(AutoencoderKLQwenImage, _decode=lambda self, z, return_dict=True: own(self, z * 0.5, return_dict)):
        yield


@_change("AutoencoderKLQwenImage.decode was replaced")
def the_public_method_of_the_class_of_the_vae(vae: Any) -> Iterator[None]:
    own = AutoencoderKLQwenImage.decode

    @functools.wraps(own)
    def decode(self: Any, z: Tensor, return_dict: bool = True) -> Any:
        return own(self, z * 0.5, return_dict)

    with _put(AutoencoderKLQwenImage, decode=decode):
        yield


@_change("torch.nn.functional.silu was replaced by code of tests.changes")
def a_function_of_torch(vae: Any) -> Iterator[None]:
    with _put(F, silu=_halved(F.silu)):
        yield


@_change("torch.nn.functional.silu was replaced")
def a_function_of_torch_by_another(vae: Any) -> Iterator[None]:
    with _put(F, silu=F.relu):
        yield


@_change("torch.nn.functional.scaled_dot_product_attention was replaced by code of tests.changes")
def the_attention_of_torch(vae: Any) -> Iterator[None]:
    with _put(F, scaled_dot_product_attention=_halved(F.scaled_dot_product_attention)):
        yield


@_change("torch.clamp was replaced by code of tests.changes")
def a_native_function_of_torch(vae: Any) -> Iterator[None]:
    with _put(torch, clamp=_halved(torch.clamp)):
        yield


# Values and what they are in.


@_change("post_quant_conv.weight is stored as float64")
def double_precision(vae: Any) -> Iterator[None]:
    vae.to(torch.float64)
    yield
    vae.to(torch.float32)


@_change("is not a plain tensor (Labelled, torch.strided)")
def parameters_of_a_subclass(vae: Any) -> Iterator[None]:
    class Labelled(Tensor):
        pass

    layer = vae.decoder.conv_in
    before, layer.weight = layer.weight, nn.Parameter(layer.weight.detach().clone().as_subclass(Labelled), requires_grad=False)
    yield
    layer.weight = before


@_change("vae.config.num_res_blocks is 3, and was 1")
def the_configuration(vae: Any) -> Iterator[None]:
    before = vae.config["num_res_blocks"]
    vae.register_to_config(num_res_blocks=3)
    yield
    vae.register_to_config(num_res_blocks=before)
