"""What the backend decides from facts alone, and the whole plugin over a STAND-IN for TensorRT (``standin.py``)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from qwen_vae_accel import AccelConfig, accelerate
from qwen_vae_accel.backends.base import Environment, Job
from qwen_vae_accel.backends.registry import engine_backends, get_backend
from qwen_vae_accel.backends.tensorrt import BuildSettings, TensorRTBackend, parse_capabilities
from qwen_vae_accel.backends.tensorrt import flavour as flavours
from qwen_vae_accel.backends.tensorrt.build import input_shapes
from qwen_vae_accel.backends.tensorrt.flavour import Flavour
from qwen_vae_accel.engines.inspect import Inspector
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import BackendUnavailableError, BuildError, ConfigError, EngineMissingError, EngineRefusedError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.plan import EngineKey
from tests.helpers import CPU, Reference, decoded, moments, picture, randn
from tests.tensorrt.conftest import job_of, key_of, missing_rtx
from tests.tensorrt.standin import StandIn, engine_file

if TYPE_CHECKING:
    from tests.fixtures_cli import Cli

pytest_plugins = ["tests.fixtures_cli"]

CLASSIC = {"torch-tensorrt": "2.14.0", "tensorrt": "11.1.0.5"}
RTX = {"torch-tensorrt-rtx": "2.13.0", "tensorrt-rtx": "1.5.0.114"}


def machine(capability: tuple[int, int] | None, packages: dict[str, str], name: str = "NVIDIA L40S") -> Environment:
    kind = "cpu" if capability is None else "cuda"
    return Environment(kind, name, capability, driver="580.1", platform="linux-x86_64", packages=packages)


# Where it can run, and where it can build.


@pytest.mark.parametrize(
    ("capability", "packages", "dtype", "says"),
    [
        ((9, 0), CLASSIC, torch.bfloat16, []),
        ((8, 9), RTX, torch.bfloat16, []),
        ((7, 5), RTX, torch.float16, []),
        ((9, 0), RTX, torch.bfloat16, ["TensorRT-RTX runs on compute capabilities 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not 9.0"]),
        ((7, 0), CLASSIC, torch.float16, ["TensorRT needs compute capability 7.5, this is compute capability 7.0"]),
        ((7, 5), CLASSIC, torch.bfloat16, ["compute capability 7.5 has no bfloat16: set dtype to float16"]),
        ((8, 9), {}, torch.bfloat16, ["TensorRT is not installed: pip install 'qwen-vae-accel[tensorrt]'"]),
        (None, RTX, torch.bfloat16, ["TensorRT engines run on NVIDIA GPUs, and this is cpu"]),
        (None, {}, torch.bfloat16, ["TensorRT is not installed", "TensorRT engines run on NVIDIA GPUs"]),
    ],
)
def test_reasons(
    source: ModelSource,
    capability: tuple[int, int] | None,
    packages: dict[str, str],
    dtype: torch.dtype,
    says: list[str],
) -> None:
    found = TensorRTBackend().reasons(machine(capability, packages), job_of(source, "decode", dtype))
    assert len(found) == len(says)
    assert all(text.startswith(start) for text, start in zip(found, says, strict=True))


@pytest.mark.parametrize(
    ("packages", "settings", "targets", "says"),
    [
        (CLASSIC, {}, "", ""),
        (RTX, {}, "8.9", ""),
        (CLASSIC, {"hardware_compatible": True, "version_compatible": True}, "", ""),
        (CLASSIC, {}, "8.9", "only TensorRT-RTX builds for a named compute capability"),
        (RTX, {"hardware_compatible": True}, "", "name several compute capabilities"),
        ({"tensorrt": "11.1.0.5"}, {}, "", "torch-tensorrt is not installed"),
        ({**CLASSIC, **RTX}, {}, "", "both installed"),
    ],
)
def test_build_reasons(packages: dict[str, str], settings: dict[str, object], targets: str, says: str) -> None:
    backend = TensorRTBackend(BuildSettings.from_dict(settings), parse_capabilities(targets) if targets else ())
    found = backend.build_reasons(machine((8, 9), packages))
    assert bool(found) == bool(says) and says in "; ".join(found)


def test_capabilities_of_the_table_are_those_of_the_library(rtx: Flavour) -> None:
    members = rtx.bindings().ComputeCapability.__members__
    real = {name.removeprefix("SM") for name in members if name.startswith("SM")}
    assert real == {f"{major}{minor}" for major, minor in flavours.RTX_CAPABILITIES}


def test_it_comes_before_the_other_engine_backends() -> None:
    assert engine_backends()[0] is get_backend("tensorrt")


def test_a_cpu_machine_refuses_it_by_name_with_reasons(micro: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="TensorRT engines run on NVIDIA GPUs"):
        accelerate(micro, backend="tensorrt", engine_dir=tmp_path / "engines")


def test_building_for_this_machine_needs_its_gpu(rtx: Flavour, source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no GPU here to build for; name one: .*--compute-capability"):
        TensorRTBackend().build(nn.Identity(), job_of(source, "decode"), key_of("decode", "64x64"), tmp_path / "e.trt")


@pytest.mark.parametrize(
    ("packages", "platform", "in_ci", "must_fail"),
    [
        (RTX, "linux-x86_64", True, None),
        (CLASSIC, "linux-x86_64", False, False),
        (CLASSIC, "linux-x86_64", True, True),
        ({}, "linux-x86_64", False, True),
        ({}, "darwin-arm64", False, False),
        ({}, "darwin-arm64", True, True),
        ({"tensorrt-rtx": "1.5.0.114"}, "linux-x86_64", False, True),
        ({**CLASSIC, **RTX}, "linux-x86_64", False, True),
    ],
)
def test_real_builds_are_skipped_only_where_the_flavour_cannot_be(
    packages: dict[str, str], platform: str, in_ci: bool, must_fail: bool | None
) -> None:
    here = Environment("cpu", "AVX2", platform=platform, packages=packages)
    missing = missing_rtx(here, in_ci)
    assert (missing and missing[0]) is must_fail
    assert missing is None or "pip install 'qwen-vae-accel[tensorrt-rtx]'" in missing[1]


# Settings: what Torch-TensorRT would swallow.


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"optimisation_level": 3}, "did you mean 'optimization_level'"),
        ({"optimization_level": 6}, "from 0 to 5"),
        ({"optimization_level": True}, "from 0 to 5"),
        ({"tf32": 1}, "true or false"),
        ({"query_limit": 0}, "positive"),
    ],
)
def test_settings_that_cannot_be_meant(values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        BuildSettings.from_dict(values)


def test_settings_and_capabilities_from_text() -> None:
    given = BuildSettings.from_text(["optimization_level=5", "hardware_compatible=true"])
    assert given == BuildSettings(optimization_level=5, hardware_compatible=True)
    assert parse_capabilities("12.0, 8.9,8.9") == ((8, 9), (12, 0))
    for wrong in ("8", "sm_89", "8.9,", ""):
        with pytest.raises(ConfigError, match="MAJOR.MINOR"):
            parse_capabilities(wrong)
    for wrong in ("tf32", "tf32=maybe", "level=-1"):
        with pytest.raises(ConfigError, match="NAME=VALUE|did you mean|known are"):
            BuildSettings.from_text([wrong])


# What an engine is tied to.

HOPPER = machine((9, 0), CLASSIC, "NVIDIA H200")
ADA = machine((8, 9), RTX, "NVIDIA GeForce RTX 4090")


@pytest.mark.parametrize(
    ("built", "here", "says"),
    [
        ((TensorRTBackend(), HOPPER), HOPPER, []),
        ((TensorRTBackend(), HOPPER), dataclasses.replace(HOPPER, driver="999"), []),
        (
            (TensorRTBackend(), HOPPER),
            machine((9, 0), CLASSIC, "NVIDIA H100"),
            ["gpu: built for NVIDIA H200, compute capability 9.0, here NVIDIA H100, compute capability 9.0"],
        ),
        (
            (TensorRTBackend(), HOPPER),
            dataclasses.replace(HOPPER, packages={**CLASSIC, "tensorrt": "11.0.0.114"}, platform="windows-amd64"),
            ["platform: built for linux-x86_64, here windows-amd64", "tensorrt: built for 11.1.0.5, here 11.0.0.114"],
        ),
        ((TensorRTBackend(BuildSettings(hardware_compatible=True)), HOPPER), machine((12, 0), CLASSIC, "other"), []),
        (
            (TensorRTBackend(BuildSettings(hardware_compatible=True)), HOPPER),
            machine((7, 5), CLASSIC, "T4"),
            ["gpu: built for any GPU of compute capability 8.0 or later, here T4, compute capability 7.5"],
        ),
        (
            (TensorRTBackend(BuildSettings(version_compatible=True)), HOPPER),
            dataclasses.replace(HOPPER, packages={**CLASSIC, "tensorrt": "11.3.0.1"}),
            [],
        ),
        (
            (TensorRTBackend(BuildSettings(version_compatible=True)), HOPPER),
            dataclasses.replace(HOPPER, packages={**CLASSIC, "tensorrt": "12.0.0.1"}),
            ["tensorrt: built for 11.1.0.5 or later of its major version, here 12.0.0.1"],
        ),
        # TensorRT-RTX: any GPU of the capabilities that it was built for, on Linux and Windows.
        ((TensorRTBackend(), ADA), machine((8, 9), RTX, "NVIDIA L40S"), []),
        ((TensorRTBackend(), ADA), dataclasses.replace(ADA, platform="windows-amd64"), []),
        ((TensorRTBackend(targets=((8, 6), (12, 0))), machine(None, RTX)), machine((12, 0), RTX, "NVIDIA RTX 5090"), []),
        (
            (TensorRTBackend(targets=((8, 6), (12, 0))), machine(None, RTX)),
            ADA,
            ["gpu: built for compute capability 8.6, 12.0, here compute capability 8.9"],
        ),
        (
            (TensorRTBackend(), ADA),
            machine((8, 9), CLASSIC),
            [
                "flavour: built for TensorRT-RTX, here TensorRT",
                "gpu: built for compute capability 8.9, here NVIDIA L40S, compute capability 8.9",
                "platform: built for x86_64, here linux-x86_64",
                "tensorrt: built for 1.5.0.114, here 11.1.0.5",
            ],
        ),
    ],
)
def test_a_mismatch_says_both_sides(built: tuple[TensorRTBackend, Environment], here: Environment, says: list[str]) -> None:
    builder, there = built
    runner = TensorRTBackend()
    key = key_of("decode", "64x64")
    record = type("Record", (), {
        "backend": "tensorrt", "method": "decode", "dtype": "float32", "weights": "w", "profiles": key.profiles,
        "identity": builder.identity(there),
    })  # fmt: skip
    wanted = Wanted(runner, key, torch.float32, CPU, "w", here)
    assert wanted.differences(record) == says  # type: ignore[arg-type]


# The whole plugin, over the stand-in.


class StandInBackend(TensorRTBackend):
    """The backend with the stand-in in place of both libraries; "building" writes what a real engine would say."""

    def __init__(self, trt: StandIn, frames: bool = False) -> None:
        super().__init__()
        self._streams = trt.streams
        self._frames = frames

    def build(self, model: nn.Module, job: Job, key: EngineKey, path: Path) -> None:
        path.write_bytes(foreign_file(job, key, self._frames, scratch=[1_000_000 * (n + 1) for n in range(len(key.profiles))]))


def foreign_file(job: Job, key: EngineKey, frames: bool = False, scratch: Sequence[int] = ()) -> bytes:
    """An engine as somebody else could have made it."""
    outputs = 2 * job.topology.z_dim if job.method == "encode" else job.topology.image_channels
    ranges = [tuple(shape[2:] for shape in triple) for triple in input_shapes(job, key)]
    channels = (job.in_channels, outputs)
    return engine_file(job.method, ranges, channels, frames=frames, scratch=scratch)  # type: ignore[arg-type]


@pytest.fixture
def plugin(trt: StandIn, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put the stand-in's backend in place of all engine backends, on a machine that says it has an RTX 4090."""

    def install(**options: bool) -> None:
        from qwen_vae_accel.backends import registry
        from qwen_vae_accel.backends.eager import EagerBackend

        monkeypatch.setattr(registry, "_BACKENDS", (StandInBackend(trt, **options), EagerBackend()))
        monkeypatch.setattr(Environment, "detect", classmethod(lambda cls, device: ADA))
        monkeypatch.setattr(Flavour, "bindings", lambda self: trt)

    return install


