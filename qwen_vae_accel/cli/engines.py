"""``qwen-vae-accel build``, ``list``, ``prune``, ``adopt``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Group, RenderableType
from rich.table import Table

from qwen_vae_accel.backends.base import EngineBackend
from qwen_vae_accel.backends.tensorrt import BuildSettings, TensorRTBackend, parse_capabilities
from qwen_vae_accel.cli import common, edge
from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.engines import networkcheck
from qwen_vae_accel.engines.builder import Builder, BuildResult
from qwen_vae_accel.engines.inspect import EngineStatus, Inspector
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import AccelError, ConfigError, EngineError
from qwen_vae_accel.loading import load_vae
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.sizes import LATENT_SCALE
from qwen_vae_accel.terminal import plain, stderr

_Directory = Annotated[Path, typer.Option("--engine-dir", help="Folder of the engines.")]


def _source(vae: Path, device: torch.device) -> ModelSource:
    return ModelSource(load_vae(vae, device))


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column in ("MB", "scratch MB", "s", "PSNR dB") else "left", overflow="fold")
    return table


def build(
    vae: common.Vae,
    task: common.Task = None,
    backend: common.Backend = None,
    engine_dir: common.EngineDir = None,
    sizes: common.Sizes = None,
    multi_profile: common.MultiProfile = None,
    dtype: common.Dtype = None,
    encode_dtype: common.EncodeDtype = None,
    decode_dtype: common.DecodeDtype = None,
    method: common.Method = None,
    device: common.Device = None,
    config: common.ConfigFile = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            help="Build TensorRT-RTX engines for GPUs of this compute capability, such as 8.9 or 8.6,8.9,12.0; needs no GPU. "
            "The network that TensorRT gets is checked here, on the CPU (minutes for large sizes); the engines are checked "
            "where they are first loaded."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="A setting of the TensorRT builder, NAME=VALUE, such as optimization_level=5. May be repeated."),
    ] = None,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Build the engines of a plan. Those that are current are kept; a failure does not stop the others."""

    def work() -> edge.Outcome:
        settings = common.resolve(
            config,
            task=task,
            backend=backend,
            engine_dir=engine_dir,
            sizes=sizes,
            multi_profile=multi_profile,
            dtype=dtype,
            encode_dtype=encode_dtype,
            decode_dtype=decode_dtype,
        )
        given = _tensorrt(settings, compute_capability, setting)
        target = given.target_environment() if given is not None and given.targets else None
        where = common.parse_device("cpu" if target is not None and device is None else device)
        builder = Builder(settings, _source(vae, where), where, given, target, common.parse_methods(method))
        with common.progress(len(builder.wanted), "build") as update, _builder_steps(builder.backend, update):

            def told(wanted: Wanted, result: BuildResult | None) -> None:
                if result is None:
                    seconds = builder.estimate(wanted)
                    update(f"{wanted.path}{f' (about {seconds:.0f} s if built)' if seconds else ''}", False)
                    return
                update(wanted.path, True)
                reason = f": {result.reason}" if result.reason else ""
                text = f"{result.status:>8} {wanted.path} {result.seconds:.1f} s{reason}"
                stderr.print(text, soft_wrap=True)

            results = builder.run(told)
        table = _table("engine", "status", "s", "MB", "PSNR dB", "reason")
        for result in results:
            record = result.record
            psnr = ""
            if record is not None:
                networks = networkcheck.of_record(record)
                checks = (v for name, v in record.verification.items() if v not in networks.values())
                psnr = ", ".join([*(f"{v.psnr_db:.1f}" for v in checks), *map(networkcheck.text, networks.values())])
            size = f"{record.size / 1e6:.1f}" if record else ""
            table.add_row(result.path, result.status, f"{result.seconds:.1f}", size, psnr, plain(result.reason))
        document = {
            "engine_dir": str(builder.store.root),
            "backend": builder.backend.name,
            "engines": [result.as_dict() for result in results],
        }
        return edge.Outcome(document, table, all(result.status != "failed" for result in results))

    edge.run(as_json, verbose, work)


