"""Building engines with the REAL TensorRT-RTX, on the CPU, through the code that a user's build runs.

Nothing here runs an engine: TensorRT needs a GPU for that. What is built is read back from TensorRT's own network,
builder configuration and file; that the network is the right one is tested by running the exported program, and by
computing TensorRT's network itself (test_network.py).
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from qwen_vae_accel.backends.base import EngineImage, Job
from qwen_vae_accel.backends.tensorrt import BuildSettings, TensorRTBackend
from qwen_vae_accel.backends.tensorrt.build import BuildReport, export, input_shapes
from qwen_vae_accel.backends.tensorrt.crossbuild import torch_tensorrt_for
from qwen_vae_accel.backends.tensorrt.engine import TensorRTError
from qwen_vae_accel.backends.tensorrt.flavour import Flavour
from qwen_vae_accel.backends.tensorrt.network import Network, NetworkProgram
from qwen_vae_accel.cli import common
from qwen_vae_accel.cli.app import app
from qwen_vae_accel.engines.networkcheck import check_shape
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.errors import BuildError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.layers import RMSNorm
from qwen_vae_accel.model.spelling import QUERY_LIMIT, PlainNorm, query_chunks, spell
from qwen_vae_accel.plan import Plan
from qwen_vae_accel.sizes import Profile, Size
from tests.conftest import random_vae
from tests.helpers import CPU, TINY_VAE, Reference, picture, randn
from tests.tensorrt.conftest import job_of, key_of

GUIDE_MULTI = Plan.make(None, multi_profile=True)

# The network, spelled for TensorRT.


def _input(method: str, source: ModelSource, height: int, width: int) -> Tensor:
    if method == "decode":
        return randn(1, source.topology.z_dim, height, width)
    return picture(1, source.topology.image_channels, height, width)


@pytest.mark.numeric
@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_spelled_network_is_the_exact_one(tiny: nn.Module, method: str, dtype: torch.dtype) -> None:
    source = ModelSource(tiny)
    x = _input(method, source, 12, 9) if method == "decode" else _input(method, source, 96, 72)
    with torch.no_grad():
        Reference(tiny, method, x, dtype).check(spell(source.model(method, dtype, CPU), chunks=4)(x.to(dtype)))


def test_spelling_shares_the_weights_and_leaves_the_network(tiny: nn.Module) -> None:
    network = ModelSource(tiny).model("decode", torch.float32, CPU)
    before = [type(module) for module in network.modules()]
    spelled = spell(network, chunks=2)
    assert [type(module) for module in network.modules()] == before
    shared = {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in spelled.parameters()}
    assert len(shared) >= len(list(network.parameters())) - 6  # all but three folded upsamplings


@pytest.mark.parametrize("value", [0.0, 1e-7, 300.0, 20000.0])
def test_the_norm_keeps_float16_extremes(value: float) -> None:
    # In float16 arithmetic the square of 300 is infinite and the floor under the root is zero.
    norm = RMSNorm({"gamma": torch.ones(16, dtype=torch.float16)}, silu=False)
    y = PlainNorm(norm)(torch.full((1, 16, 2, 2), value, dtype=torch.float16))
    assert torch.isfinite(y).all()
    assert y.float().mean().item() == pytest.approx(0.0 if value == 0 else 1.0, abs=1e-3)


@pytest.mark.parametrize(("pixels", "limit", "chunks"), [(1, 10, 1), (10, 10, 1), (11, 10, 2), (24128, QUERY_LIMIT, 4)])
def test_number_of_query_runs(pixels: int, limit: int, chunks: int) -> None:
    assert query_chunks(pixels, limit) == chunks


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["tiny", "2.1"])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_the_exported_program_is_exact_at_every_size_of_its_profiles(tiny: nn.Module, method: str, name: str) -> None:
    vae = tiny if name == "tiny" else random_vae(name)
    source = ModelSource(vae)
    key = key_of(method, "64x64:128x96:160x160,64x64:96x128:144x224", multi_profile=True)
    job = job_of(source, method)
    limit = 100 if name == "tiny" else 25  # of 18x28 latent pixels for 144x224, or 9x14
    program, chunks = export(source.model(method, torch.float32, CPU), job, input_shapes(job, key), limit)
    assert chunks == 6
    run, double = program.module(), source.model(method, torch.float64, CPU)
    for size in (Size(64, 64), Size(128, 96), Size(160, 160), Size(144, 224), Size(72, 88), Size(101, 99)):
        size = size.floor(job.multiple)
        x = _input(method, source, *job.input_hw(size))
        with torch.no_grad():
            Reference(vae, method, x, double=double).check(run(x))


@pytest.mark.numeric
@pytest.mark.parametrize("sizes", ["64x64:64x96:64x128", "16x16"])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_fixed_sides_and_the_least_size_are_exported(method: str, sizes: str) -> None:
    vae = random_vae()
    source = ModelSource(vae)
    key, job = key_of(method, sizes, multi_profile=True), job_of(source, method)
    with torch.device("meta"):  # the default device has no say
        program, _ = export(source.model(method, torch.float32, CPU), job, input_shapes(job, key), 10)
    for size in (key.profiles[0].minimum, key.profiles[0].optimum, key.profiles[0].maximum):
        x = _input(method, source, *job.input_hw(size))
        with torch.no_grad():
            Reference(vae, method, x).check(program.module()(x))


# Engines.


@pytest.fixture(scope="session")
def multi_decoder(
    full: nn.Module, cross_build: Callable[..., TensorRTBackend], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, BuildReport]:
    """The full-size decoder with the guide's nine profiles."""
    path = tmp_path_factory.mktemp("multi") / "vae_decoder_multi_profile.trt"
    report = cross_build(full, "decode", torch.bfloat16, GUIDE_MULTI, "8.9", path).last_build
    assert report is not None
    return path, report