def test_requests_go_to_the_nearest_profile_of_one_engine(
    plugin: Callable[..., None], trt: StandIn, micro: nn.Module, tmp_path: Path, no_grad: None
) -> None:
    plugin()
    sizes = ["32x32:64x64:128x128", "64x64:128x128:192x192", "64x32:128x64:192x96"]
    options = {"backend": "tensorrt", "engine_dir": tmp_path / "engines", "multi_profile": True, "sizes": sizes}
    expected = [Reference(micro, "decode", randn(1, 4, 1, *latent)) for latent in ((8, 8), (15, 15), (8, 17), (4, 4))]
    with accelerate(micro, task="i2i", on_miss="build", **options) as handle:
        handle.warmup(progress=False)
        trt.calls.clear()
        for latent, reference in zip(((8, 8), (15, 15), (8, 17), (4, 4)), expected, strict=True):
            reference.check(decoded(micro, randn(1, 4, 1, *latent)))
        assert moments(micro, picture(2, 3, 1, 64, 128)).shape == (2, 8, 1, 8, 16)
        report = handle.report().as_dict()
    # 64x64 -> 0, 120x120 -> 1, 136x64 -> 2, 32x32 -> 0; each new profile is checked once before it is used.
    switched = [profile for profile, _ in trt.named("set_optimization_profile_async")]
    assert switched[:3] == [1, 2, 0]
    assert report["calls"] == {"decode": {"tensorrt": 4}, "encode": {"tensorrt": 1}}
    assert report["fallbacks"] == [] and report["loads"] == 2 and trt.violations == []


