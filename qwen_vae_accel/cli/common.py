"""What all commands share: options, where output goes, how errors are told.

With ``--json`` standard output holds one JSON document and nothing else, also when the command fails. Progress, logs
and errors for people go to standard error. Exit codes: 0 done; 1 the operation failed, or something it looked at is bad; 2
the command line or configuration cannot be meant.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console, RenderableType
from rich.logging import RichHandler

from qwen_vae_accel.backends.base import default_device
from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.errors import AccelError, ConfigError, InvalidInputError
from qwen_vae_accel.progress import progress_bar

OK, FAILED, USAGE = 0, 1, 2

stderr = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to standard error.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU where there is one.")]
Vae = Annotated[Path, typer.Option(help="Folder of a VAE, or of a pipeline that has one in vae/.")]
OptionalVae = Annotated[Path | None, typer.Option("--vae", help="Folder of a VAE or pipeline: compare weights too.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="JSON configuration; options below override its fields.")]
EngineDir = Annotated[Path | None, typer.Option(help="Folder of the engines.")]
Task = Annotated[str | None, typer.Option(help="t2i: decoders. i2i: encoders too.")]
Backend = Annotated[str | None, typer.Option(help="auto, or a backend's name.")]
Sizes = Annotated[
    str | None, typer.Option(help="Names or WxH, comma-separated, such as 16_9,1_1,768x1024; ranges as MIN:OPT:MAX.")
]
MultiProfile = Annotated[
    bool | None, typer.Option("--multi-profile/--static", help="One engine of several profiles, or one engine per size.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as the weights are stored.")]
EncodeDtype = Annotated[str | None, typer.Option(help="Overrides --dtype for encoding.")]
DecodeDtype = Annotated[str | None, typer.Option(help="Overrides --dtype for decoding.")]


def parse_device(text: str | None) -> torch.device:
    """A device that is there.

    Raises:
        ConfigError: for anything else.
    """
    if text is None:
        return default_device()
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ConfigError(f"device {text!r} is not one of cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {text!r} is not one of cpu, cuda, cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"device {text!r}: there are {count} CUDA devices here")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command found: JSON values, the same for people, and whether all is well."""

    document: dict[str, Any]
    view: RenderableType
    good: bool = True


def run(as_json: bool, verbose: bool, work: Callable[[], Outcome]) -> None:
    """Run a command's ``work`` and exit as documented."""
    handler = RichHandler(console=stderr, show_path=False, markup=False)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler], force=True
    )
    if not verbose:
        # Compilers and model loaders are chatty, and what they say is not about the command.
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")
        logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            outcome = work()
    except AccelError as error:
        fail(error, as_json)
    if as_json:
        sys.stdout.write(json.dumps(outcome.document, indent=1, default=str) + "\n")
    else:
        Console(width=None if sys.stdout.isatty() else 128).print(outcome.view)
    raise typer.Exit(OK if outcome.good else FAILED)


def fail(error: AccelError, as_json: bool) -> NoReturn:
    """Tell an error without a traceback and exit."""
    code = USAGE if isinstance(error, (ConfigError, InvalidInputError)) else FAILED
    if as_json:
        reasons = list(getattr(error, "reasons", getattr(error, "differences", ())))
        document = {"error": {"type": type(error).__name__, "message": str(error), "reasons": reasons}}
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        stderr.print(f"[bold red]error:[/] {type(error).__name__}:", end=" ")
        stderr.print(str(error), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[str, bool], None]]:
    """A progress bar on standard error; call the value with a description and whether one more step is done."""
    with progress_bar(stderr, transient=False) as show:
        done = 0

        def update(text: str, advance: bool) -> None:
            nonlocal done
            done += advance
            show(text, done, total)

        update(description, False)
        yield update
