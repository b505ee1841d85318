"""One network of a VAE as it was at the last look, and whether it still is: what is looked at before every call.

Everything is compared with what was stored in few operations on whole lists, so that a look takes tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.utils.hooks import RemovableHandle

from qwen_vae_accel.model.custom import ENTRIES, OF_EVERY_MODULE, SETTINGS, custom_network, custom_vae
from qwen_vae_accel.model.offload import Placement, hold_values, is_plain
from qwen_vae_accel.model.own_code import OwnCode
from qwen_vae_accel.model.published import Twin, arguments
from qwen_vae_accel.model.topology import METHODS, PARTS
from qwen_vae_accel.model.values import Sample

_version = attrgetter("_version")
_modules = itemgetter("_modules")
_parameters = itemgetter("_parameters")


@dataclass(frozen=True, slots=True)
class Published:
    """What the network of ``method`` is by its class: layers, code, and the names that the code uses."""

    twin: Twin
    method: str
    code: OwnCode
    names: frozenset[str]  # of the layers' code,
    vae_names: frozenset[str]  # and of the VAE's
    watched: tuple[str, ...]  # attributes of the VAE itself that have a part in the method
    unused: frozenset[str]  # attributes of the layers that no code reads

    @classmethod
    def of(cls, twin: Twin, method: str) -> Published:
        """Read the code of ``method`` and of its layers in the published ``twin``."""
        code = OwnCode()
        vae_names = code.trace([type(twin.vae)], frozenset((method, "__getattr__", "__getattribute__")))
        layers = [layer for part in PARTS[method] for layer in twin.vae.get_submodule(part).modules()]
        names = code.trace(map(type, layers), ENTRIES)
        kind = type(twin.vae)
        own = vae_names - SETTINGS - OF_EVERY_MODULE - {"_internal_dict", *METHODS}
        present = (name for name in own if name in twin.vae.__dict__ or callable(getattr(kind, name, None)))
        watched = (*present, "forward")  # the last one every offloading hook replaces
        unused = frozenset(name for layer in layers for name in vars(layer) if name not in names)
        return cls(twin, method, code, names, vae_names, watched, unused)

    def custom(self, vae: nn.Module) -> str:
        """Why ``vae`` is not this; empty if it is."""
        if self.code.reason or self.twin.doubt:
            return self.code.reason or self.twin.doubt
        if module_globals._global_forward_hooks or module_globals._global_forward_pre_hooks:
            return "a forward hook of all modules is registered, which only diffusers' path runs"
        now, then = arguments(vae), self.twin.arguments
        if now != then:
            name = next(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
            return f"vae.config.{name} is {now.get(name)}, and was {then.get(name)}"
        return custom_vae(vae, self.twin.vae, self.vae_names, self.method) or custom_network(
            vae, self.twin.vae, self.names, self.method
        )


@dataclass(slots=True)
class Settings:
    """Attributes of the modules that have the same ones: what :func:`vars` holds beside what every module has."""

    get: itemgetter[Any]
    spaces: list[dict[str, Any]]
    values: list[Any]

    @classmethod
    def of(cls, modules: Iterable[nn.Module], unused: frozenset[str]) -> list[Settings]:
        """All but those in ``unused``, which no code reads."""
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for module in modules:
            names = tuple(name for name in module.__dict__ if name not in OF_EVERY_MODULE and name not in unused)
            # A dropout heeds the mode; nothing else does.
            names += ("training",) if isinstance(module, nn.modules.dropout._DropoutNd) and module.p else ()
            groups.setdefault(names, []).append(module.__dict__)
        found = [(itemgetter(*names), spaces) for names, spaces in groups.items() if names]
        return [cls(get, spaces, list(map(get, spaces))) for get, spaces in found]

    def same(self) -> bool:
        """Whether every module has the values of then."""
        return list(map(self.get, self.spaces)) == self.values


@dataclass(slots=True)
class Seen:
    """One network at a look.

    Attributes:
        reason: why its calls run as diffusers runs them; empty where the image network is known to compute the same.
        placement: where and in which dtype it computes.
        parameters: all of them, in the order of the parts.
        addresses: of those that are plain tensors.
        dtypes: of all.
    """

    vae: nn.Module
    published: Published
    reason: str
    placement: Placement
    kind: type
    config: dict[str, Any]
    attributes: list[Any]  # published.watched of the VAE itself
    parts: list[nn.Module | None]
    modules: list[nn.Module]
    kinds: list[type]
    spaces: list[dict[str, Any]]  # their attributes,
    sizes: list[int]  # how many,
    settings: list[Settings]  # and which
    parents: list[dict[str, Any]]
    children: list[dict[str, nn.Module | None]]
    ordered: list[dict[str, Any]]  # lists of layers
    order: list[tuple[str, ...]]
    next_hook: int  # torch counts the hooks that it makes
    owners: list[dict[str, Any]]
    slots: list[dict[str, Tensor | None]]  # their parameters by name,
    scalars: list[tuple[dict[str, Any], str, Tensor]]  # and those of one element
    parameters: list[Tensor]
    plain: list[Tensor]
    addresses: list[int]
    counted: list[Tensor]  # in-place operations on these move their version
    versions: list[int]
    dtypes: list[torch.dtype]
    sample: Sample | None

    @classmethod
    def look(cls, vae: nn.Module, published: Published, parked_from: torch.device | None = None) -> Seen:
        """Look at the network of ``vae`` now, whose parked parameters count as being on ``parked_from``."""
        next_hook = RemovableHandle.next_id
        parts = [vae._modules.get(part) for part in PARTS[published.method]]
        modules = [layer for part in parts if part is not None for layer in part.modules()]
        spaces = list(map(vars, modules))
        parents = [space for space in spaces if space["_modules"]]
        owners = [space for space in spaces if space["_parameters"]]
        ordered = [vars(module) for module in modules if isinstance(module, (nn.ModuleList, nn.Sequential))]
        parameters = [parameter for space in owners for parameter in space["_parameters"].values() if parameter is not None]
        plain = list(filter(is_plain, parameters))
        counted = [p for p in plain if not p.is_inference()]
        seen = cls(
            vae=vae,
            published=published,
            reason="",
            placement=Placement.of(vae, published.method, parked_from),
            kind=type(vae),
            config=dict(vae.__dict__.get("_internal_dict") or {}),
            attributes=list(map(vae.__dict__.get, published.watched)),
            parts=parts,
            modules=modules,
            kinds=list(map(type, modules)),
            spaces=spaces,
            sizes=list(map(len, spaces)),
            settings=Settings.of(modules, published.unused),
            parents=parents,
            children=list(map(dict, map(_modules, parents))),
            ordered=ordered,
            order=list(map(tuple, map(_modules, ordered))),
            next_hook=next_hook,
            owners=owners,
            slots=list(map(dict, map(_parameters, owners))),
            scalars=_scalars(owners),
            parameters=parameters,
            plain=plain,
            addresses=list(map(Tensor.data_ptr, plain)),
            counted=counted,
            versions=list(map(_version, counted)),
            dtypes=[parameter.dtype for parameter in parameters],
            sample=None,
        )
        # Judged last: what another thread changes meanwhile differs from what was taken down.
        seen.reason = published.custom(vae)
        if not seen.reason:
            seen.sample = Sample([] if hold_values(vae, published.method) else plain)
        return seen

    def current(self) -> bool:
        """Whether nothing has changed since, but for values that were written without a mark."""
        try:
            return (
                self._same_vae()
                and self._same_layers()
                # By identity: of two tensors == fails, but where they have one element.
                and list(map(_parameters, self.owners)) == self.slots
                and all(parameters.get(name) is scalar for parameters, name, scalar in self.scalars)
                and self.in_place()
                and list(map(_version, self.counted)) == self.versions
            )
        except Exception:  # whatever somebody's objects do when they are compared
            return False

    def in_place(self) -> bool:
        """Whether the parameters of then have their memory still, in the same place."""
        return list(map(Tensor.data_ptr, self.plain)) == self.addresses

    def _same_vae(self) -> bool:
        space, published = self.vae.__dict__, self.published
        return (
            type(self.vae) is self.kind
            and list(map(space.get, published.watched)) == self.attributes
            and space.get("_internal_dict") == self.config
            and list(map(space["_modules"].get, PARTS[published.method])) == self.parts
            and not module_globals._global_forward_hooks
            and not module_globals._global_forward_pre_hooks
            and published.code.unchanged()
        )

    def _same_layers(self) -> bool:
        return (
            list(map(_modules, self.parents)) == self.children
            and list(map(tuple, map(_modules, self.ordered))) == self.order
            and list(map(type, self.modules)) == self.kinds
            and list(map(len, self.spaces)) == self.sizes
            and all(settings.same() for settings in self.settings)
            and (self.next_hook == RemovableHandle.next_id or self._same_hooks())
        )

    def _same_hooks(self) -> bool:
        """Whether none of the hooks that were made since is ours."""
        self.next_hook = RemovableHandle.next_id
        return not any(module._forward_hooks or module._forward_pre_hooks for module in self.modules)

    def same(self) -> bool:
        """:meth:`current`, and a sample of the values on the CPU is what it was."""
        return self.current() and self.sample is not None and self.sample.same()

    def settled(self) -> bool:
        """:meth:`current`, and a sample of the values is what it was, on whatever device; waits for it."""
        return self.current() and self.sample is not None and self.sample.settled()

    def compare(self) -> Callable[[], bool] | None:
        """Begin to compare a sample of the values on GPUs; see :meth:`Sample.compare`."""
        return None if self.sample is None else self.sample.compare()

    def holds_the_same(self, now: Seen) -> bool:
        """Whether ``now`` holds the same values in the same parameters, wherever those are."""
        if self.sample is None or now.sample is None:
            return self.reason == now.reason and self.sample is now.sample
        return (
            len(self.parameters) == len(now.parameters)
            and all(map(is_, self.parameters, now.parameters))
            and self.versions == now.versions
            and self.dtypes == now.dtypes
            and self.sample.equals(now.sample)
        )


def _scalars(owners: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str, Tensor]]:
    named = ((parameters, name, p) for parameters in map(_parameters, owners) for name, p in parameters.items())
    return [(parameters, name, p) for parameters, name, p in named if p is not None and p.numel() == 1]