def test_the_guides_static_config_loads_its_directory(
    plugin: Callable[..., None], trt: StandIn, micro: nn.Module, tmp_path: Path, no_grad: None
) -> None:
    plugin()
    engines = tmp_path / "vae_trt_t2i_static"
    document = {
        "task": "t2i",
        "infer_steps": 8,
        "vae_type": "tensorrt",
        "trt_vae_config": {"trt_engine_path": str(engines), "multi_profile": False},
    }
    z = randn(1, 4, 1, 8, 8)
    reference = Reference(micro, "decode", z)
    with accelerate(micro, backend="tensorrt", engine_dir=engines, sizes=["64x64"]) as handle:
        handle.warmup(progress=False)
    text = json.dumps(document)
    with accelerate(micro, dataclasses.replace(AccelConfig.from_json(text), on_miss="error")) as handle:
        reference.check(decoded(micro, z))
        assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 1}
    assert (engines / "64x64" / "vae_decoder.trt").is_file()
    assert not (engines / "64x64" / "vae_encoder.trt").exists(), "text-to-image makes and loads no encoder"


@pytest.mark.parametrize("verify", [True, False])
def test_scratch_memory_is_recorded_from_the_loaded_engine(
    plugin: Callable[..., None], cli: Cli, micro: nn.Module, tmp_path: Path, no_grad: None, verify: bool
) -> None:
    plugin()
    sizes = ["32x32:64x64:128x128", "64x64:128x128:192x192"]
    options = {"backend": "tensorrt", "engine_dir": tmp_path, "sizes": sizes, "multi_profile": True, "on_miss": "build"}
    with accelerate(micro, verify=verify, **options) as handle:
        handle.warmup(progress=False)

    def listed() -> tuple[dict[str, Any], str]:
        (engine,) = cli("list", "--engine-dir", tmp_path, "--json").document["engines"]
        return engine, cli("list", "--engine-dir", tmp_path).stdout

    engine, table = listed()
    # Not loaded for a check yet, and this builder does not say what it planned.
    assert engine["scratch"] == ([1_000_000, 2_000_000] if verify else None)
    assert ("not known" in table) is not verify and ("2.0" in table) is verify
    with accelerate(micro, **options):
        decoded(micro, randn(1, 4, 1, 8, 8))
    assert listed()[0]["scratch"] == [1_000_000, 2_000_000]


