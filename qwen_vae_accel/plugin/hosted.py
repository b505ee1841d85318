"""Another program's module over the weights of a published VAE: into its methods and out again.

Diffusers' VAE is made over the module's own parameters and serves its calls, so that all that holds for a VAE of diffusers
holds here: weights that move or change are noticed, engines are the same. What it is not sure of, the module does itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qwen_vae_accel.accuracy import ROUNDING, measure
from qwen_vae_accel.checkpoints import diffusers_names, vae_from_weights
from qwen_vae_accel.config import AccelConfig, dtype_name
from qwen_vae_accel.model.custom import plain_class
from qwen_vae_accel.model.offload import is_hooked
from qwen_vae_accel.model.seen import Settings
from qwen_vae_accel.model.topology import PARTS
from qwen_vae_accel.plugin.conventions import convention_of, signatures
from qwen_vae_accel.plugin.handle import Handle
from qwen_vae_accel.plugin.patch import Patch
from qwen_vae_accel.plugin.plain import not_plain
from qwen_vae_accel.share import ProcessGroup
from qwen_vae_accel.visits import is_held_here

HOST = "host"
_forward = attrgetter("forward")
# Latent rows and columns of the image that shows whether a module computes what its weights' names say.
_TRIAL = 4, 6


def _slots(module: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    """Every parameter below ``module`` by its name: the dictionary that holds it, and its key there."""
    for path, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield f"{path}.{key}".lstrip("."), (owner._parameters, key)


class StandIn:
    """Diffusers' VAE over the parameters of another program's module: the same objects, under diffusers' names.

    Args:
        module: the module.

    Attributes:
        vae: diffusers' VAE.

    Raises:
        UnsupportedVAEError: if its parameters are not those of one of the family.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        views = {name: slots[key].detach() for name, (slots, key) in _slots(module)}
        self.vae = vae_from_weights(views, type(module).__name__)
        self._names = diffusers_names(views, type(module).__name__)
        self._pairs: list[tuple[dict[str, Any], str, dict[str, Any], str]] = []
        self.follow()

    @property
    def dtype(self) -> torch.dtype:
        """That of the module's first parameter."""
        _, _, theirs, name = self._pairs[0]
        weight: Tensor = theirs[name]
        return weight.dtype

    def parts(self, method: str) -> list[str]:
        """The names that the module has for the parts that ``method`` runs."""
        parts = {name.split(".")[0]: theirs.split(".")[0] for name, theirs in self._names.items()}
        return [parts[part] for part in PARTS[method]]

    def follows(self) -> bool:
        """Whether no parameter was replaced since, in the layers of then."""
        return all(slots[key] is theirs.get(name) for slots, key, theirs, name in self._pairs)

    def follow(self) -> str:
        """Take over all parameters as the module has them now; why that cannot be done, or empty."""
        theirs = dict(_slots(self._module))
        gone = [name for name in self._names.values() if name not in theirs]
        if gone:
            return f"it has no {gone[0]} any more"
        self._pairs = [(*slot, *theirs[self._names[name]]) for name, slot in _slots(self.vae)]
        for slots, key, found, name in self._pairs:
            slots[key] = found[name]
        return ""


@dataclass(slots=True)
class Layers:
    """The layers of one network of a module as they were when it was tried: all that may change what it computes."""

    modules: list[nn.Module]
    kinds: list[type]
    children: list[dict[str, nn.Module | None]]
    sizes: list[int]
    settings: list[Settings]
    forwards: dict[type, Any]
    method: Callable[[], Any]
    function: Any

    @classmethod
    def of(cls, module: nn.Module, parts: Iterable[str], method: Callable[[], Any]) -> Layers:
        """Those of ``parts`` of ``module``, with the code that ``method`` returns."""
        modules = [layer for part in parts for layer in getattr(module, part, nn.Module()).modules()]
        kinds = list(map(type, modules))
        return cls(
            modules=modules,
            kinds=kinds,
            children=[dict(layer._modules) for layer in modules],
            sizes=[len(vars(layer)) for layer in modules],
            settings=Settings.of(modules, frozenset()),
            forwards={kind: _forward(kind) for kind in kinds},
            method=method,
            function=method(),
        )

    def same(self) -> bool:
        """Whether nothing has changed since."""
        try:
            return (
                [layer._modules for layer in self.modules] == self.children
                and list(map(type, self.modules)) == self.kinds
                and [len(vars(layer)) for layer in self.modules] == self.sizes
                and all(settings.same() for settings in self.settings)
                and all(_forward(kind) is forward for kind, forward in self.forwards.items())
                and self.method() is self.function
            )
        except Exception:  # whatever somebody's objects do when they are compared
            return False

    def watched(self) -> str:
        """Why only the module itself may run its layers: somebody's hooks on them; empty if there are none."""
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks or is_hooked(layer) for layer in self.modules)
        return "its layers have hooks, which only the program itself runs" if hooked else ""


