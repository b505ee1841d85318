"""``qwen-vae-accel demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group

from qwen_vae_accel.cli import common, edge
from qwen_vae_accel.demo import run
from qwen_vae_accel.engines.builder import BuildResult
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.page.console import to_rich
from qwen_vae_accel.page.sheet import Table
from qwen_vae_accel.terminal import plain, stderr


def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub ID of a VAE or pipeline. Default: the shipped tiny VAE.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A photo. Default: a shipped one.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for engines and pictures.")] = Path("demo_output"),
    backend: Annotated[str, typer.Option(help="A backend that has engines; auto takes the fastest that can run.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on the CPU, as stored on the GPU.")] = None,
    device: common.Device = None,
    area: Annotated[int, typer.Option(min=256, max=2**28, help="Pixels that a larger photo is scaled down to.")] = 1024 * 1024,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Build engines, reload them in a new process, run a photo through the VAE and a whole pipeline, compare with diffusers."""

    def work() -> edge.Outcome:
        where = common.parse_device(device)
        instructions = run.make_instructions(model, image, output, backend, dtype, where, area)
        with common.progress(2, "build") as update:

            def told(total: int, wanted: Wanted, result: BuildResult | None) -> None:
                update(wanted.path, result is not None)

            instructions, built = run.build(instructions, told)
        stderr.print("running in a new process ...")
        findings = {"builds": [result.as_dict() for result in built], **run.reload(instructions)}
        return edge.Outcome(findings, _view(findings))

    edge.run(as_json, verbose, work)


def _view(findings: dict[str, Any]) -> Group:
    built = [
        [entry["path"], entry["status"], f"{entry['seconds']:.1f}", f"{entry['bytes'] / 1e6:.1f}"]
        for entry in findings["builds"]
    ]
    photo = findings["photo"]
    times = []
    for method, network in (("encode", "vae_encoder"), ("decode", "vae_decoder")):
        load = sum(ms for engine, ms in findings["load_engine_ms"].items() if network in engine)
        ours, theirs = photo["accelerated"], photo["diffusers"][f"{method}_ms"]
        first, median = ours[f"first_{method}_ms"], ours[f"{method}_ms"]
        times.append([method, f"{load:.1f}", f"{first:.1f}", f"{theirs:.1f}", f"{median:.1f}", f"{theirs / median:.2f}x"])
    quality = [f"{float(photo['psnr_db'][name]):.2f}" for name in ("diffusers", "accelerated", "between")]
    tables = [
        Table("1. engines built", ["engine", "status", "s", "MB"], built, words=2),
        Table(
            f"2. new process: {photo['image']}, {photo['size']}, {findings['dtype']}, ms",
            ["", "load", "first call", "diffusers", "accelerated", "speed-up"],
            times,
        ),
        Table(
            "PSNR, dB", ["diffusers to the photo", "accelerated to the photo", "accelerated to diffusers"], [quality], words=0
        ),
    ]

    whole = findings["pipeline"]
    served = ", ".join(f"{name} {count}" for name, count in whole["calls"]["decode"].items())
    summary = (
        f"3. {whole['pipeline']} (tiny random transformer, {whole['steps']} steps, {whole['size']}): with acceleration "
        f"{whole['accelerated_ms']:.0f} ms, without {whole['diffusers_ms']:.0f} ms; same seed, PSNR between the images "
        f"{float(whole['psnr_db']):.1f} dB, largest difference {whole['largest_difference']:.1e}. "
        f"Decodes served so far: {served}."
    )
    pictures = f"pictures: {photo['picture']}, {whole['picture']}"
    return Group(*map(to_rich, tables), plain(findings["report_text"].rstrip()), plain(summary), plain(pictures))
