"""Names and shapes: which sizes are served, and which engine serves a request.

Everything here is a pure function of values. Sizes are in pixels, written ``WIDTHxHEIGHT``; the guide's names stand for
its sizes. Pipelines round a requested size down to whole pairs of latent pixels before they decode (with 8 pixels per latent
pixel 1472x1140 decodes as 1472x1136, with 16 as 1472x1120), so static sizes are rounded the same way. Optimization profiles
are ranges of sizes and keep theirs, down to the multiple that the encoder takes: without residual shortcuts it takes
1620 pixels and gives 202 latent columns, as diffusers does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

from qwen_vae_accel.errors import ConfigError, shown

MIN_SIDE = 8
MAX_SIDE = 8192
GUIDE_MAX_SIDE = 1920
STATIC_MULTIPLE = 16
LATENT_SCALE = 8


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    def floor(self, multiple: int) -> Size:
        """Both sides rounded down to a multiple, as the pipelines do."""
        return Size(self.width // multiple * multiple, self.height // multiple * multiple)


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimization profile: the sizes an engine takes, and the one it is tuned for."""

    name: str
    minimum: Size
    optimum: Size
    maximum: Size

    @classmethod
    def static(cls, name: str, size: Size) -> Profile:
        """The range of one size."""
        return cls(name, size, size, size)

    def contains(self, size: Size, step: int = 1) -> bool:
        """Whether ``size`` lies in the range, both in whole steps (a decoder's latent pixel is 8 pixels)."""
        low, high, size = (s.floor(step) for s in (self.minimum, self.maximum, size))
        return low.width <= size.width <= high.width and low.height <= size.height <= high.height

    def distance(self, size: Size) -> int:
        """L1 distance of ``size`` from the optimum, in pixels."""
        return abs(size.width - self.optimum.width) + abs(size.height - self.optimum.height)


# The guide's static sizes for text-to-image, one folder each.
GUIDE_STATIC = {
    "16_9": Size(1664, 928),
    "9_16": Size(928, 1664),
    "1_1": Size(1328, 1328),
    "4_3": Size(1472, 1140),
    "3_4": Size(768, 1024),
}
# The guide's optimization profiles for image editing (it names height x width; these are width x height).
GUIDE_PROFILES = {
    "1_1_512": Size(512, 512),
    "1_1_1024": Size(1024, 1024),
    "16_9_480p": Size(848, 480),
    "16_9_720p": Size(1280, 720),
    "16_9_1080p": Size(1920, 1080),
    "9_16_720p": Size(720, 1280),
    "9_16_1080p": Size(1080, 1920),
    "4_3_768p": Size(1024, 768),
    "3_2_1080p": Size(1620, 1088),
}
# The sizes the Qwen-Image model card recommends, and the pipelines' default.
MODEL_CARD = (
    Size(1328, 1328),
    Size(1664, 928),
    Size(928, 1664),
    Size(1472, 1104),
    Size(1104, 1472),
    Size(1584, 1056),
    Size(1056, 1584),
)
PIPELINE_DEFAULT = Size(1024, 1024)
MULTI_PROFILE = "multi_profile"

_SIZE = re.compile(r"\s*(-?\d+)\s*[xX*]\s*(-?\d+)\s*")


def parse_size(text: str) -> Size:
    """``"1664x928"`` or a name of the guide -> :class:`Size`, as written.

    Raises:
        ConfigError: for anything else, and for sides outside 8 to 8192.
    """
    named = GUIDE_STATIC.get(text) or GUIDE_PROFILES.get(text)
    if named is not None:
        return named
    match = _SIZE.fullmatch(text)
    if match is None:
        names = [*GUIDE_STATIC, *GUIDE_PROFILES]
        near = get_close_matches(text[:100], names, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"size {shown(text)} is neither WIDTHxHEIGHT nor one of {', '.join(names)}.{meant}")
    width, height = map(float, match.groups())  # int() refuses thousands of digits
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in (width, height)):
        raise ConfigError(f"size {shown(text)}: sides must be between {MIN_SIDE} and {MAX_SIDE} pixels")
    return Size(int(width), int(height))


