"""Sizes, the names that stand for them, and the ranges that engines take.

Everything here is a pure function of values. Sizes are in pixels, written ``WIDTHxHEIGHT``; the guide's names stand for
its sizes, and ``NAME=SIZE`` gives a name another one. Pipelines round a requested size down to whole pairs of latent pixels
before they decode (with 8 pixels per latent pixel 1472x1140 decodes as 1472x1136, with 16 as 1472x1120), so static sizes are
rounded the same way. Optimization profiles are ranges of sizes and keep theirs, down to the multiple that the encoder takes:
without residual shortcuts it takes 1620 pixels and gives 202 latent columns, as diffusers does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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

    def text(self, *, multi_profile: bool) -> str:
        """The text that stands for exactly this profile in a list of sizes: there a size alone is a static one, or a range."""
        sizes = f"{self.minimum}:{self.optimum}:{self.maximum}" if multi_profile else str(self.optimum)
        return sizes if self.name == str(self.optimum) else f"{self.name}={sizes}"


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
# What the guide's program, LightX2V, looks for by now, in folders and profiles of the same names: its own ``vae_trt.py``.
LIGHTX2V_STATIC = {
    "16_9": Size(1664, 928),
    "9_16": Size(928, 1664),
    "1_1": Size(1328, 1328),
    "4_3": Size(1472, 1104),
    "3_4": Size(1104, 1472),
    "3_2": Size(1056, 1584),
    "2_3": Size(1584, 1056),
}
LIGHTX2V_PROFILES = {**GUIDE_PROFILES, "16_9_1080p": Size(1920, 1088), "9_16_1080p": Size(1088, 1920)}


@dataclass(frozen=True, slots=True)
class Preset:
    """All sizes of one host, by their names: of static engines, and of optimization profiles."""

    statics: Mapping[str, Size]
    profiles: Mapping[str, Size]


# By the names that stand for them in a list of sizes.
PRESETS = {"guide": Preset(GUIDE_STATIC, GUIDE_PROFILES), "lightx2v": Preset(LIGHTX2V_STATIC, LIGHTX2V_PROFILES)}
# What a name stands for where nothing else says so: the folders of static engines.
STATIC_NAMES = {**LIGHTX2V_STATIC, **GUIDE_STATIC}
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

_SIZE = re.compile(r"\s*(-?\d+)\s*[xX*]\s*(-?\d+)\s*")


def parse_size(text: str) -> Size:
    """``"1664x928"`` or a name of the tables -> :class:`Size`, as written.

    Raises:
        ConfigError: for anything else, and for sides outside 8 to 8192.
    """
    named = STATIC_NAMES.get(text) or GUIDE_PROFILES.get(text)
    if named is not None:
        return named
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"size {shown(text)} is neither WIDTHxHEIGHT nor one of {_names([*STATIC_NAMES, *GUIDE_PROFILES], text)}"
        )
    width, height = map(float, match.groups())  # int() refuses thousands of digits
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in (width, height)):
        raise ConfigError(f"size {shown(text)}: sides must be between {MIN_SIDE} and {MAX_SIDE} pixels")
    return Size(int(width), int(height))


def _names(names: Iterable[str], given: str) -> str:
    """The names for a message, and the nearest to what was given."""
    names = list(names)
    near = get_close_matches(given[:100], names, n=1)
    return f"{', '.join(names)}." + (f" Did you mean {near[0]!r}?" if near else "")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One text of a list of sizes, ``[NAME=]SIZE`` or ``[NAME=]MIN:OPT:MAX``, taken apart.

    ``name`` is empty where none is given; ``parts`` are the texts of one or three sizes.
    """

    text: str
    name: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> _Entry:
        name, given, rest = text.partition("=")
        return cls(text, name.strip(), tuple(rest.split(":"))) if given else cls(text, "", tuple(text.split(":")))

    @property
    def renames(self) -> bool:
        """Whether it gives a name a size of its own."""
        return "=" in self.text

    def sizes(self) -> tuple[Size, ...]:
        """One size, or a range of three that do not decrease; after ``NAME=`` a name is none."""
        if len(self.parts) not in (1, 3):
            raise ConfigError(f"range {shown(self.text)} must be MIN:OPT:MAX, three sizes such as 256x256:512x512:1024x1024")
        if self.renames and not all(map(_SIZE.fullmatch, self.parts)):
            raise ConfigError(f"{shown(self.text)}: after the name comes its size, WIDTHxHEIGHT, such as 4_3=1472x1104")
        sizes = tuple(map(parse_size, self.parts))
        for before, after in zip(sizes, sizes[1:], strict=False):
            if before.width > after.width or before.height > after.height:
                raise ConfigError(
                    f"range {shown(self.text)}: minimum, optimum and maximum must not decrease, in width and in height"
                )
        return sizes

    def check_name(self, known: Iterable[str], size: Size) -> None:
        """Raise a ConfigError where a name is given that is neither ``known`` nor the size itself."""
        if self.renames and self.name not in known and self.name != str(size):
            raise ConfigError(
                f"{shown(self.text)}: {shown(self.name)} is neither the size itself nor one of {_names(known, self.name)}"
            )


def _entries(texts: Iterable[str], tables: Mapping[str, Mapping[str, Size]]) -> Iterator[_Entry]:
    """The texts taken apart, those that name one of ``tables`` written out."""
    for text in texts:
        if text in tables:
            yield from (_Entry.of(f"{name}={size}") for name, size in tables[text].items())
        else:
            yield _Entry.of(text)


