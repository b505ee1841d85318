"""What all commands share: options, how they are read, the progress bar."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from qwen_vae_accel.backends.base import default_device
from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.errors import ConfigError, shown
from qwen_vae_accel.loading import VAE_TYPES
from qwen_vae_accel.model.topology import METHODS
from qwen_vae_accel.progress import progress_bar

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to standard error.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(help="Scratch memory of a call of the fused kernels: bytes, 2GiB, or 50% of what is free."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU where there is one.")]
Vae = Annotated[Path, typer.Option(help="Folder of a VAE, or of a pipeline that has one in vae/; or a .safetensors file.")]
OptionalVae = Annotated[
    Path | None,
    typer.Option("--vae", help="Folder or .safetensors file of a VAE, or folder of a pipeline: compare weights too."),
]
VaeType = Annotated[str, typer.Option(help=f"Which VAE: {' or '.join(VAE_TYPES)}.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="JSON configuration; options below override its fields.")]
EngineDir = Annotated[Path | None, typer.Option(help="Folder of the engines.")]
Task = Annotated[
    str | None,
    typer.Option(help="t2i: the five static sizes; i2i: the nine profiles; unless --sizes or --multi-profile say otherwise."),
]
Backend = Annotated[str | None, typer.Option(help="auto, or a backend's name.")]
Sizes = Annotated[
    str | None,
    typer.Option(
        help="Names or WxH, comma-separated, such as 16_9,1_1,768x1024; ranges as MIN:OPT:MAX; 4_3=1472x1104 gives a name a "
        "size; guide or lightx2v: a whole table."
    ),
]
MultiProfile = Annotated[
    bool | None, typer.Option("--multi-profile/--static", help="One engine of several profiles, or one engine per size.")
]
Method = Annotated[str | None, typer.Option(help="encode or decode. Default: both.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as the weights are stored.")]
EncodeDtype = Annotated[str | None, typer.Option(help="Overrides --dtype for encoding.")]
DecodeDtype = Annotated[str | None, typer.Option(help="Overrides --dtype for decoding.")]

Written = TypeVar("Written")


def parse_device(text: str | None) -> torch.device:
    """A device that is there.

    Raises:
        ConfigError: for anything else.
    """
    if text is None:
        return default_device()
    try:
        device = torch.device(text)
    except (RuntimeError, ValueError):
        raise ConfigError(f"device {shown(text)} is not one of cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {text!r} is not one of cpu, cuda, cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"device {text!r}: there are {count} CUDA devices here")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def parse_methods(text: str | None) -> tuple[str, ...]:
    """The networks that ``--method`` names; all where it is not given.

    Raises:
        ConfigError: for anything else.
    """
    if text is not None and text not in METHODS:
        raise ConfigError(f"method {shown(text)} is not one of {', '.join(METHODS)}")
    return METHODS if text is None else (text,)


def parse_vae_type(text: str) -> str:
    """One of ``VAE_TYPES``.

    Raises:
        ConfigError: for anything else.
    """
    if text not in VAE_TYPES:
        raise ConfigError(f"--vae-type {shown(text)} is not one of {', '.join(VAE_TYPES)}")
    return text


def split(text: str | None) -> tuple[str, ...] | None:
    """A comma-separated list; None where there is none."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def resolve(config: Path | None, **overrides: Any) -> AccelConfig:
    """The configuration of a command: the file, and the options that were given over it."""
    given = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(given.get("engine_dir"), Path):
        given["engine_dir"] = str(given["engine_dir"])
    if "sizes" in given:
        given["sizes"] = split(given["sizes"])
    return AccelConfig.resolve(config, **given)


def written(write: Callable[[], Written], folder: Path) -> Written:
    """The value of ``write``, which writes a result to ``folder``.

    Raises:
        ConfigError: if it cannot.
    """
    try:
        return write()
    except OSError as error:
        raise ConfigError(f"cannot write the report to {folder}: {error}") from error


def command_line() -> str:
    """The command as it was called, for documents that say how they were made."""
    return shlex.join(["qwen-vae-accel", *sys.argv[1:]])


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[str, bool], None]]:
    """A progress bar on standard error; call the value with a description and whether one more step is done."""
    with progress_bar(transient=False) as show:
        done = 0

        def update(text: str, advance: bool) -> None:
            nonlocal done
            done += advance
            show(text, done, total)

        update(description, False)
        yield update
