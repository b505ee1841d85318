"""``qwen-vae-accel bench``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_vae_accel.bench.harness import Effort, Harness, Row, make_trials, run_all
from qwen_vae_accel.bench.kernels import measure_kernels
from qwen_vae_accel.bench.machine import machine
from qwen_vae_accel.bench.methods import (
    CPU_SIZES,
    CUDA_SIZES,
    DIRECTIONS,
    SHORT,
    default_methods,
    method_names,
    parse_method,
    parse_sizes,
)
from qwen_vae_accel.bench.overhead import overhead
from qwen_vae_accel.bench.result import require_packages, write, write_json
from qwen_vae_accel.bench.vae_sheet import make_document, make_sheet
from qwen_vae_accel.cli import common, edge
from qwen_vae_accel.config import DTYPES, dtype_name
from qwen_vae_accel.errors import ConfigError
from qwen_vae_accel.loading import VAE_TYPES, load_vae, random_vae
from qwen_vae_accel.page.console import to_terminal
from qwen_vae_accel.terminal import stderr

Methods = Annotated[
    str | None,
    typer.Option(help="NAME or NAME:DTYPE, comma-separated, such as diffusers,eager,inductor:fp16. Default: all that run."),
]


def bench(
    vae: Annotated[Path | None, typer.Option(help="Folder of a VAE or pipeline. Default: full size, random weights.")] = None,
    vae_type: Annotated[
        str, typer.Option(help=f"Without --vae: which one has random weights, {' or '.join(VAE_TYPES)}.")
    ] = "qwen-image",
    sizes: Annotated[str | None, typer.Option(help="Names or WxH, comma-separated.")] = None,
    methods: Methods = None,
    task: Annotated[str, typer.Option(help="encode, decode or both.")] = "both",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of methods that name none. Default: bf16 on the GPU, fp32 on the CPU.")
    ] = None,
    device: common.Device = None,
    iters: Annotated[int | None, typer.Option(min=3, max=10**6, help="At most this many samples per trial.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="At most this many seconds of sampling per trial.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the JSON, Markdown and PNG.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of those files. Default: bench_DEVICE.")] = None,
    kernels: Annotated[
        str | None, typer.Option(metavar="WxH", help="Also time every kernel of the fused backend at this size.")
    ] = None,
    engine_dir: Annotated[Path | None, typer.Option(help="Keep built engines here for the next run.")] = None,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Measure methods x sizes x encode and decode: latency, spread, memory, error against float32."""

    def work() -> edge.Outcome:
        require_packages()
        where = common.parse_device(device)
        kind = DTYPES[dtype_name(dtype or ("bfloat16" if where.type == "cuda" else "float32"))]
        if task not in (*DIRECTIONS, "both"):
            raise ConfigError(f"task must be encode, decode or both, not {task!r}")
        tasks = DIRECTIONS if task == "both" else (task,)
        wanted = parse_sizes(common.split(sizes) or (CUDA_SIZES if where.type == "cuda" else CPU_SIZES))
        named = [parse_method(text, kind) for text in common.split(methods) or ()]
        template = (
            random_vae(kind=common.parse_vae_type(vae_type)) if vae is None else load_vae(vae, common.parse_device("cpu"))
        )
        named = named or [parse_method(text, kind) for text in default_methods(template, where, kind)]
        kernel_size = parse_sizes([kernels])[0] if kernels else None
        if seconds is not None and not math.isfinite(seconds):
            raise ConfigError(f"--seconds must be a finite number, not {seconds}")
        effort = Effort.default(where, iters, seconds)
        trials = make_trials(named, wanted, tasks)
        times = measure_kernels(template, where, kind, kernel_size) if kernel_size else None
        command, facts, label = common.command_line(), machine(where), name or f"bench_{where.type}"
        settings = {
            "dtype": SHORT[kind],
            "weights": f"{vae_type}: random, rounded to bfloat16, full size, seed 0" if vae is None else vae.name,
            "methods": [method.label for method in named],
            "sizes": [str(size) for size in wanted],
            "tasks": list(tasks),
            "iterations": effort.iterations,
            "seconds": effort.seconds,
            "warmup": effort.warmup,
        }

        def made(rows: Sequence[Row], plugin: dict[str, float | int] | None) -> dict[str, Any]:
            complete = {"complete": len(rows) == len(trials)}
            return make_document(rows, facts, settings | complete, plugin, command, times)

        with tempfile.TemporaryDirectory(prefix="qwen-vae-accel-bench-") as temporary:
            harness = Harness(template, where, effort, engine_dir or Path(temporary))
            with common.progress(len(trials), "bench") as update:
                found: list[Row] = []

                def done(row: Row) -> None:
                    result = f"{row.median_ms:.2f} ms" if row.median_ms is not None else f"failed: {(row.error or '')[:160]}"
                    update(f"{row.task} {row.size}", True)
                    stderr.print(f"{row.size!s:>10} {row.task} {row.label:<24} {result}")
                    found.append(row)
                    if output is not None:  # whatever ends the run, what was measured is there
                        common.written(lambda: write_json(made(found, None), output, label), output)

                rows = run_all(harness, trials, done)
        document = made(rows, overhead(where))
        sheet, printed = make_sheet(document), dict(document)
        if output is not None:
            printed["files"] = [str(path) for path in common.written(lambda: write(document, sheet, output, label), output)]
        return edge.Outcome(printed, to_terminal(sheet), len(rows) == len(trials) and not any(row.error for row in rows))

    edge.run(as_json, verbose, work)


bench.__doc__ = f"{bench.__doc__}\n\n    Methods: {', '.join(method_names())}.\n"
