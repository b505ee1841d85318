"""``qwen-vae-accel config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from qwen_vae_accel import kernels
from qwen_vae_accel.backends.base import EngineBackend, Environment, Job
from qwen_vae_accel.backends.registry import direct_backends, engine_backends
from qwen_vae_accel.cli import common, edge
from qwen_vae_accel.config import ENGINE_BACKENDS, AccelConfig
from qwen_vae_accel.kernels.limits import mib
from qwen_vae_accel.loading import load_vae, published_vae
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.topology import METHODS
from qwen_vae_accel.plan import Choice, Plan
from qwen_vae_accel.sizes import Size, parse_size
from qwen_vae_accel.terminal import plain


def config(
    task: common.Task = None,
    backend: common.Backend = None,
    engine_dir: common.EngineDir = None,
    sizes: common.Sizes = None,
    multi_profile: common.MultiProfile = None,
    dtype: common.Dtype = None,
    encode_dtype: common.EncodeDtype = None,
    decode_dtype: common.DecodeDtype = None,
    memory_limit: common.MemoryLimit = None,
    size: Annotated[
        str | None, typer.Option(help="WxH or a name: print who serves it, in how many bands and in how much memory.")
    ] = None,
    device: common.Device = None,
    vae: common.OptionalVae = None,
    file: common.ConfigFile = None,
    as_json: common.Json = False,
    verbose: common.Verbose = False,
) -> None:
    """Print the effective configuration, its plan, and which backends can run here."""

    def work() -> edge.Outcome:
        settings = common.resolve(
            file,
            task=task,
            backend=backend,
            engine_dir=engine_dir,
            sizes=sizes,
            multi_profile=multi_profile,
            dtype=dtype,
            encode_dtype=encode_dtype,
            decode_dtype=decode_dtype,
            memory_limit=memory_limit,
        )
        where = common.parse_device(device)
        model = published_vae() if vae is None else load_vae(vae, common.parse_device("cpu"))
        source = ModelSource(model)
        stored = next(model.parameters()).dtype
        environment = Environment.detect(where)
        jobs = [Job.of(settings, method, source.topology, where, stored, environment) for method in settings.methods]
        backends: list[dict[str, Any]] = []
        for other in (*engine_backends(), *direct_backends()):
            reasons = list(dict.fromkeys(text for job in jobs for text in other.reasons(environment, job)))
            backends.append({"name": other.name, "engines": isinstance(other, EngineBackend), "reasons": reasons})
        plan = settings.plan(source.topology.scale, source.topology.multiple)
        engines = [
            {
                "method": method,
                "stem": key.stem,
                "profiles": [
                    {"name": p.name, "min": str(p.minimum), "opt": str(p.optimum), "max": str(p.maximum)} for p in key.profiles
                ],
            }
            for method in METHODS
            for key in plan.engines(method)
        ]
        document = {
            "config": settings.as_dict(),
            "on_miss": settings.miss_policy,
            "methods": list(settings.methods),
            "dtypes": {job.method: str(job.dtype).removeprefix("torch.") for job in jobs},
            "plan": {"multi_profile": plan.multi_profile, "open": plan.open, "engines": engines},
            "backends": backends,
            "environment": environment.describe(),
        }
        if size is not None:
            image = parse_size(size).floor(source.topology.scale)
            calls = [_call(settings, plan, job, image, environment) for job in jobs]
            document["size"] = {"size": str(image), "calls": calls}
        return edge.Outcome(document, _view(document))

    edge.run(as_json, verbose, work)


def _call(settings: AccelConfig, plan: Plan, job: Job, size: Size, environment: Environment) -> dict[str, Any]:
    """Who serves a call of one image, and what that takes."""
    served: dict[str, Any] = {"method": job.method, "backend": None, "engine": None, "refused": {}, "memory": None}
    for backend in engine_backends() if settings.engine_dir is not None and not job.float8 else ():
        choice = plan.select(job.method, size)
        if settings.backend in ("auto", backend.name) and isinstance(choice, Choice) and not backend.reasons(environment, job):
            path = choice.key.stem + backend.suffix
            if (Path(str(settings.engine_dir)) / path).is_file():
                return {**served, "backend": backend.name, "engine": path}
    for direct in direct_backends():
        if settings.backend == direct.name or settings.backend in ("auto", *ENGINE_BACKENDS):
            reasons = direct.reasons(environment, job)
            if not reasons:
                planned = direct.plan(job, size)
                return {**served, "backend": direct.name, "memory": None if planned is None else _memory(planned)}
            served["refused"][direct.name] = reasons
    return served


def _memory(plan: kernels.Plan) -> dict[str, Any]:
    nbytes = [f"{part}_bytes" for part in ("limit", "scratch", "output", "held", "peak")]
    return {name: getattr(plan, name) for name in ("bands", "reason", "fits", *nbytes, "flops", "cost")}


def _size_view(document: dict[str, Any]) -> list[RenderableType]:
    """Memory is planned, time is not: what a kernel takes is only known where it was measured."""
    if "size" not in document:
        return []
    table = Table(title=f"one image of {document['size']['size']}", title_justify="left")
    for column in ("method", "served by", "bands", "scratch", "output", "graph's copies", "peak above weights", "operations"):
        table.add_column(column, justify="left" if column in ("method", "served by") else "right", overflow="fold")
    notes = []
    for call in document["size"]["calls"]:
        memory = call["memory"]
        name = call["engine"] or call["backend"] or "nobody"
        if memory is None:
            table.add_row(call["method"], plain(name), "not planned")
            continue
        sizes = [mib(memory[f"{part}_bytes"]) for part in ("scratch", "output", "held", "peak")]
        operations = f"{memory['flops'] / 1e12:.2f} T" + (f", {memory['cost']:.2f} x one piece" if memory["bands"] > 1 else "")
        table.add_row(call["method"], name, str(memory["bands"]), *sizes, operations)
        if memory["reason"]:
            notes.append(f"{call['method']} runs in bands: {memory['reason']}.")
        if not memory["fits"]:
            notes.append(f"{call['method']} takes more than the limit, {mib(memory['limit_bytes'])}: less would cost too much.")
    return [table, *(plain(note) for note in notes)]


def _view(document: dict[str, Any]) -> Group:
    fields = Table(title="configuration", title_justify="left")
    for column in ("field", "value"):
        fields.add_column(column, overflow="fold")
    for name, value in document["config"].items():
        shown = document["on_miss"] + " (default)" if name == "on_miss" and value is None else value
        fields.add_row(name, "" if shown is None else str(shown))
    plan = Table(title="plan: engines", title_justify="left")
    for column in ("engine", "sizes"):
        plan.add_column(column, overflow="fold")
    for engine in document["plan"]["engines"]:
        sizes = [p["opt"] if p["min"] == p["max"] else f"{p['min']}..{p['opt']}..{p['max']}" for p in engine["profiles"]]
        plan.add_row(engine["stem"], "\n".join(sizes))
    backends = Table(title="backends, in the order of auto", title_justify="left")
    for column in ("backend", "engines", "can run here"):
        backends.add_column(column, overflow="fold")
    for backend in document["backends"]:
        reasons = "; ".join(backend["reasons"])
        backends.add_row(backend["name"], "yes" if backend["engines"] else "no", plain(f"no: {reasons}" if reasons else "yes"))
    note = "Any other size gets an engine of its own when it is requested." if document["plan"]["open"] else ""
    return Group(fields, plan, plain(note), backends, *_size_view(document))
