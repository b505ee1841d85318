"""Whether classes still compute with the code that their own modules define, whoever patched them and when.

A function is a class's own if its code belongs to the module that the class is from, under the class's and its own name;
``functools.wraps`` changes neither. From the functions that a call enters by, the names in their code lead to every method
and every function of torch that it may use. Looking again costs microseconds: the same objects are in the same places.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter, itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

# Whose functions are read on, and whose objects may stand in their modules.
_LIBRARIES = ("torch", "diffusers")
_TRUSTED = sys.stdlib_module_names | {*_LIBRARIES, "accelerate", "numpy"}
# Modules with decorators: what their wrappers call is in the closure.
_DECORATORS = ("diffusers.utils.accelerate_utils", "diffusers.configuration_utils", "torch._dynamo.mutation_guard")
# Methods that torch defines under another name.
_ALIASES: dict[tuple[type, str], str] = {
    (nn.Module, "__call__"): "Module._wrapped_call_impl",
    (nn.Module, "forward"): "_forward_unimplemented",
}
# Names that mean a tensor's method wherever they stand in the networks' code.
_OF_TENSORS = frozenset(dir(torch.Tensor))
_QUALIFIED = hasattr(CodeType, "co_qualname")
_code = attrgetter("__code__")


class OwnCode:
    """The code behind some methods as it was at the last look.

    Attributes:
        reason: what in it is not the library's own; empty if all is.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._sizes: dict[type, int] = {}
        self._places: dict[int, tuple[Mapping[str, Any], dict[str, Any]]] = {}  # spaces by identity, and what they hold
        self._functions: dict[FunctionType, CodeType] = {}

    def trace(self, classes: Iterable[type], entries: frozenset[str]) -> frozenset[str]:
        """Follow the methods ``entries`` through ``classes`` and their bases.

        Returns:
            Every name of a method, global or attribute that the code found uses.
        """
        bases = _bases(classes)
        for base in bases:
            self._sizes.setdefault(base, len(vars(base)))
        spaces = {base: vars(base) for base in bases}  # kept: an identity is that of a living object
        names = set(entries)
        seen: set[tuple[type, str]] = set()
        while True:
            methods = (names - _OF_TENSORS).union(entries)
            uses = [(base, name) for base in bases for name in methods & vars(base).keys() if (base, name) not in seen]
            if not uses:
                break
            seen.update(uses)
            for base, name in uses:
                for function in self._method(base, name, self._take_down(spaces[base], name)):
                    names |= _names(function.__code__)
        self._freeze()
        return frozenset(names)

    def unchanged(self) -> bool:
        """Whether all that was found is in its place still."""
        try:
            return (
                list(map(len, self._classes)) == self._lengths
                and [get(space) for get, space in self._getters] == self._values
                and list(map(_code, self._functions)) == self._codes
            )
        except Exception:  # whatever somebody's objects do when they are compared
            return False

    def _freeze(self) -> None:
        # An entry that is new in a class may hide one of its bases: seen by the number of entries.
        self._classes, self._lengths = list(map(vars, self._sizes)), list(self._sizes.values())
        self._getters = [(itemgetter(*entries), space) for space, entries in self._places.values()]
        self._values = [get(entries) for (get, _), (_, entries) in zip(self._getters, self._places.values(), strict=True)]
        self._codes = list(self._functions.values())

    def _take_down(self, space: Mapping[str, Any], name: str) -> Any:
        entries = self._places.setdefault(id(space), (space, {}))[1]
        entries[name] = space[name]
        return entries[name]

    def _alien(self, what: str, value: Any) -> None:
        origin = getattr(value, "__globals__", {}).get("__name__") or getattr(value, "__module__", None)
        self.reason = self.reason or f"{what} was replaced" + (f" by code of {origin}" if origin else "")

    def _method(self, cls: type, name: str, value: Any) -> list[FunctionType]:
        """The functions behind an entry of the class dictionary, all of them the class's own code."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        if not isinstance(value, FunctionType):
            if callable(value) and not isinstance(value, type) and not _is_native(value):
                self._alien(f"{cls.__name__}.{name}", value)
            return []
        functions = list(_unwrapped(value))
        if not functions or not all(_is_defined_in(cls, name, function) for function in functions):
            self._alien(f"{cls.__name__}.{name}", value)
            return []
        for function in functions:
            self._follow(function)
        return functions

    def _follow(self, function: FunctionType) -> None:
        """Take down what the code of ``function`` finds in its module, and in torch's modules from there."""
        if function not in self._functions:
            self._functions[function] = function.__code__
            self._look_in(function.__globals__, _names(function.__code__), set())

    def _look_in(self, space: dict[str, Any], names: set[str], visited: set[int]) -> None:
        visited.add(id(space))
        module = space["__name__"]
        for name in names & space.keys():
            if not callable(space[name]) and not isinstance(space[name], ModuleType):
                continue
            value = self._take_down(space, name)
            if isinstance(value, ModuleType):
                if sys.modules.get(value.__name__) is not value:
                    self._alien(f"{module}.{name}", value)
                elif _root(value.__name__) in _LIBRARIES and id(vars(value)) not in visited:
                    self._look_in(vars(value), names, visited)
            elif not _belongs(name, value):
                self._alien(f"{module}.{name}", value)


