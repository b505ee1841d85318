"""``qwen-vae-accel config``."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from qwen_vae_accel.backends.base import EngineBackend, Environment, Job
from qwen_vae_accel.backends.registry import direct_backends, engine_backends
from qwen_vae_accel.cli import common, edge
from qwen_vae_accel.loading import load_vae, published_vae
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.topology import METHODS
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
        return edge.Outcome(document, _view(document))

    edge.run(as_json, verbose, work)


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
    return Group(fields, plan, plain(note), backends)
