"""Which engine serves a request: the engines of a plan, by the sizes that they take.

Everything here is a pure function of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qwen_vae_accel.errors import ConfigError
from qwen_vae_accel.sizes import GUIDE_PROFILES, GUIDE_STATIC, LATENT_SCALE, Profile, Size, folder_of, ranges, statics

MULTI_PROFILE = "multi_profile"


@dataclass(frozen=True, slots=True)
class EngineKey:
    """One engine of a plan: the network it replaces and the sizes it takes. It names the engine on every machine.

    ``name`` is a static engine's folder, or ``multi_profile``; ``profiles`` has one entry for a static engine.
    """

    method: str
    name: str
    profiles: tuple[Profile, ...] = field(hash=False)  # looked up at every call; method and name tell most apart

    @property
    def stem(self) -> str:
        """Path below the engine directory, without suffix, in the guide's layout."""
        network = "vae_encoder" if self.method == "encode" else "vae_decoder"
        return f"{network}_{MULTI_PROFILE}" if self.name == MULTI_PROFILE else f"{self.name}/{network}"

    @property
    def is_static(self) -> bool:
        """Whether the engine takes exactly one size."""
        return self.name != MULTI_PROFILE

    def ranges(self) -> str:
        """The sizes it takes, for a message."""
        return ", ".join(f"{p.name} [{p.minimum}..{p.optimum}..{p.maximum}]" for p in self.profiles)


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine and the optimization profile that serve a request."""

    key: EngineKey
    profile: Profile


@dataclass(frozen=True, slots=True)
class Miss:
    """No engine of the plan serves a request, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes engines are made for.

    Attributes:
        profiles: static sizes, or the optimization profiles of one engine.
        multi_profile: whether one engine holds all profiles.
        open: whether a static size that is not listed may get an engine of its own (no sizes were asked for by name).
        scale: pixels per latent pixel and side.
        held: sizes of the static engines that a directory has already, by folder: they are what their folders' names stand
            for.
    """

    profiles: tuple[Profile, ...]
    multi_profile: bool
    open: bool = False
    scale: int = LATENT_SCALE
    held: Mapping[str, Size] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        sizes: Iterable[str] | None,
        multi_profile: bool,
        scale: int = LATENT_SCALE,
        multiple: int = 1,
        held: Mapping[str, Size] | None = None,
    ) -> Plan:
        """The plan for ``sizes`` (names, WxH, MIN:OPT:MAX, each after ``NAME=`` or not), or the guide's where it is None.

        ``scale`` and ``multiple`` are those of the VAE's topology. A name of ``sizes`` is a folder, so with ``held`` it stands
        for the size that is in there. A size that is written out is meant: where its folder holds another one, it gets a
        folder of its own.

        Raises:
            ConfigError: for a size that cannot be read, an unknown name, an empty list, two sizes of one name or two names
                of one size.
        """
        held = held or {}
        if sizes is None:
            sizes = GUIDE_PROFILES if multi_profile else GUIDE_STATIC
            opened = not multi_profile
        else:
            opened = False
        profiles = ranges(sizes, scale, multiple) if multi_profile else statics(sizes, scale, held)
        if not profiles:
            raise ConfigError("sizes is empty: name at least one size, or leave it out for the guide's")
        return cls(profiles, multi_profile, opened, scale, held)

    def surprises(self, held: Mapping[str, Size]) -> list[str]:
        """List the folders that hold another size than this plan expects there; ``held`` are a directory's, by folder."""
        return [
            f"folder {p.name} holds an engine for {held[p.name]}, where {p.optimum} was expected"
            for p in (() if self.multi_profile else self.profiles)
            if held.get(p.name, p.optimum) != p.optimum
        ]

    def engines(self, method: str) -> tuple[EngineKey, ...]:
        """All engines of the plan for one network."""
        if self.multi_profile:
            return (EngineKey(method, MULTI_PROFILE, self.profiles),)
        return tuple(EngineKey(method, profile.name, (profile,)) for profile in self.profiles)

    def select(self, method: str, size: Size) -> Choice | Miss:
        """Which engine serves an image of ``size``: the exact static one, or the nearest profile that contains it."""
        step = self.scale if method == "decode" else 1
        fitting = [profile for profile in self.profiles if profile.contains(size, step)]
        if fitting:
            profile = min(fitting, key=lambda p: p.distance(size))
            key = self.engines(method)[0] if self.multi_profile else EngineKey(method, profile.name, (profile,))
            return Choice(key, profile)
        if self.multi_profile:
            listed = ", ".join(f"{p.name} [{p.minimum}..{p.maximum}]" for p in self.profiles)
            return Miss(f"{size} lies in no optimization profile: {listed}")
        if self.open:
            profile = Profile.static(folder_of(size, self.scale, self.held), size)
            return Choice(EngineKey(method, profile.name, (profile,)), profile)
        return Miss(f"{size} is not a static size of the plan: {', '.join(str(p.optimum) for p in self.profiles)}")