def _encode(handle: HostedHandle, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _serve(handle, "encode", args, kwargs)


def _decode(handle: HostedHandle, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _serve(handle, "decode", args, kwargs)


def _serve(handle: HostedHandle, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return handle._original[method](*args, **kwargs)
    return handle.serve_module(method, args, kwargs)


def _apply(handle: HostedHandle, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return handle._moved(handle._original["_apply"], args, kwargs)


MODULE = Patch("vae", {"encode": _encode, "decode": _decode, "_apply": _apply})


class HostedHandle(Handle):
    """The handle of another program's module. What it does not serve, the module does, counted as ``"host"``.

    Attributes:
        module: the module.
        vae: diffusers' VAE over its parameters.
        config: how it is accelerated.

    Raises:
        UnsupportedVAEError: if its parameters are not those of one of the family.
    """

    _patch: ClassVar[Patch] = MODULE
    _theirs: ClassVar[str] = HOST

    def __init__(
        self, module: nn.Module, config: AccelConfig, holder: Any | None, process_group: ProcessGroup | None = None
    ) -> None:
        self.module = module
        self._convention = convention_of(module)
        self._signatures = signatures(module)
        self._stand_in = StandIn(module)
        self._tried: dict[str, tuple[Layers, str]] = {}
        super().__init__(self._stand_in.vae, config, holder, process_group)

    @property
    def accelerated(self) -> nn.Module:
        return self.module

    def serve_module(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what ``method`` of the module does, computed here where that is known to be the same."""
        if is_held_here(self._one_original):  # inside a call that is the module's own: its tiles must not be clamped
            return self._original[method](*args, **kwargs)
        call = self._convention.arguments(self._signatures[method], args, kwargs)
        reason = call if isinstance(call, str) else not_plain(call[0]) or self._reason(method, *call)
        if reason:
            self._journal.served(method, HOST, reason)
        else:
            x = self._convention.taken(method, self.module, *call)
            output = self._call(method, x, return_dict=False)
            if output is not None:
                return self._convention.given(method, self.module, output, call[1])
        with self._one_original:
            self._unpark()
            return self._original[method](*args, **kwargs)

    def _packed(self, method: str, output: Tensor, return_dict: bool) -> Any:
        return output

    def _run_original(self, method: str, x: Tensor, return_dict: bool) -> Any:
        return None  # the module's to serve, with the arguments that it was called with

    def _reason(self, method: str, x: Tensor, named: Mapping[str, Any]) -> str:
        """Why a call is the module's own to serve, as far as the module decides that; weights that it replaced are followed."""
        if x.dtype != self._stand_in.dtype:  # a program that converts each weight computes in the dtype of the input
            return f"its input is {dtype_name(x.dtype)}, and its weights are {dtype_name(self._stand_in.dtype)}"
        # Programs may keep weights in CPU memory and bring each one along when its layer runs.
        home = x.device if x.device.type != "cpu" else None
        tried = self._tried.get(method)
        if tried is None or self._source.parked_from != home or not self._stand_in.follows() or not tried[0].same():
            with self._one_original:
                tried = self._look_at_module(method, x, named, home)
        return tried[1] or tried[0].watched()

    def _look_at_module(
        self, method: str, x: Tensor, named: Mapping[str, Any], home: torch.device | None
    ) -> tuple[Layers, str]:
        """The layers of ``method`` as they are now, and why they are not the published ones."""
        if self._source.parked_from != home:
            with self._source.moving():
                self._source.parked_from = home
        missing = self._stand_in.follow()
        tried = self._tried.get(method)
        if tried is None or missing or not tried[0].same():
            layers = Layers.of(self.module, self._stand_in.parts(method), lambda: getattr(plain_class(self.module), method))
            tried = self._tried[method] = layers, missing or layers.watched() or self._trial(method, x, named)
        return tried

    @torch.no_grad()
    def _trial(self, method: str, x: Tensor, named: Mapping[str, Any]) -> str:
        """Whether the module computes what its weights' names say: on a small image, with the arguments of this call."""
        placement = self._source.placement(method)
        if placement.reason:
            return placement.reason
        topology = self._source.topology
        scale, channels = (1, topology.z_dim) if method == "decode" else (topology.scale, topology.image_channels)
        shape = [channels, *(side * scale for side in _TRIAL)]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        sample = (values if method == "decode" else values.tanh()).to(x.device, placement.dtype)
        sample = sample[None, :, None] if self._convention.frames else sample[None]
        self._unpark()
        theirs = self._original[method](sample, **named)
        self._park()
        image = self._convention.taken(method, self.module, sample, named)[:, :, 0].float()
        network = self._source.model(method, torch.float32, placement.device)
        exact = self._convention.given(method, self.module, network(image), named)
        self._source.release()
        if not isinstance(theirs, Tensor) or theirs.dim() != exact.dim():
            return f"its {method} does not give a tensor of {exact.dim()} dimensions"
        theirs = theirs.clamp(-1, 1) if method == "decode" else theirs
        flat = (theirs, exact) if theirs.dim() == 4 else (theirs.flatten(1, 2), exact.flatten(1, 2))
        error = measure(*flat).relative
        if error <= ROUNDING[placement.dtype]:
            return ""
        return f"its {method} computes something else than its weights' names say: it is {error:.1e} off on a small image"