def _bases(classes: Iterable[type]) -> list[type]:
    return list(dict.fromkeys(base for cls in classes for base in cls.__mro__ if base is not object))


def foreign_constructor(classes: Iterable[type]) -> str:
    """Which of ``classes`` or their bases has a constructor that is not its own code; empty if none has."""
    for cls in _bases(classes):
        value = vars(cls).get("__init__")
        if isinstance(value, FunctionType) and not all(_is_defined_in(cls, "__init__", f) for f in _unwrapped(value)):
            return f"{cls.__name__}.__init__ was replaced"
    return ""


def _names(code: CodeType) -> set[str]:
    """Names of globals and attributes in ``code`` and the functions inside it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _closure(function: FunctionType) -> list[FunctionType]:
    return [cell.cell_contents for cell in function.__closure__ or () if isinstance(cell.cell_contents, FunctionType)]


def _unwrapped(function: FunctionType) -> Iterator[FunctionType]:
    """The function that the wrapper of a known decorator calls; ``function`` itself if it is none."""
    inside = _closure(function) if function.__globals__.get("__name__") in _DECORATORS else []
    for inner in inside:
        yield from _unwrapped(inner)
    if not inside:
        yield function


def _qualname(function: FunctionType) -> str:
    """By the code; before Python 3.11 code knows its plain name only."""
    name: str = getattr(function.__code__, "co_qualname" if _QUALIFIED else "co_name")
    return name


def _is_defined_in(cls: type, name: str, function: FunctionType) -> bool:
    module = sys.modules.get(cls.__module__)
    expected = _ALIASES.get((cls, name), f"{cls.__qualname__}.{name}")
    expected = expected if _QUALIFIED else expected.rpartition(".")[2]
    is_here = module is not None and function.__globals__ is vars(module)
    return is_here and _qualname(function) == expected and _is_in_file(function, sys.modules[cls.__module__])


def _is_in_file(function: FunctionType, module: ModuleType) -> bool:
    """Whether the code was compiled from the module's file; text that was run inside the module was not."""
    file, source = function.__code__.co_filename, getattr(module, "__file__", None) or ""
    return not source.endswith(".py") or file == source or os.path.realpath(file) == os.path.realpath(source)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _is_native(value: Any) -> bool:
    """Whether ``value`` is compiled code, which no patch in Python is."""
    return type(value).__module__ == "builtins"


def _belongs(name: str, value: Any) -> bool:
    """Whether ``value``, found under ``name`` in a module of a library, is what libraries put there."""
    if isinstance(value, FunctionType):
        home = sys.modules.get(value.__globals__.get("__name__", ""))
        if home is None or vars(home) is not value.__globals__ or _root(home.__name__) not in _TRUSTED:
            return False
        # No function from elsewhere gets here, so that functools.wraps cannot have written this name.
        if "<locals>" in value.__qualname__:  # what a function of torch made, of its own functions
            return all(_root(inner.__globals__.get("__name__")) in _TRUSTED for inner in _closure(value))
        return _same_name(name, value.__code__.co_name) and _is_in_file(value, home)
    if isinstance(value, (BuiltinFunctionType, type)):
        return _root(value.__module__) in _TRUSTED | {""} and _same_name(name, value.__name__)
    return _root(type(value).__module__) in _LIBRARIES


def _same_name(one: str, other: str) -> bool:
    return one.lstrip("_") == other.lstrip("_")
