"""Into the class of one object and out again: a subclass whose methods ask for their owner, who serves the calls.

Methods of a class find the object that they are called on. Methods bound to the object and stored in it would go along
into its shallow copies, and work there on the original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from qwen_vae_accel.model.custom import PLAIN_CLASS, plain_class

_OWNERS = "_qwen_vae_accel"
_MARK = "__qwen_vae_accel__"


class Owner(Protocol):
    """Who serves methods of an object.

    Attributes:
        _before: what others had put in place of these methods into the object itself, by name; set by :meth:`Patch.install`.
    """

    _before: Mapping[str, Any]

    def _is_of(self, patched: Any) -> bool:
        """Whether it serves ``patched``, and not an object that ``patched`` was copied from."""


def owner_of(patched: Any, method: str) -> Any:
    """The :class:`Owner` that serves ``method`` of an object; None for a plain one and for a copy of a patched one."""
    owners = patched.__dict__.get(_OWNERS)
    owner = None if owners is None else owners.get(method)
    return owner if owner is not None and owner._is_of(patched) else None


class Patch:
    """How methods of one kind of object are served.

    Args:
        what: the object's name, for messages.
        served: by the name of a method ``function(owner, object, *args, **kwargs)``, which takes the method's arguments.
    """

    def __init__(self, what: str, served: Mapping[str, Callable[..., Any]]) -> None:
        self._what = what
        self.served = served

    def install(self, patched: Any, owner: Owner, names: Sequence[str]) -> None:
        """Let ``owner`` serve the methods ``names`` of an object."""
        owner._before = {name: patched.__dict__[name] for name in names if name in patched.__dict__}
        patched.__dict__[_OWNERS] = {**patched.__dict__.get(_OWNERS, {}), **dict.fromkeys(names, owner)}
        patched.__class__ = _subclass(plain_class(patched), self)
        for name in owner._before:  # last: until then they stand before the methods of the class
            del patched.__dict__[name]

    def patched_since(self, patched: Any, names: Sequence[str]) -> str:
        """Name what somebody else has changed since :meth:`install` and would lose by :meth:`remove`; empty if nothing."""
        for name in names:
            method = patched.__dict__.get(name)
            if method is not None and not getattr(method, _MARK, False):
                return f"{self._what}.{name} was patched again after accelerate()"
        if PLAIN_CLASS not in vars(type(patched)):
            return f"{self._what}.__class__ was changed after accelerate()"
        return ""

    def remove(self, patched: Any, names: Sequence[str], before: Mapping[str, Any]) -> None:
        """Make an object what it was before :meth:`install`; it can be repeated, and leaves the methods of other owners."""
        owners = {name: owner for name, owner in patched.__dict__.get(_OWNERS, {}).items() if name not in names}
        for name in names:
            if getattr(patched.__dict__.get(name), _MARK, False):
                del patched.__dict__[name]
        patched.__dict__.update(before)
        if owners:
            patched.__dict__[_OWNERS] = owners
            return
        patched.__dict__.pop(_OWNERS, None)
        if PLAIN_CLASS in vars(type(patched)):
            patched.__class__ = plain_class(patched)

    def plain_twin(self, patched: Any) -> Any:
        """A plain object that shares all of a patched one: what a copy, a pickle or a replica of it is made from."""
        cls: Any = plain_class(patched)
        twin = cls.__new__(cls)
        twin.__dict__.update(patched.__dict__)
        owners = [owner for name in self.served if (owner := owner_of(patched, name)) is not None]
        before = {name: value for owner in owners for name, value in owner._before.items()}
        self.remove(twin, tuple(self.served), before)
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
def _subclass(cls: type, patch: Patch) -> type:
    """The subclass of ``cls`` that asks for owners: same name, same signatures, same documentation, and equal to it."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # From protocol 2 on, pickle insists on an object of the very class that it is told to make.
        return patch.plain_twin(self).__reduce_ex__(1)

    def _replicate_for_data_parallel(self: Any) -> Any:
        return patch.plain_twin(self)._replicate_for_data_parallel()

    methods = {name: _method(cls, name, function) for name, function in patch.served.items()}
    copying: dict[str, Callable[..., Any]] = {"__reduce_ex__": __reduce_ex__}
    if hasattr(cls, "_replicate_for_data_parallel"):
        copying["_replicate_for_data_parallel"] = _replicate_for_data_parallel
    same = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind: Any = type("Alike", (_Alike, type(cls)), {})
    subclass: type = kind(cls.__name__, (cls,), {**same, **methods, **copying, PLAIN_CLASS: cls})
    return subclass


def _method(cls: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(getattr(cls, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = owner_of(self, name)
        if owner is None:
            return getattr(cls, name)(self, *args, **kwargs)
        return function(owner, self, *args, **kwargs)

    setattr(method, _MARK, True)
    return method
