"""``qwen-vae-accel verify``: engines of a folder, or a backend that needs none, against the exact network in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from qwen_vae_accel.backends.base import DirectBackend, Environment, Job
from qwen_vae_accel.backends.registry import get_backend
from qwen_vae_accel.cli import common, edge
from qwen_vae_accel.config import FLOAT8, AccelConfig
from qwen_vae_accel.engines import networkcheck, selfcheck
from qwen_vae_accel.engines.inspect import Inspector
from qwen_vae_accel.engines.manifest import Verification
from qwen_vae_accel.errors import AccelError, BackendUnavailableError, ConfigError
from qwen_vae_accel.loading import load_vae
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.sizes import parse_size
from qwen_vae_accel.terminal import plain

_SIZE = "512x512"


def verify(
    vae: common.Vae,
    engine_dir: common.EngineDir = None,
    backend: common.Backend = None,
    task: common.Task = None,
    sizes: common.Sizes = None,
    dtype: common.Dtype = None,
    encode_dtype: common.EncodeDtype = None,
    decode_dtype: common.DecodeDtype = None,
    device: common.Device = None,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Compare with the exact network in float64: PSNR, and errors next to their limits. Exit code 1 if any result is bad.

    With --engine-dir, verify every engine there: the files are hashed again, and each engine runs at its own sizes. It is bad
    too if others than you and root can change the engines, because loading one runs the code in it. With --backend fused
    or eager, verify the networks of that backend in the dtypes given, float8 too (--engine-dir then keeps its calibration).
    """

    def work() -> edge.Outcome:
        where = common.parse_device(device)
        if backend is None:
            given = {"sizes": sizes, "dtype": dtype, "encode-dtype": encode_dtype, "decode-dtype": decode_dtype, "task": task}
            named = [f"--{name}" for name, value in given.items() if value is not None]
            if named:
                raise ConfigError(f"{', '.join(named)} are for --backend; engines have their own sizes and dtypes")
            if engine_dir is None:
                raise ConfigError("nothing to verify: give --engine-dir, or --backend fused or eager")
            return _verify_engines(vae, engine_dir, where)
        config = common.resolve(
            None, backend=backend, engine_dir=engine_dir, task=task or "i2i", dtype=dtype, encode_dtype=encode_dtype,
            decode_dtype=decode_dtype,
        )  # fmt: skip
        return _verify_direct(vae, config, common.split(sizes) or (_SIZE,), where)

    edge.run(as_json, verbose, work)


def _table(first: str) -> Table:
    table = Table()
    for column in (first, "size", "PSNR dB", "relative error", "allowed", "worst line", "allowed", "result"):
        table.add_column(column, justify="right" if column == "PSNR dB" else "left", overflow="fold")
    return table


def _add_row(table: Table, name: str, size: object, result: Verification) -> None:
    verdict = "good" if result.passed else plain("bad", style="red")
    numbers = result.relative_error, result.relative_limit, result.line_error, result.line_limit
    errors = (f"{number:.1e}" for number in numbers)
    table.add_row(name, str(size), f"{result.psnr_db:.1f}", *errors, verdict)


def _verify_engines(vae: Path, engine_dir: Path, device: torch.device) -> edge.Outcome:
    inspector = Inspector(engine_dir, device, ModelSource(load_vae(vae, device)))
    writers = inspector.writers()  # before self-checks are recorded, which writes the manifest anew
    found = inspector.survey()
    table = _table("engine")
    engines = []
    with common.progress(len(found), "verify") as update:
        for status in found:
            update(status.path, False)
            entry: dict[str, object] = {"path": status.path, "good": False, "reasons": [], "checks": {}}
            # A self-check that failed before is no reason not to run it again.
            reasons = [text for text in status.reasons if not text.startswith("self-check")]
            try:
                results = [] if reasons else list(inspector.verify(status))
            except AccelError as error:
                reasons, results = [str(error)], []
            entry["checks"] = {profile.name: result.to_json() for profile, result in results}
            entry["reasons"] = reasons
            entry["good"] = not reasons and all(result.passed for _, result in results)
            engines.append(entry)
            for profile, result in results:
                _add_row(table, status.path, profile.optimum, result)
            entry["networks"] = {name: networkcheck.text(result) for name, result in status.networks.items()}
            if not results:
                for name, result in status.networks.items():
                    table.add_row(f"{status.path} {name}", "", "", "", "", networkcheck.text(result))
            if reasons:
                table.add_row(status.path, *[""] * 6, plain("refused: " + "; ".join(reasons), style="red"))
            update(status.path, True)
    said = [plain(f"others may change what is run from here: {text}", style="red") for text in writers]
    document = {"engine_dir": str(engine_dir), "engines": engines, "writers": writers}
    good = not writers and all(entry["good"] for entry in engines)
    return edge.Outcome(document, Group(table if found else plain("no engines"), *said), good)


def _verify_direct(vae: Path, config: AccelConfig, sizes: tuple[str, ...], device: torch.device) -> edge.Outcome:
    chosen = get_backend(config.backend) if config.backend != "auto" else None
    if not isinstance(chosen, DirectBackend):
        raise ConfigError(
            f"--backend is for fused and eager, which have no engines, not {config.backend}; leave it out to verify engines"
        )
    source = ModelSource(load_vae(vae, device), config.engine_dir)
    environment = Environment.detect(device)
    machine = selfcheck.machine_id(environment)
    stored = {method: source.placement(method).dtype for method in config.methods}
    jobs = [Job.of(config, method, source.topology, device, dtype, environment) for method, dtype in stored.items()]
    reasons = [text for job in jobs for text in chosen.reasons(environment, job)]
    if reasons:
        raise BackendUnavailableError(chosen.name, list(dict.fromkeys(reasons)))
    table = _table("network")
    networks: list[dict[str, Any]] = []
    with common.progress(len(jobs) * len(sizes), "verify") as update:
        for job in jobs:
            program = chosen.program(source, job)
            kind = FLOAT8 if job.float8 else str(job.dtype).removeprefix("torch.")
            for size in map(parse_size, sizes):
                update(f"{job.method} {size}", False)
                result = selfcheck.check(source, job, program, size, 0, machine)
                networks.append({"method": job.method, "dtype": kind, "size": str(size), **result.to_json()})
                _add_row(table, f"{job.method} {kind}", size, result)
                update(f"{job.method} {size}", True)
    good = all(network["passed"] for network in networks)
    return edge.Outcome({"backend": chosen.name, "networks": networks}, table, good)
