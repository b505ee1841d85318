"""Into the class of one VAE and out again: a subclass whose ``encode`` and ``decode`` ask for the handle.

Methods of a class find the object that they are called on. Methods bound to the object and stored in it would go along
into its shallow copies, and compute there with the original's weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.model.custom import PLAIN_CLASS, plain_class
from qwen_vae_accel.plugin import compiled

HANDLE = "_qwen_vae_accel"
PATCHED = ("encode", "decode", "_apply")


class OwnMethods:
    """The methods of a VAE as they are without a handle, looked up at each use: classes may be patched at any time.

    Args:
        vae: the VAE.
        before: what others had put in place of some of them into the VAE itself.
    """

    def __init__(self, vae: nn.Module, before: Mapping[str, Callable[..., Any]]) -> None:
        self._vae = vae
        self._before = before

    def __getitem__(self, name: str) -> Callable[..., Any]:
        before = self._before.get(name)
        method: Callable[..., Any] = before or getattr(plain_class(self._vae), name).__get__(self._vae)
        return method


def handle_of(vae: nn.Module) -> Any:
    """The ``Handle`` that accelerates ``vae``; None for a plain VAE and for a copy of an accelerated one."""
    handle = vae.__dict__.get(HANDLE)
    return handle if handle is not None and handle.vae is vae else None


def install(vae: nn.Module, handle: Any) -> dict[str, Any]:
    """Let ``handle`` serve the calls of ``vae``.

    Returns:
        The patches that others had put into the VAE itself, for :func:`remove`.
    """
    before = {name: vae.__dict__[name] for name in PATCHED if name in vae.__dict__}
    vae.__dict__[HANDLE] = handle
    cls: Any = type(vae)
    vae.__class__ = _accelerated(cls)
    for name in before:  # last: until then they stand before the methods of the class
        del vae.__dict__[name]
    return before


def patched_since(vae: nn.Module) -> str:
    """What somebody else has changed in ``vae`` since :func:`install` and would lose by :func:`remove`; empty if nothing."""
    for name in PATCHED:
        patch = vae.__dict__.get(name)
        if patch is not None and not getattr(patch, "__qwen_vae_accel__", False):
            return f"vae.{name} was patched again after accelerate()"
    if PLAIN_CLASS not in vars(type(vae)):
        return "the class of the VAE was changed after accelerate()"
    return ""


def remove(vae: nn.Module, before: Mapping[str, Any]) -> None:
    """Make ``vae`` what it was before :func:`install`; for a copy that carries traces of one, a plain VAE."""
    for name in (HANDLE, *PATCHED):
        if name == HANDLE or getattr(vae.__dict__.get(name), "__qwen_vae_accel__", False):
            vae.__dict__.pop(name, None)
    vae.__dict__.update(before)
    if PLAIN_CLASS in vars(type(vae)):
        vae.__class__ = plain_class(vae)


def pack(method: str, x: Tensor, return_dict: bool) -> Any:
    """``x`` as diffusers' ``encode`` or ``decode`` returns it."""
    decoder_output, encoder_output, distribution = _output_types()
    return _packed(method, x, return_dict, decoder_output, encoder_output, distribution)


def _packed(method: str, x: Tensor, return_dict: bool, decoder_output: Any, encoder_output: Any, distribution: Any) -> Any:
    if method == "decode":
        return decoder_output(sample=x) if return_dict else (x,)
    posterior = distribution(x)
    return encoder_output(latent_dist=posterior) if return_dict else (posterior,)


@functools.cache
def _output_types() -> tuple[Any, Any, Any]:
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return DecoderOutput, AutoencoderKLOutput, DiagonalGaussianDistribution


def _plain_twin(vae: nn.Module) -> nn.Module:
    """A plain VAE that shares all of ``vae``: what a copy, a pickle or a replica of it is made from."""
    cls: Any = plain_class(vae)
    handle = handle_of(vae)
    twin: nn.Module = cls.__new__(cls)
    twin.__dict__.update(vae.__dict__)
    remove(twin, {} if handle is None else handle._before)
    return twin


class _Alike(type):
    """Of a class that passes for the one that it stands for: diffusers' ``from_pipe`` compares classes."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is vars(cls).get(PLAIN_CLASS)

    def __hash__(cls) -> int:
        return type.__hash__(vars(cls).get(PLAIN_CLASS, cls))

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or isinstance(instance, vars(cls).get(PLAIN_CLASS, ()))


@functools.cache
def _accelerated(cls: type) -> type:
    """The subclass of ``cls`` that asks for the handle: same name, same signatures, same documentation, and equal to it."""
    types = _output_types()

    def call(vae: nn.Module, method: str, x: Tensor, return_dict: bool) -> Any:
        handle = handle_of(vae)
        before = None
        if handle is not None:
            if not torch.compiler.is_dynamo_compiling():
                return handle._call(method, x, return_dict)
            reason = compiled.not_opaque(vae, method, x)
            if not reason:
                return _packed(method, compiled.output(vae, handle._traced, method, x), return_dict, *types)
            compiled.note(handle._traced.number, method, reason)
            before = handle._before.get(method)
        if before is not None:
            return before(x, return_dict=return_dict)
        return getattr(cls, method)(vae, x, return_dict=return_dict)

    @functools.wraps(cls.encode)  # type: ignore[attr-defined]
    def encode(self: nn.Module, x: Tensor, return_dict: bool = True) -> Any:
        return call(self, "encode", x, return_dict)

    @functools.wraps(cls.decode)  # type: ignore[attr-defined]
    def decode(self: nn.Module, z: Tensor, return_dict: bool = True) -> Any:
        return call(self, "decode", z, return_dict)

    @functools.wraps(cls._apply)  # type: ignore[attr-defined]
    def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle = handle_of(self)
        if handle is None:
            return cls._apply(self, *args, **kwargs)  # type: ignore[attr-defined]
        return handle._moved(handle._original["_apply"], args, kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # From protocol 2 on, pickle insists on an object of the very class that it is told to make.
        return _plain_twin(self).__reduce_ex__(1)

    def _replicate_for_data_parallel(self: nn.Module) -> Any:
        return _plain_twin(self)._replicate_for_data_parallel()

    methods: dict[str, Callable[..., Any]] = {"encode": encode, "decode": decode, "_apply": _apply}
    for function in methods.values():
        function.__qwen_vae_accel__ = True  # type: ignore[attr-defined]
    copying = {"__reduce_ex__": __reduce_ex__, "_replicate_for_data_parallel": _replicate_for_data_parallel}
    same = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind: Any = type("Alike", (_Alike, type(cls)), {})
    accelerated: type = kind(cls.__name__, (cls,), {**same, **methods, **copying, PLAIN_CLASS: cls})
    return accelerated
