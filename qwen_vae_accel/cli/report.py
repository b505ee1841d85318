"""``qwen-vae-accel report``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qwen_vae_accel import __version__
from qwen_vae_accel.bench.stored import read_all
from qwen_vae_accel.cli import common, edge
from qwen_vae_accel.errors import ConfigError
from qwen_vae_accel.files import write_output
from qwen_vae_accel.page.html import to_html
from qwen_vae_accel.terminal import plain

Results = Annotated[
    list[Path], typer.Argument(help="JSON of bench and serve-bench, output folders of demo; shown in this order.")
]


def report(
    results: Results,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its title.")] = "Qwen-Image VAE: results",
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Make one self-contained HTML page of results: tables, charts, and a slider between the demo's pictures."""

    def work() -> edge.Outcome:
        if os.path.isdir(output):
            raise ConfigError(f"{output} is a folder: name the page, such as {output / 'report.html'}")
        if any(os.path.realpath(output) == os.path.realpath(path) for path in results):
            raise ConfigError(f"{output} is one of the results: name another file for the page")
        sheets = read_all(results)
        page = to_html(sheets, title, __version__)
        try:
            write_output(output, page)
        except OSError as error:
            raise ConfigError(f"cannot write {output}: {error}") from error
        size = os.path.getsize(output)
        document = {"file": str(output), "bytes": size, "sections": [sheet.title for sheet in sheets]}
        return edge.Outcome(document, plain(f"{output}, {size / 1e6:.1f} MB, {len(sheets)} results"))

    edge.run(as_json, verbose, work)