def test_a_failing_run_falls_back_and_says_why(
    plugin: Callable[..., None], trt: StandIn, micro: nn.Module, tmp_path: Path, no_grad: None
) -> None:
    plugin()
    z = randn(1, 4, 1, 8, 8)
    reference = Reference(micro, "decode", z)
    options = {"backend": "tensorrt", "engine_dir": tmp_path / "engines", "sizes": ["64x64"]}
    with accelerate(micro, **options) as handle:
        decoded(micro, z)
        trt.fail.add("execute_async_v3")
        reference.check(decoded(micro, z))
        fallbacks = handle.report().as_dict()["fallbacks"]
    assert len(fallbacks) == 1 and "did not run the engine" in fallbacks[0]["reason"]
    with (
        accelerate(micro, on_miss="error", verify=False, **options),
        pytest.raises(EngineMissingError, match="enqueueV3 failed"),
    ):
        decoded(micro, z)


def test_an_engine_that_computes_something_else_is_never_shown(
    plugin: Callable[..., None], trt: StandIn, micro: nn.Module, tmp_path: Path, no_grad: None
) -> None:
    plugin()
    right = trt.networks["decode"]
    trt.networks["decode"] = lambda x: right(x) if x.device.type == "meta" else right(x).flip(3)
    options = {"backend": "tensorrt", "engine_dir": tmp_path / "engines", "sizes": ["64x64"], "on_miss": "build"}
    z = randn(1, 4, 1, 8, 8)
    reference = Reference(micro, "decode", z)
    with accelerate(micro, **options) as handle:
        reference.check(decoded(micro, z))
        assert "self-check failed" in handle.report().as_dict()["fallbacks"][0]["reason"]
        assert handle.report().as_dict()["calls"]["decode"] == {"eager": 1}


