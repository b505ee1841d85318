"""Where commands meet the world: the one place that turns what happened into output and an exit code.

With ``--json`` standard output holds one strict JSON document and nothing else, also when the command fails, whatever the
failure is. Progress, logs and errors for people go to standard error, which may be closed, full or without a reader. Exit
codes: 0 done; 1 the operation failed, or something it looked at is bad, or its result could not be written to standard
output; 2 the command line or configuration is invalid; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import typer
from rich.console import RenderableType
from rich.logging import RichHandler
from typer.core import TyperGroup

from qwen_vae_accel.documents import dump_json
from qwen_vae_accel.errors import AccelError, ConfigError, InvalidInputError
from qwen_vae_accel.terminal import Terminal, Unfailing, stderr

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
# Failures that need no traceback: what they say is what happened. Anything else is a fault of this program.
_TOLD = (AccelError, OSError, UnicodeError, RecursionError, OverflowError, torch.OutOfMemoryError, KeyboardInterrupt)
_USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, in the copy that this release of typer uses

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command found: JSON values, the same for people, and whether all is well."""

    document: dict[str, Any]
    view: RenderableType
    good: bool = True


def run(as_json: bool, verbose: bool, work: Callable[[], Outcome]) -> NoReturn:
    """Run a command's ``work`` and exit as documented."""
    _set_up_logging(verbose)
    original = sys.stderr
    quiet: Any = Unfailing(lambda: original)
    try:
        # What other packages print, to either stream, must neither get into the document nor fail.
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            outcome = work()
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        _fail(error, as_json)
    if as_json:
        _write(dump_json(outcome.document))
    else:
        _print(outcome.view)
    raise typer.Exit(OK if outcome.good else FAILED)


def _set_up_logging(verbose: bool) -> None:
    handler = RichHandler(console=stderr, show_path=False, markup=False)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler], force=True
    )
    if not verbose:
        # Compilers and model loaders are chatty, and what they say is not about the command.
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")
        logging.getLogger("torch").setLevel(logging.ERROR)


def _fail(error: BaseException, as_json: bool) -> NoReturn:
    """Tell an error, without a traceback where it was to be expected, and exit."""
    if isinstance(error, _TOLD):
        logger.info("%s", type(error).__name__, exc_info=error)
    else:
        stderr.print("".join(traceback.format_exception(error)), soft_wrap=True)
    reasons = getattr(error, "reasons", getattr(error, "differences", ())) if isinstance(error, AccelError) else ()
    _tell(type(error).__name__, str(error), list(reasons), as_json)
    if isinstance(error, KeyboardInterrupt):
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(USAGE if isinstance(error, (ConfigError, InvalidInputError)) else FAILED)


def _tell(kind: str, message: str, reasons: list[str], as_json: bool) -> None:
    if as_json:
        _write(dump_json({"error": {"type": kind, "message": message, "reasons": reasons}}))
    else:
        stderr.print("error:", style="bold red", end=" ")
        stderr.print(f"{kind}: {message}" if message else kind, soft_wrap=True)


def _write(text: str) -> None:
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed")
    sys.stdout.write(text)


def _print(view: RenderableType) -> None:
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed")
    console = Terminal(width=None if sys.stdout.isatty() else 128)
    with console.capture() as captured:  # so that an error of the stream is this function's, not rich's
        console.print(view)
    _write(captured.get())


class Commands(TyperGroup):
    """The group of all commands: tells what is wrong with a command line, and what standard output would not take."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command of ``args`` (the process's own where None) and exit."""
        arguments = list(sys.argv[1:] if args is None else args)
        with _standard_output():
            try:
                code = super().main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)
            except _USAGE_ERROR as error:
                code = _misused(error, "--json" in arguments)
            sys.exit(code if isinstance(code, int) else OK)


def _misused(error: Any, as_json: bool) -> int:
    message = error.format_message()
    if as_json:
        _tell("UsageError", message, [], True)
    elif message:  # no command at all: typer has printed the help
        if error.ctx is not None:
            stderr.print(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help' for help.", soft_wrap=True)
        _tell("UsageError", message, [], False)
    return int(error.exit_code)


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    """Inside, an error of standard output (closed, full, without a reader) becomes a message and exit code 1."""
    _fill_closed_streams()
    code: object = OK
    try:
        try:
            yield
        except SystemExit as error:
            code = error.code
            raise
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        _drop_output()
        if not isinstance(error, BrokenPipeError):  # whoever closed the pipe knows
            stderr.print(f"cannot write to standard output: {error.strerror or error}", soft_wrap=True)
        raise SystemExit(code or FAILED) from None
    finally:
        _drop_unwritable_errors()


def _fill_closed_streams() -> None:
    """A closed descriptor 0, 1 or 2 would be given to the next file that is opened, such as an engine."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            while os.open(os.devnull, os.O_RDWR) < descriptor:  # the lowest that is free is given
                pass


def _drop_output() -> None:
    """What is still buffered for it would fail again when the interpreter ends."""
    _redirect(sys.stdout, 1)


def _drop_unwritable_errors() -> None:
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        _redirect(sys.stderr, 2)


def _redirect(stream: Any, descriptor: int) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if stream.fileno() == descriptor:  # not a stand-in for it, as in tests
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