def _default_range(optimum: Size, least: int) -> tuple[Size, Size, Size]:
    """The range of a profile given by its optimum alone: half of it to one and a half, sides from ``least`` up to 1920."""
    limit = max(GUIDE_MAX_SIDE, optimum.width, optimum.height)
    low = Size(max(least, optimum.width // 2), max(least, optimum.height // 2)).floor(LATENT_SCALE)
    high = Size(min(limit, optimum.width * 3 // 2), min(limit, optimum.height * 3 // 2))
    return low, optimum, high


def _profile(entry: _Entry, scale: int, multiple: int) -> Profile:
    least = 2 * scale  # torch.export tells a side of one latent pixel from all others
    sizes = entry.sizes()
    low, optimum, high = (size.floor(multiple) for size in (sizes if len(sizes) == 3 else _default_range(sizes[0], least)))
    if min(low.width, low.height, optimum.width, optimum.height) < least:
        raise ConfigError(
            f"range {shown(entry.text)}: sides must be at least {least} pixels, which are two latent pixels of the VAE"
        )
    entry.check_name(GUIDE_PROFILES, optimum)
    return Profile(entry.name or (entry.text if entry.text in GUIDE_PROFILES else str(optimum)), low, optimum, high)


def profile_name(optimum: Size, factor: int) -> str:
    """The name of a profile that is tuned for ``optimum``, in steps of ``factor`` pixels, in the tables; else the size."""
    named = (n for preset in PRESETS.values() for n, size in preset.profiles.items() if size.floor(factor) == optimum)
    return next(named, str(optimum))


def ranges(texts: Iterable[str], scale: int, multiple: int) -> tuple[Profile, ...]:
    """The optimization profiles that ``texts`` stand for, for a VAE's topology of this ``scale`` and ``multiple``.

    Raises:
        ConfigError: for a text that is none, or two different profiles of one name or one optimum.
    """
    entries = _entries(texts, {name: preset.profiles for name, preset in PRESETS.items()})
    profiles = tuple(dict.fromkeys(_profile(entry, scale, multiple) for entry in entries))
    for what, found in (("name", [p.name for p in profiles]), ("optimum", [str(p.optimum) for p in profiles])):
        doubled = sorted(text for text, count in Counter(found).items() if count > 1)
        if doubled:
            raise ConfigError(f"two different ranges have the {what} {', '.join(doubled)}; one is enough")
    return profiles


def statics(texts: Iterable[str], scale: int, held: Mapping[str, Size]) -> tuple[Profile, ...]:
    """The static sizes that ``texts`` stand for, each named by its folder; folders in ``held`` have the size they hold.

    Raises:
        ConfigError: for a text that is none, two sizes of one name, or two names of one size.
    """
    entries = tuple(_entries(texts, {name: preset.statics for name, preset in PRESETS.items()}))
    folders = _folders(scale, held, _given(entries, scale))
    names = _by_size(folders)
    profiles = []
    for entry in entries:
        size = folders[entry.text] if entry.text in STATIC_NAMES else _static_size(entry, scale)
        profiles.append(Profile.static(entry.text if entry.text in held else names.get(size, str(size)), size))
    return tuple(dict.fromkeys(profiles))


def _given(entries: Iterable[_Entry], scale: int) -> dict[str, Size]:
    """The sizes that ``NAME=SIZE`` gives to names."""
    given: dict[str, Size] = {}
    for entry in entries:
        size = _static_size(entry, scale)
        if not entry.renames:
            continue
        entry.check_name(STATIC_NAMES, size)
        if given.setdefault(entry.name, size) != size:
            raise ConfigError(f"{entry.name} stands for two sizes, {given[entry.name]} and {size}; a folder holds one")
    for size, count in Counter(given.values()).items():
        if count > 1:
            names = " and ".join(name for name, other in given.items() if other == size)
            raise ConfigError(f"{names} are names for one size, {size}; one is enough")
    return given


def _static_size(entry: _Entry, scale: int) -> Size:
    sizes = entry.sizes()
    if len(sizes) > 1:
        raise ConfigError(f"range {shown(entry.text)} needs multi_profile=True; a static engine has one size")
    multiple = static_multiple(scale)
    size = sizes[0].floor(multiple)
    if min(size.width, size.height) < multiple:
        raise ConfigError(f"size {shown(entry.text)}: pipelines round down to multiples of {multiple}, which leaves nothing")
    return size


def static_multiple(scale: int) -> int:
    """Sides of a static size are multiples of this, as the pipelines round, for ``scale`` pixels per latent pixel."""
    return max(STATIC_MULTIPLE, 2 * scale)


def _folders(scale: int, held: Mapping[str, Size], given: Mapping[str, Size]) -> dict[str, Size]:
    """The size in each folder: what a directory holds, else what is ``given``, else the tables'; in this order."""
    tables = {name: size.floor(static_multiple(scale)) for name, size in STATIC_NAMES.items()}
    folders: dict[str, Size] = {}
    for source in (held, given, tables):
        folders |= {name: size for name, size in source.items() if name not in folders}
    return folders


def folder_fits(name: str, size: Size) -> bool:
    """Whether a folder may hold a static engine of ``size``: a folder that is called like a size holds no other."""
    return name in STATIC_NAMES or name == str(size)


def folder_of(size: Size, scale: int, held: Mapping[str, Size]) -> str:
    """The folder of a static engine of ``size`` in a directory that holds the sizes ``held``, by folder."""
    return _by_size(_folders(scale, held, {})).get(size, str(size))


def _by_size(folders: Mapping[str, Size]) -> dict[Size, str]:
    """The first folder of each size."""
    return {size: name for name, size in reversed(list(folders.items()))}