# Engine files that others made.


@pytest.mark.parametrize("frames", [False, True])
def test_foreign_engines_are_adopted_by_what_they_say_and_served(
    plugin: Callable[..., None], trt: StandIn, micro: nn.Module, tmp_path: Path, no_grad: None, frames: bool
) -> None:
    plugin()
    source = ModelSource(micro)
    odd = "40x40:64x64:96x96,80x80:128x128:200x200"  # ranges of their own: no plan of ours
    for method in ("encode", "decode"):
        key = key_of(method, odd, multi_profile=True)
        file = tmp_path / f"{key.stem}.trt"
        file.write_bytes(foreign_file(job_of(source, method), key, frames))
    inspector = Inspector(tmp_path, CPU, source)
    config = AccelConfig.from_dict(
        {"task": "i2i", "vae_type": "tensorrt", "trt_vae_config": {"trt_engine_path": str(tmp_path), "multi_profile": True}}
    )
    config = dataclasses.replace(config, on_miss="error")
    z, x = randn(1, 4, 1, 12, 12), picture(1, 3, 1, 72, 64)
    references = Reference(micro, "decode", z), Reference(micro, "encode", x)
    with accelerate(micro, config), pytest.raises(EngineMissingError):
        decoded(micro, z)
    for name in inspector.unknown():
        record = inspector.adopt(name, config)
        assert record.origin == "adopted" and len(record.profiles) == 2
        assert str(record.profiles[0].maximum) == "96x96"
        assert record.scratch == (1024, 1024), "as the engine says"
    with accelerate(micro, config) as handle:
        references[0].check(decoded(micro, z))
        references[1].check(moments(micro, x))
        assert handle.report().as_dict()["calls"] == {"decode": {"tensorrt": 1}, "encode": {"tensorrt": 1}}
    assert trt.violations == []


def test_a_foreign_engine_in_a_folder_of_another_size_serves_its_own(
    plugin: Callable[..., None], cli: Cli, micro: nn.Module, tmp_path: Path, no_grad: None
) -> None:
    """As the guide's host has them by now: its folder ``4_3`` is for another size than the guide's."""
    plugin()
    vae, engines = tmp_path / "vae", tmp_path / "engines"
    micro.save_pretrained(vae)
    job, key = job_of(ModelSource(micro), "decode"), key_of("decode", "64x48")
    ranges = [tuple(shape[2:] for shape in t) for t in input_shapes(job, key)]
    (engines / "4_3").mkdir(parents=True)
    (engines / "4_3" / "vae_decoder.trt").write_bytes(engine_file("decode", ranges))  # type: ignore[arg-type]
    result = cli("adopt", "--engine-dir", engines, "--vae", vae, "--trust", "--json")
    (entry,) = result.document["engines"]
    assert entry["adopted"] and entry["note"] == "folder 4_3 holds an engine for 64x48, where 1472x1136 was expected"
    z = randn(1, 4, 1, 6, 8)
    reference = Reference(micro, "decode", z)
    guide = {"task": "t2i", "vae_type": "tensorrt", "trt_vae_config": {"trt_engine_path": str(engines)}}
    with accelerate(micro, guide, on_miss="error") as handle:
        reference.check(decoded(micro, z))
        assert handle.report().as_dict()["engines"] == ["4_3/vae_decoder.trt"]


def test_a_foreign_engine_of_another_vae_or_place_is_refused(
    plugin: Callable[..., None], micro: nn.Module, tmp_path: Path
) -> None:
    plugin()
    source = ModelSource(micro)
    for folder, size, channels in (
        ("64x64", "64x64", (16, 3)),
        ("96x96", "64x64", (4, 3)),
        ("80x80", "64x64:80x80:96x96", (4, 3)),
    ):
        key = key_of("decode", size, multi_profile=":" in size)
        ranges = [tuple(shape[2:] for shape in t) for t in input_shapes(job_of(source, "decode"), key)]
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vae_decoder.trt").write_bytes(engine_file("decode", ranges, channels))  # type: ignore[arg-type]
    inspector = Inspector(tmp_path, CPU, source)
    for folder, says in (("64x64", "16 channels"), ("96x96", "belongs in the folder 64x64"), ("80x80", "range of sizes")):
        with pytest.raises(Exception, match=says) as caught:
            inspector.adopt(f"{folder}/vae_decoder.trt", AccelConfig())
        assert isinstance(caught.value, (EngineRefusedError, RuntimeError))
    assert inspector.store.manifest().engines == {}
