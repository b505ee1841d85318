"""``qwen-vae-accel tune``: the fastest configurations of the fused kernels on this GPU."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Group
from rich.table import Table

from qwen_vae_accel.backends.base import Environment
from qwen_vae_accel.cli import common, edge
from qwen_vae_accel.config import DTYPES, dtype_name
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.errors import BackendUnavailableError, ConfigError, EngineError
from qwen_vae_accel.kernels import device_reasons, network_reasons
from qwen_vae_accel.kernels.gpu import describe_gpu, runs_sm90
from qwen_vae_accel.kernels.network import PUBLISHED, describe
from qwen_vae_accel.kernels.reasons import DTYPES as KERNEL_DTYPES
from qwen_vae_accel.model.topology import METHODS, Topology
from qwen_vae_accel.progress import progress_bar
from qwen_vae_accel.sizes import Size, parse_size
from qwen_vae_accel.terminal import plain

_SIZES = ("512x512", "1024x1024", "1664x928")


def tune(
    engine_dir: Annotated[Path, typer.Option("--engine-dir", help="Folder of the engines; the result is kept there.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16, to measure with; the result serves both.")] = "bfloat16",
    sizes: Annotated[
        str, typer.Option(help="Names or WxH, comma-separated: image sizes to measure at.", show_default=True)
    ] = ",".join(_SIZES),
    vae_type: common.VaeType = "qwen-image",
    device: common.Device = None,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Measure the fused kernels' configurations on this GPU and keep the fastest. Takes minutes; needs no weights.

    What was found before for kernels of the other VAE stays.
    """

    def work() -> edge.Outcome:
        kind = DTYPES[dtype_name(dtype)]
        if kind not in KERNEL_DTYPES:
            raise ConfigError(f"dtype must be bfloat16 or float16, not {dtype}")
        wanted = tuple(map(parse_size, common.split(sizes) or _SIZES))
        topology = PUBLISHED[common.parse_vae_type(vae_type)]
        where = common.parse_device(device)
        capability = Environment.detect(where).capability
        reasons = device_reasons(where, kind, capability)
        if not reasons:
            sm90 = runs_sm90(capability)
            networks = (describe(topology, method) for method in METHODS)
            reasons = [reason for network in networks for reason in network_reasons(network, sm90=sm90)]
        if reasons:
            raise BackendUnavailableError("fused", reasons)
        _require_writable(engine_dir)
        return _tune(engine_dir, kind, wanted, topology, where)

    edge.run(as_json, verbose, work)


def _require_writable(folder: Path) -> None:
    """Before minutes of measuring."""
    try:
        root = EngineStore(folder).root
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root, prefix=".tuning_"):
            pass
    except OSError as error:
        raise EngineError(f"cannot write in the engine directory {folder}: {error}") from error


def _tune(
    folder: Path, dtype: torch.dtype, sizes: tuple[Size, ...], topology: Topology, device: torch.device
) -> edge.Outcome:  # fmt: skip
    from qwen_vae_accel.kernels.tuning.measure import tune as measure
    from qwen_vae_accel.kernels.tuning.stored import Machine, TunedGpu, read_tuned, write_tuned

    machine = Machine.of(device)
    before = read_tuned(folder, machine, describe_gpu(device))
    with progress_bar(transient=False) as update:
        kernels = measure(dtype, device, [(size.height, size.width) for size in sizes], topology, update)
    tuned = TunedGpu(
        machine=machine, torch=str(torch.__version__), dtype=str(dtype).removeprefix("torch."),
        sizes=tuple(map(str, sizes)), made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kernels=tuple(kernels),
    )  # fmt: skip
    try:
        kept = tuned.beside(before)
        path = write_tuned(folder, kept)
    except OSError as error:
        raise EngineError(f"cannot write in the engine directory {folder}: {error}") from error
    return edge.Outcome({"file": os.fspath(path), **kept.as_dict()}, _view(tuned, path))


def _view(tuned: Any, path: Path) -> Group:
    table = Table()
    for column in ("kernel", "shipped ms", "tuned ms", "configurations"):
        table.add_column(column, justify="right" if column.endswith("ms") else "left", overflow="fold")
    for kernel in tuned.kernels:
        table.add_row(
            str(kernel.key), f"{kernel.shipped_milliseconds:.3f}", f"{kernel.milliseconds:.3f}",
            plain("\n".join(map(str, kernel.choices)) or "as shipped"),
        )  # fmt: skip
    shipped = sum(kernel.shipped_milliseconds for kernel in tuned.kernels)
    chosen = sum(kernel.milliseconds for kernel in tuned.kernels)
    note = f"{chosen:.2f} ms where the shipped configurations take {shipped:.2f}: each kernel once at each of its sizes"
    return Group(table, plain(f"{note}\nkept in {path}"))