@pytest.fixture(scope="session")
def static_decoder(
    full: nn.Module, cross_build: Callable[..., TensorRTBackend], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, BuildReport]:
    """The full-size decoder for 1328x1328."""
    path = tmp_path_factory.mktemp("static") / "vae_decoder.trt"
    plan = Plan.make(["1_1"], multi_profile=False)
    report = cross_build(full, "decode", torch.bfloat16, plan, "8.9", path).last_build
    assert report is not None
    return path, report


def _is_engine(path: Path, report: BuildReport) -> bool:
    data = path.read_bytes()
    return data[:4] == b"vtrt" and len(data) == report.nbytes


def _shapes_are_those_of_the_vae(report: BuildReport, job: Job, plan: Plan) -> None:
    """At both ends and the middle of every profile; TensorRT's own rules hold for every tensor on the way."""
    assert isinstance(report.network, Network)
    network = NetworkProgram(report.network)
    for index, profile in enumerate(plan.profiles):
        for size in (profile.minimum, profile.optimum, profile.maximum):
            check_shape(job, network, size.floor(job.multiple), index)


def test_full_decoder_with_nine_profiles(
    full: nn.Module, multi_decoder: tuple[Path, BuildReport], record_property: Callable[[str, object], None]
) -> None:
    path, report = multi_decoder
    assert _is_engine(path, report)
    assert [(t.name, t.shape, t.dtype) for t in report.inputs] == [("z", (1, 16, -1, -1), "BF16")]
    assert [(t.name, t.shape, t.dtype) for t in report.outputs] == [("output0", (1, 3, -1, -1), "BF16")]
    assert len(report.profiles) == 9
    for (low, best, high), profile in zip(report.profiles, GUIDE_MULTI.profiles, strict=True):
        for shape, size in ((low, profile.minimum), (best, profile.optimum), (high, profile.maximum)):
            assert shape == (1, 16, size.height // 8, size.width // 8), profile.name
    assert report.attention_chunks == 8 and report.capabilities == ("8.9",)
    assert 50e6 < report.nbytes < 150e6  # 50.6 MB of weights, and kernels for nine profiles
    assert report.scratch is not None and len(report.scratch) == 9
    # A feature map of 96 channels at a profile's largest size, at least; the smallest profile needs the least.
    for planned, profile in zip(report.scratch, GUIDE_MULTI.profiles, strict=True):
        assert planned > 96 * profile.maximum.width * profile.maximum.height * 2, profile.name
    assert report.scratch[0] == min(report.scratch)
    _shapes_are_those_of_the_vae(report, job_of(ModelSource(full), "decode", torch.bfloat16), GUIDE_MULTI)
    record_property("megabytes", report.nbytes / 1e6)
    record_property("seconds", report.seconds)


def test_full_decoder_static(static_decoder: tuple[Path, BuildReport]) -> None:
    path, report = static_decoder
    assert _is_engine(path, report)
    assert [(t.name, t.shape) for t in (*report.inputs, *report.outputs)] == [
        ("z", (1, 16, 166, 166)),
        ("output0", (1, 3, 1328, 1328)),
    ]
    assert report.profiles == () and report.attention_chunks == 5


def test_runs_of_queries_keep_the_scores_small(
    full: nn.Module, cross_build: Callable[..., TensorRTBackend], static_decoder: tuple[Path, BuildReport], tmp_path: Path
) -> None:
    plan = Plan.make(["1_1"], multi_profile=False)
    unlimited = cross_build(full, "decode", torch.bfloat16, plan, "8.9", tmp_path / "e.trt", query_limit=10**9).last_build
    assert unlimited is not None and unlimited.scratch is not None and static_decoder[1].scratch is not None
    # 27556 pixels: all scores are 1.5 GB in bfloat16, and so are the probabilities. A feature map of 96 channels is 339 MB.
    assert unlimited.scratch[0] > 2 * 27556**2 * 2
    assert static_decoder[1].scratch[0] < 5 * 96 * 1328**2 * 2


def test_full_encoder_for_several_capabilities(
    full: nn.Module, cross_build: Callable[..., TensorRTBackend], tmp_path: Path
) -> None:
    plan = Plan.make(["16_9"], multi_profile=False)
    path = tmp_path / "vae_encoder.trt"
    report = cross_build(full, "encode", torch.float16, plan, "8.6,12.0", path).last_build
    assert report is not None and _is_engine(path, report)
    # Runs of queries that do not wait for one another were batched here, and all scores held: 2.5 GB.
    assert report.scratch is not None and report.scratch[0] < 5 * 96 * 928 * 1664 * 2
    assert [(t.name, t.shape, t.dtype) for t in (*report.inputs, *report.outputs)] == [
        ("x", (1, 3, 928, 1664), "HALF"),
        ("output0", (1, 32, 116, 208), "HALF"),
    ]
    assert report.capabilities == ("8.6", "12.0")


def test_tiny_encoder_with_nine_profiles(tiny: nn.Module, cross_build: Callable[..., TensorRTBackend], tmp_path: Path) -> None:
    path = tmp_path / "vae_encoder_multi_profile.trt"
    report = cross_build(tiny, "encode", torch.bfloat16, GUIDE_MULTI, "12.0", path).last_build
    assert report is not None and _is_engine(path, report)
    assert report.inputs[0].shape == (1, 3, -1, -1) and report.outputs[0].shape == (1, 32, -1, -1)
    _shapes_are_those_of_the_vae(report, job_of(ModelSource(tiny), "encode", torch.bfloat16), GUIDE_MULTI)
    # An encoder takes 1620 pixels as they are.
    assert report.profiles[8][1] == (1, 3, 1088, 1620)
    assert len(report.profiles) == 9


@pytest.mark.parametrize(("method", "multi"), [("encode", True), ("decode", True), ("decode", False)])
def test_qwen_image_21(cross_build: Callable[..., TensorRTBackend], tmp_path: Path, method: str, multi: bool) -> None:
    sizes = ["64x64:128x96:160x160", "64x64:96x128:160x224"] if multi else ["96x64"]
    plan = Plan.make(sizes, multi, scale=16, multiple=16)
    path = tmp_path / "engine.trt"
    report = cross_build(random_vae("2.1"), method, torch.bfloat16, plan, "8.9", path).last_build
    assert report is not None and _is_engine(path, report)
    channels, step = ((4, 12), 1) if method == "encode" else ((6, 4), 16)
    height, width = (-1, -1) if multi else (64 // step, 96 // step)
    assert report.inputs[0].shape == (1, channels[0], height, width)
    assert report.outputs[0].shape[:2] == (1, channels[1])
    if not multi:
        assert report.outputs[0].shape[2:] == ((4, 6) if method == "encode" else (64, 96))
    assert [best[2:] for _, best, _ in report.profiles] == (
        [(p.optimum.height // step, p.optimum.width // step) for p in plan.profiles] if multi else []
    )


def test_float32_and_progress(tiny: nn.Module, rtx: Flavour, tmp_path: Path) -> None:
    source = ModelSource(tiny)
    steps: list[tuple[str, int, int]] = []
    backend = TensorRTBackend(BuildSettings(tf32=False), ((8, 9),), lambda *step: steps.append(step))
    key = key_of("decode", "64x64")
    backend.build(source.model("decode", torch.float32, CPU), job_of(source, "decode"), key, tmp_path / "e.trt")
    assert backend.last_build is not None
    assert {t.dtype for t in (*backend.last_build.inputs, *backend.last_build.outputs)} == {"FLOAT"}
    assert steps and all(0 < step <= count for _, step, count in steps)


# The same file, through Torch-TensorRT's own module.


def test_names_and_order_are_those_torch_tensorrts_module_takes(static_decoder: tuple[Path, BuildReport]) -> None:
    path, report = static_decoder
    with torch_tensorrt_for((8, 9)) as torch_tensorrt:
        from torch_tensorrt.dynamo._settings import CompilationSettings

        module = torch_tensorrt.runtime.TorchTensorRTModule(
            serialized_engine=path.read_bytes(),
            input_binding_names=["z"],
            output_binding_names=["output0"],
            settings=CompilationSettings(lazy_engine_init=True),  # without a GPU there is nothing to set up
        )
    assert [t.name for t in report.inputs] == module.input_binding_names
    assert [t.name for t in report.outputs] == module.output_binding_names
    assert module.serialized_engine == path.read_bytes()


# What goes wrong, from TensorRT itself.


class _Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.pinv(x)


class _Deconvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.up(x))


@pytest.mark.parametrize(
    ("network", "dtype", "says"),
    [
        (_Sorting(), torch.float32, "cannot convert the network"),
        (_Deconvolution(), torch.bfloat16, "TensorRT built no engine: .*Error Code"),
    ],
)
def test_a_network_that_cannot_be_built(
    tiny: nn.Module, rtx: Flavour, tmp_path: Path, network: nn.Module, dtype: torch.dtype, says: str
) -> None:
    source = ModelSource(tiny)
    key = key_of("decode", "64x64:128x96:160x160", multi_profile=True)
    with pytest.raises(BuildError, match=says):
        TensorRTBackend(targets=((8, 9),)).build(network.eval(), job_of(source, "decode", dtype), key, tmp_path / "e.trt")
    assert not (tmp_path / "e.trt").exists()


def test_a_capability_that_it_does_not_build_for(tiny: nn.Module, rtx: Flavour, tmp_path: Path) -> None:
    source = ModelSource(tiny)
    backend = TensorRTBackend(targets=((9, 0),))
    job = job_of(source, "decode")
    assert "not 9.0" in backend.reasons(backend.target_environment(), job)[0]
    with pytest.raises(BuildError, match="does not build for compute capability 9.0"):
        backend.build(source.model("decode", torch.float32, CPU), job, key_of("decode", "64x64"), tmp_path / "e.trt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU; test_gpu.py runs engines on it")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data, "Cuda Runtime"),
        (lambda data: data[:-1000], "Serialization assertion"),
        (lambda data: b"junk" * 100, "malformed engine.*magicTag"),
        (lambda data: b"", "cannot load"),
    ],
    ids=["no GPU", "truncated", "junk", "empty"],
)
def test_real_tensorrts_refusals_are_errors(
    full: nn.Module,
    static_decoder: tuple[Path, BuildReport],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    says: str,
) -> None:
    file = tmp_path / "e.trt"
    file.write_bytes(damage(static_decoder[0].read_bytes()))
    with pytest.raises(TensorRTError, match=says):
        TensorRTBackend().load(
            EngineImage.read(file), job_of(ModelSource(full), "decode", torch.bfloat16), key_of("decode", "1_1")
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there are no stand-ins")
def test_stand_ins_are_gone_after_the_import(rtx: Flavour) -> None:
    isfile, capability = os.path.isfile, torch.cuda.get_device_capability
    had = hasattr(torch._C, "_CudaDeviceProperties")
    with torch_tensorrt_for((12, 0)):
        assert torch.cuda.get_device_capability() == (12, 0)
        with torch_tensorrt_for((8, 9)):  # a later build in the same process
            assert torch.cuda.get_device_capability() == (8, 9)
    assert os.path.isfile is isfile and torch.cuda.get_device_capability is capability
    assert hasattr(torch._C, "_CudaDeviceProperties") == had


# The command.


def test_the_command_builds_a_directory_for_another_machine(
    rtx: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    @contextmanager
    def progress(total: int, description: str) -> Iterator[Callable[[str, bool], None]]:
        yield lambda text, advance: shown.append(text)

    monkeypatch.setattr(common, "progress", progress)
    options = ["--vae", str(TINY_VAE), "--engine-dir", str(tmp_path / "engines"), "--sizes", "64x64"]
    command = [
        "build",
        *options,
        "--json",
        "--method",
        "decode",
        "--backend",
        "tensorrt",
        "--compute-capability",
        "8.9",
        "--dtype",
        "fp16",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert any(re.search(r" \d+/\d+$", text) for text in shown), "the builder's own steps are shown"
    records = EngineStore(tmp_path / "engines").manifest().engines
    assert set(records) == {"64x64/vae_decoder.trt"}
    (record,) = records["64x64/vae_decoder.trt"]
    assert record.identity == {
        "flavour": "TensorRT-RTX",
        "tensorrt": TensorRTBackend(targets=((8, 9),)).target_environment().packages["tensorrt-rtx"],
        "gpu": "compute capability 8.9",
        "platform": "x86_64",
    }
    (check,) = record.verification.values()
    assert set(record.verification) == {"network/64x64"}, "the engine is checked on the target, here its network"
    assert check.machine == "network checked at 64x64" and check.passed and check.psnr_db > 50
    assert record.scratch is not None and record.scratch[0] > 1e6, "as its builder planned"
    assert record.profiles == (Profile.static("64x64", Size(64, 64)),)
    again = CliRunner().invoke(app, command)
    assert '"current"' in again.output and again.exit_code == 0
    listed = CliRunner().invoke(app, ["list", "--engine-dir", str(tmp_path / "engines"), "--json"])
    (engine,) = json.loads(listed.stdout)["engines"]
    assert engine["scratch"] == list(record.scratch)
    said = f"network checked at 64x64: {check.psnr_db:.1f} dB"
    assert engine["networks"] == {"64x64": said} and engine["checks"] == {}
    table = CliRunner().invoke(app, ["list", "--engine-dir", str(tmp_path / "engines")], env={"COLUMNS": "200"})
    assert "network" in table.stdout and f"{check.psnr_db:.1f} dB" in table.stdout  # in a cell that may be folded
    verified = CliRunner().invoke(app, ["verify", *options[:4], "--json"])
    assert json.loads(verified.stdout)["engines"][0]["networks"] == {"64x64": said}
    if not torch.cuda.is_available():
        assert listed.exit_code == 1 and any("here no NVIDIA GPU" in reason for reason in engine["reasons"])
    gc.collect()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--compute-capability", "9.0"], "TensorRT-RTX runs on compute capabilities"),
        (["--compute-capability", "sm_89"], "MAJOR.MINOR"),
        (["--setting", "optimisation_level=3"], "did you mean"),
        (["--compute-capability", "8.9", "--backend", "inductor"], "not those of backend"),
    ],
)
def test_the_command_refuses_what_cannot_be_meant(rtx: Flavour, tmp_path: Path, extra: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["build", "--vae", str(TINY_VAE), "--engine-dir", str(tmp_path / "e"), *extra])
    assert result.exit_code != 0 and says in " ".join((result.output + str(result.exception or "")).split())