def _builder_steps(backend: EngineBackend, update: Callable[[str, bool], None]) -> AbstractContextManager[None]:
    """Show the steps of TensorRT's builder, which takes minutes on a data-centre GPU; other compilers do not tell."""
    if not isinstance(backend, TensorRTBackend):
        return nullcontext()
    return backend.telling(lambda phase, step, count: update(f"{phase} {step}/{count}", False))


def _tensorrt(config: AccelConfig, capabilities: str | None, settings: list[str] | None) -> TensorRTBackend | None:
    """The TensorRT backend that the options ask for; None where none of them is given."""
    if capabilities is None and not settings:
        return None
    if config.backend not in ("auto", "tensorrt"):
        raise ConfigError(f"--compute-capability and --setting are TensorRT's, not those of backend {config.backend!r}")
    build_settings = BuildSettings.from_text(settings or ())
    return TensorRTBackend(build_settings, parse_capabilities(capabilities) if capabilities is not None else ())


def list_engines(
    engine_dir: _Directory,
    vae: common.OptionalVae = None,
    device: common.Device = None,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """List the engines: profiles, memory, self-checks, and why one would not be run here. Exit code 1 if any would not."""

    def work() -> edge.Outcome:
        where = common.parse_device(device)
        inspector = Inspector(engine_dir, where, None if vae is None else _source(vae, where))
        found = inspector.survey()
        document = {
            "engine_dir": str(engine_dir),
            "weights_compared": vae is not None,
            "engines": [status.as_dict() for status in found],
        }
        return edge.Outcome(document, _survey_view(found, vae is not None), all(status.current for status in found))

    edge.run(as_json, verbose, work)


def _survey_view(found: list[EngineStatus], weights: bool) -> RenderableType:
    if not found:
        return plain("no engines")
    table = _table("engine", "profile", "sizes", "dtype", "backend", "MB", "scratch MB", "PSNR dB", "runs here")
    for status in found:
        record = status.record
        size = f"{status.size / 1e6:.1f}"
        verdict = plain("yes") if status.current else plain("no: " + "; ".join(status.reasons), style="red")
        if record is None:
            table.add_row(status.path, "", "", "", "", size, "", "", verdict)
            continue
        for index, profile in enumerate(record.profiles):
            check, network = status.checks.get(profile.name), status.networks.get(profile.name)
            head = (status.path, record.dtype, record.backend, size, verdict) if index == 0 else ("",) * 5
            table.add_row(
                head[0],
                profile.name,
                str(profile.optimum) if record.key.is_static else f"{profile.minimum}..{profile.optimum}..{profile.maximum}",
                *head[1:4],
                "not known" if record.scratch is None else f"{record.scratch[index] / 1e6:.1f}",
                f"{check.psnr_db:.1f}" if check else networkcheck.text(network) if network else "not checked",
                head[4],
            )
    note = "" if weights else "Weights were not compared; --vae does that."
    return Group(table, plain(note)) if note else table


def prune(
    engine_dir: _Directory,
    vae: common.OptionalVae = None,
    config: common.ConfigFile = None,
    task: common.Task = None,
    sizes: common.Sizes = None,
    multi_profile: common.MultiProfile = None,
    method: common.Method = None,
    device: common.Device = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Without it, only show what would be removed.")] = False,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Remove leftovers of killed builds and engines that would not be run here; with a plan, also those not in it.

    A plan is given by --config, --sizes or --multi-profile; --method makes it one of one network, as for build. Engine files
    without a record are never removed.
    """

    def work() -> edge.Outcome:
        where = common.parse_device(device)
        source = None if vae is None else _source(vae, where)
        inspector = Inspector(engine_dir, where, source)
        planned = None
        if config is not None or sizes is not None or multi_profile is not None:
            settings = common.resolve(config, task=task, sizes=sizes, multi_profile=multi_profile)
            planned = _planned_paths(settings, common.parse_methods(method), inspector, source)
        removals = inspector.prunable(planned)
        failures, kept = [], {}
        for removal in removals if yes else ():
            try:
                if why := inspector.remove(removal):
                    kept[removal.path] = why
            except AccelError as error:
                failures.append(str(error))
        removals = [removal for removal in removals if removal.path not in kept]
        table = _table("file", "MB", "reason")
        for removal in removals:
            table.add_row(str(removal.path), f"{removal.size / 1e6:.1f}", plain(removal.reason))
        done = "removed" if yes else "would be removed; --yes removes them"
        note = (
            f"{len(removals)} files, {sum(r.size for r in removals) / 1e6:.1f} MB {done}" if removals else "nothing to remove"
        )
        document = {
            "engine_dir": str(engine_dir),
            "removed": yes,
            "files": [removal.as_dict() for removal in removals],
            "kept": [{"path": str(path), "reason": why} for path, why in kept.items()],
            "failures": failures,
        }
        notes = [plain(note), *(plain(f"{path} is kept: {why}") for path, why in kept.items())]
        parts = ([table] if removals else []) + [*notes, *(plain(text, style="red") for text in failures)]
        return edge.Outcome(document, Group(*parts), not failures)

    edge.run(as_json, verbose, work)


def _planned_paths(
    settings: AccelConfig, methods: tuple[str, ...], inspector: Inspector, source: ModelSource | None
) -> set[str]:
    """The engines of the directory that the plan has, as the directory has it."""
    manifest = inspector.store.manifest()
    scale, multiple = (LATENT_SCALE, 1) if source is None else (source.topology.scale, source.topology.multiple)
    return {
        key.stem + suffix
        for suffix in {Path(path).suffix for path in manifest.engines}
        for method in methods
        for key in settings.plan(scale, multiple, manifest.held(method, suffix)).engines(method)
    }


def adopt(
    vae: common.Vae,
    engine_dir: _Directory,
    trust: Annotated[
        bool, typer.Option("--trust", help="You trust whoever made the files: loading them runs their code.")
    ] = False,
    backend: common.Backend = None,
    sizes: common.Sizes = None,
    multi_profile: common.MultiProfile = None,
    dtype: common.Dtype = None,
    encode_dtype: common.EncodeDtype = None,
    decode_dtype: common.DecodeDtype = None,
    device: common.Device = None,
    config: common.ConfigFile = None,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Take in engine files that have no record: each must pass the self-check against the VAE first."""

    def work() -> edge.Outcome:
        where = common.parse_device(device)
        settings = common.resolve(
            config,
            backend=backend,
            sizes=sizes,
            multi_profile=multi_profile,
            dtype=dtype,
            encode_dtype=encode_dtype,
            decode_dtype=decode_dtype,
        )
        names = Inspector(engine_dir, where).unknown()
        if names and not trust:
            raise EngineError(
                f"{len(names)} engine files have no record: {', '.join(names)}. Loading an engine runs the code in it, so "
                "nothing was loaded. If you trust whoever made them, run this again with --trust."
            )
        engines: list[dict[str, object]] = []
        table = _table("engine", "result", "PSNR dB", "reason")
        if names:
            inspector = Inspector(engine_dir, where, _source(vae, where))
            with common.progress(len(names), "adopt") as update:
                for name in names:
                    update(name, False)
                    try:
                        record = inspector.adopt(name, settings)
                    except AccelError as error:
                        engines.append({"path": name, "adopted": False, "reason": str(error)})
                        table.add_row(name, plain("refused", style="red"), "", plain(str(error)))
                    else:
                        checks = record.verification.values()
                        note = inspector.surprise(record, settings)
                        entry = {"path": name, "adopted": True, "psnr_db": [str(c.psnr_db) for c in checks]}
                        engines.append({**entry, "note": note} if note else entry)
                        table.add_row(name, "adopted", ", ".join(f"{c.psnr_db:.1f}" for c in checks), plain(note))
                    update(name, True)
        view: RenderableType = table if names else plain("every engine file has a record; there is nothing to adopt")
        good = all(entry["adopted"] for entry in engines)
        return edge.Outcome({"engine_dir": str(engine_dir), "engines": engines}, view, good)

    edge.run(as_json, verbose, work)
