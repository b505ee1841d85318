"""``qwen-vae-accel serve-bench``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qwen_vae_accel.backends.base import EngineBackend
from qwen_vae_accel.backends.registry import get_backend
from qwen_vae_accel.bench.machine import machine
from qwen_vae_accel.bench.methods import SHORT, parse_sizes
from qwen_vae_accel.bench.result import require_packages, write
from qwen_vae_accel.bench.serve.measurement import Measurement, postprocessing
from qwen_vae_accel.bench.serve.pipelines import I2I_SIZES, STEPS, T2I_SIZES, Pipelines
from qwen_vae_accel.bench.serve.request_sheet import make_document, make_sheet
from qwen_vae_accel.cli import common, edge
from qwen_vae_accel.config import TASKS, AccelConfig
from qwen_vae_accel.errors import ConfigError
from qwen_vae_accel.page.console import to_terminal
from qwen_vae_accel.sizes import Size, parse_size
from qwen_vae_accel.terminal import stderr

_POSTPROCESS_SIZE = Size(1328, 1328)
_POSTPROCESS_REPEATS = 25


def _sizes(text: str | None, task: str) -> list[Size]:
    texts = common.split(text)
    if texts is None:
        return list(T2I_SIZES if task == "t2i" else I2I_SIZES)
    return parse_sizes(texts) if task == "t2i" else list(dict.fromkeys(map(parse_size, texts)))


def serve_bench(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a pipeline or VAE. Default: a full-size VAE with random weights.")
    ] = None,
    transformer: Annotated[
        str | None,
        typer.Option(
            help="full (20 B) or tiny, random weights. Default: the model's own; else full on a GPU, tiny on the CPU."
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="t2i, i2i or both.")] = "both",
    sizes: Annotated[
        str | None, typer.Option(help="Names or WxH, comma-separated; of the input images for i2i. Default: the guide's.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=10**6, help="Requests per size after the first.")] = 3,
    backend: Annotated[str, typer.Option(help="Backend of the accelerated pipeline.")] = "auto",
    engine_dir: Annotated[Path | None, typer.Option(help="Folder of the engines; missing ones are built first.")] = None,
    offload_reference: Annotated[
        bool, typer.Option("--offload-reference", help="Keep the VAE's own weights in CPU memory while accelerated.")
    ] = False,
    device: common.Device = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the JSON, Markdown and PNG.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of those files. Default: serve_DEVICE.")] = None,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Measure whole requests, plain and accelerated: denoising, encode, decode, post-processing, first request, memory."""

    def work() -> edge.Outcome:
        if output is not None:
            require_packages()
        if task not in (*TASKS, "both"):
            raise ConfigError(f"task must be t2i, i2i or both, not {task!r}")
        chosen = TASKS if task == "both" else (task,)
        wanted = {kind: _sizes(sizes, kind) for kind in chosen}
        AccelConfig(backend=backend)
        where = common.parse_device(device)
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        kind = transformer
        if kind is None and (model is None or not os.path.isdir(model / "transformer")):
            kind = "full" if where.type == "cuda" else "tiny"
        with common.progress(2 * sum(map(len, wanted.values())) + 1, "models") as update:

            def told(line: str) -> None:
                update(line.split("  ")[0], True)
                stderr.print(line)

            pipelines = Pipelines(model, kind, where, dtype)
            with tempfile.TemporaryDirectory(prefix="qwen-vae-accel-serve-") as temporary:
                engines = str(engine_dir or temporary) if _needs_engines(backend, engine_dir) else None
                measurement = Measurement(pipelines, repeats, backend, engines, told, offload_reference)
                rows, memory = measurement.run(wanted)
            update("post-processing", False)
            alone = postprocessing(_POSTPROCESS_SIZE, where, dtype, _POSTPROCESS_REPEATS)
            update("post-processing", True)
        weights = "random weights" if kind is not None else "weights of the model"
        settings: dict[str, Any] = {
            "backend": backend,
            "dtype": SHORT[dtype],
            "weights": "VAE of full size with random weights" if model is None else f"VAE {model.resolve().name}",
            "transformer": f"{_count(pipelines.parameters)} parameters, {weights}",
            "tasks": list(chosen),
            "sizes": {one: [str(size) for size in shapes] for one, shapes in wanted.items()},
            "steps": {one: STEPS[one] for one in chosen},
            "repeats": repeats,
            "offload_reference": offload_reference,
        }
        command = common.command_line()
        document = make_document(rows, memory, alone, machine(where), settings, command)
        sheet, printed = make_sheet(document), dict(document)
        if output is not None:
            label = name or f"serve_{where.type}"
            printed["files"] = [str(path) for path in common.written(lambda: write(document, sheet, output, label), output)]
        return edge.Outcome(printed, to_terminal(sheet), not any(row["error"] for row in rows))

    edge.run(as_json, verbose, work)


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _needs_engines(backend: str, engine_dir: Path | None) -> bool:
    return engine_dir is not None or (backend != "auto" and isinstance(get_backend(backend), EngineBackend))