def _default_range(name: str, optimum: Size, least: int) -> Profile:
    """The range of a profile given by its optimum alone: half of it to one and a half, sides from ``least`` up to 1920."""
    limit = max(GUIDE_MAX_SIDE, optimum.width, optimum.height)
    low = Size(max(least, optimum.width // 2), max(least, optimum.height // 2)).floor(LATENT_SCALE)
    high = Size(min(limit, optimum.width * 3 // 2), min(limit, optimum.height * 3 // 2))
    return Profile(name, low, optimum, high)


def _ranges(text: str, least: int) -> Profile:
    parts = text.split(":")
    if len(parts) == 1:
        optimum = parse_size(text)
        return _default_range(text if text in GUIDE_PROFILES else str(optimum), optimum, least)
    if len(parts) != 3:
        raise ConfigError(f"range {shown(text)} must be MIN:OPT:MAX, three sizes such as 256x256:512x512:1024x1024")
    low, optimum, high = map(parse_size, parts)
    if not (low.width <= optimum.width <= high.width and low.height <= optimum.height <= high.height):
        raise ConfigError(f"range {shown(text)}: minimum, optimum and maximum must not decrease, in width and in height")
    return Profile(str(optimum), low, optimum, high)


def _profile(text: str, scale: int, multiple: int) -> Profile:
    least = 2 * scale  # torch.export tells a side of one latent pixel from all others
    profile = _ranges(text, least)
    low, optimum, high = (size.floor(multiple) for size in (profile.minimum, profile.optimum, profile.maximum))
    if min(low.width, low.height, optimum.width, optimum.height) < least:
        raise ConfigError(f"range {shown(text)}: sides must be at least {least} pixels, which are two latent pixels of the VAE")
    return Profile(profile.name if profile.name in GUIDE_PROFILES else str(optimum), low, optimum, high)


def _static(text: str, scale: int) -> Profile:
    if ":" in text:
        raise ConfigError(f"range {shown(text)} needs multi_profile=True; a static engine has one size")
    multiple = static_multiple(scale)
    size = parse_size(text).floor(multiple)
    if min(size.width, size.height) < multiple:
        raise ConfigError(f"size {shown(text)}: pipelines round down to multiples of {multiple}, which leaves nothing")
    return Profile.static(folder_name(size, scale), size)


def static_multiple(scale: int) -> int:
    """Sides of a static size are multiples of this, as the pipelines round, for ``scale`` pixels per latent pixel."""
    return max(STATIC_MULTIPLE, 2 * scale)


def folder_name(size: Size, scale: int = LATENT_SCALE) -> str:
    """The folder of a static size: the guide's name where it has one, else ``WIDTHxHEIGHT``."""
    for name, guide_size in GUIDE_STATIC.items():
        if guide_size.floor(static_multiple(scale)) == size:
            return name
    return str(size)


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
    """

    profiles: tuple[Profile, ...]
    multi_profile: bool
    open: bool = False
    scale: int = LATENT_SCALE

    @classmethod
    def make(cls, sizes: Iterable[str] | None, multi_profile: bool, scale: int = LATENT_SCALE, multiple: int = 1) -> Plan:
        """The plan for ``sizes`` (names, WxH, MIN:OPT:MAX), or the guide's own where ``sizes`` is None.

        ``scale`` and ``multiple`` are those of the VAE's topology.

        Raises:
            ConfigError: for a size that cannot be read, an empty list or two profiles of one name.
        """
        if sizes is None:
            sizes = GUIDE_PROFILES if multi_profile else GUIDE_STATIC
            opened = not multi_profile
        else:
            opened = False
        found = (_profile(text, scale, multiple) if multi_profile else _static(text, scale) for text in sizes)
        profiles = tuple(dict.fromkeys(found))
        if not profiles:
            raise ConfigError("sizes is empty: name at least one size, or leave it out for the guide's")
        counts = Counter(profile.name for profile in profiles)
        doubled = sorted(name for name, count in counts.items() if count > 1)
        if doubled:
            raise ConfigError(f"two different ranges have the optimum {', '.join(doubled)}; one is enough")
        return cls(profiles, multi_profile, opened, scale)

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
            ranges = ", ".join(f"{p.name} [{p.minimum}..{p.maximum}]" for p in self.profiles)
            return Miss(f"{size} lies in no optimization profile: {ranges}")
        if self.open:
            profile = Profile.static(folder_name(size, self.scale), size)
            return Choice(EngineKey(method, profile.name, (profile,)), profile)
        return Miss(f"{size} is not a static size of the plan: {', '.join(str(p.optimum) for p in self.profiles)}")
