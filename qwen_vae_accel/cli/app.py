"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from qwen_vae_accel import __version__
from qwen_vae_accel.cli import edge
from qwen_vae_accel.cli.bench import bench
from qwen_vae_accel.cli.config import config
from qwen_vae_accel.cli.demo import demo
from qwen_vae_accel.cli.engines import adopt, build, list_engines, prune
from qwen_vae_accel.cli.report import report
from qwen_vae_accel.cli.serve_bench import serve_bench
from qwen_vae_accel.cli.tune import tune
from qwen_vae_accel.cli.verify import verify

app = typer.Typer(
    cls=edge.Commands,
    name="qwen-vae-accel",
    help="Engines, checks and measurements for an accelerated Qwen-Image VAE.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(build)
app.command("list")(list_engines)
app.command()(verify)
app.command()(tune)
app.command()(bench)
app.command("serve-bench")(serve_bench)
app.command()(report)
app.command()(prune)
app.command()(adopt)
app.command()(demo)
app.command()(config)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Engines, checks and measurements for an accelerated Qwen-Image VAE."""


def main() -> None:
    """The entry point."""
    app()
