"""decode_dtype="float8_e4m3fn": what the configuration takes, who may serve it, where its calibration is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from qwen_vae_accel import AccelConfig, accelerate
from qwen_vae_accel.backends.base import DirectBackend, Environment, Job
from qwen_vae_accel.backends.eager import EagerProgram
from qwen_vae_accel.backends.fused import backend as fused
from qwen_vae_accel.backends.fused import calibration
from qwen_vae_accel.backends.fused.calibration import calibrated_peaks, calibration_path
from qwen_vae_accel.backends.registry import engine_backends, get_backend
from qwen_vae_accel.bench.harness import make_trials
from qwen_vae_accel.bench.methods import parse_method
from qwen_vae_accel.config import FLOAT8
from qwen_vae_accel.errors import BackendUnavailableError, ConfigError
from qwen_vae_accel.kernels.float8 import calibrated_layers, input_scales, simulate
from qwen_vae_accel.kernels.network import published
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.sizes import Size
from tests.helpers import CPU, TINY_VAE, FakeBackend, as_if_on, decoded, latents, randn

if TYPE_CHECKING:
    from tests.fixtures_cli import Cli

pytest_plugins = ["tests.fixtures_cli"]

HOPPER = Environment("cuda", "Some GPU", (9, 0))
AMPERE = Environment("cuda", "Some GPU", (8, 0))


# ---- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [FLOAT8, "fp8", "float8", torch.float8_e4m3fn])
def test_float8_is_a_decode_dtype(given: object) -> None:
    config = AccelConfig(backend="fused", decode_dtype=given)  # type: ignore[arg-type]
    assert config.decode_dtype == FLOAT8
    assert AccelConfig.from_json(config.to_json()) == config
    assert config.float8("decode")
    assert not config.float8("encode")
    # The other layers: the VAE's dtype, or the one asked for, but 16 bits.
    assert config.compute_dtype("decode", torch.float16) == torch.float16
    assert config.compute_dtype("decode", torch.float32) == torch.bfloat16
    assert config.compute_dtype("encode", torch.float32) == torch.float32
    both = AccelConfig(dtype="float16", decode_dtype=FLOAT8)
    assert both.compute_dtype("decode", torch.bfloat16) == torch.float16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "fp8"}, "for decode_dtype only"),
        ({"encode_dtype": FLOAT8}, "for decode_dtype only"),
        ({"decode_dtype": FLOAT8, "backend": "eager"}, "for backend fused or auto, not 'eager'"),
        ({"decode_dtype": FLOAT8, "backend": "tensorrt"}, "for backend fused or auto"),
        ({"decode_dtype": FLOAT8, "dtype": "float32"}, "bfloat16 or float16, not 'float32'"),
        ({"decode_dtype": "float8_e5m2"}, "is not one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AccelConfig(**fields)


# ---- who serves it --------------------------------------------------------------------------------------------------


def test_the_fused_backend_needs_a_gpu_with_float8(full: nn.Module) -> None:
    backend, topology = get_backend("fused"), ModelSource(full).topology
    job = Job("decode", topology, torch.bfloat16, torch.device("cuda"), float8=True)
    plain = Job("decode", topology, torch.bfloat16, torch.device("cuda"))
    assert not backend.reasons(HOPPER, job)
    assert not backend.reasons(Environment("cuda", "Some GPU", (8, 9)), job)
    assert backend.reasons(AMPERE, job) == [
        "float8 needs compute capability >= 8.9, not 8.0: set decode_dtype to bfloat16 or float16"
    ]
    assert not backend.reasons(AMPERE, plain)


def test_no_engine_computes_in_float8(micro: nn.Module) -> None:
    job = Job("decode", ModelSource(micro).topology, torch.bfloat16, torch.device("cuda"), float8=True)
    for backend in engine_backends():
        assert any("float8" in reason for reason in backend.reasons(HOPPER, job))


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_where_it_cannot_run_it_is_refused_at_once(micro: nn.Module, backend: str) -> None:
    with pytest.raises(BackendUnavailableError, match="fused.*(?s:.)*needs an NVIDIA GPU(?s:.)*Without decode_dtype"):
        accelerate(micro, backend=backend, decode_dtype=FLOAT8)
    assert "decode" not in vars(micro)


class Simulated(DirectBackend):
    """The fused backend's place, taken by its simulation."""

    name = "fused"

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def reasons(self, environment: Environment, job: Job) -> list[str]:
        return []

    def program(self, source: ModelSource, job: Job) -> EagerProgram:
        self.jobs.append(job)
        network = source.model(job.method, job.dtype, job.device)
        if not job.float8:
            return EagerProgram(network)
        return EagerProgram(simulate(network, input_scales(source.state("decode"), calibrated_peaks(source, job))))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    from qwen_vae_accel.backends import registry

    backend = Simulated()
    others = [other for other in registry._BACKENDS if other.name != "fused"]
    monkeypatch.setattr(registry, "_BACKENDS", (*others[:-1], backend, others[-1]))
    as_if_on(monkeypatch, "bfloat16", "float16")
    monkeypatch.setattr(calibration, "_SIZE", Size(64, 64))
    return backend


@pytest.mark.usefixtures("no_grad")
def test_decoding_goes_to_float8_and_encoding_does_not(tiny: nn.Module, simulated: Simulated, tmp_path: Path) -> None:
    z = randn(1, 16, 1, 4, 6)
    exact = decoded(tiny, z)
    with accelerate(tiny, task="i2i", backend="fused", decode_dtype=FLOAT8, engine_dir=tmp_path) as handle:
        result = decoded(tiny, z)
        tiny.encode(torch.zeros(1, 3, 1, 32, 32))
        report = handle.report().as_dict()
    assert result.dtype == torch.float32
    assert 1e-3 < (result - exact).norm() / exact.norm() < 0.1
    assert report["fallbacks"] == []
    assert [(job.method, job.float8, job.dtype) for job in simulated.jobs] == [
        ("decode", True, torch.bfloat16),
        ("encode", False, torch.float32),
    ]


@pytest.mark.usefixtures("no_grad")
def test_engines_of_the_same_folder_are_passed_over(
    micro: nn.Module, fake: FakeBackend, engines: Path, simulated: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_SIZE", Size(32, 32))
    monkeypatch.setattr(Simulated, "program", lambda self, source, job: EagerProgram(source.model("decode", job.dtype, CPU)))
    config = AccelConfig(backend="auto", sizes=("32x32",), engine_dir=str(engines), decode_dtype=FLOAT8, on_miss="error")
    with accelerate(micro, config) as handle:
        decoded(micro, latents("32x32"))
        assert handle.report().as_dict()["calls"]["decode"] == {"fused": 1}
    assert not fake.calls


def test_the_fused_backend_gives_the_scales_to_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    source = ModelSource(diffusers.AutoencoderKLQwenImage.from_pretrained(TINY_VAE))
    made = {}

    class Network:
        nbytes = 0

        def __init__(self, state: object, **options: object) -> None:
            made.update(options)

        def compile(self, progress: object) -> None: ...

    monkeypatch.setattr(fused, "FusedDecoder", Network)
    monkeypatch.setattr(calibration, "_SIZE", Size(64, 64))
    job = Job("decode", source.topology, torch.bfloat16, CPU, float8=True)
    fused.FusedBackend().program(source, job)
    assert len(made["float8"]) == 26
    fused.FusedBackend().program(source, Job("decode", source.topology, torch.bfloat16, CPU))
    assert made["float8"] == {}
    monkeypatch.setattr(
        fused, "calibrated_peaks", lambda *_: dict.fromkeys(calibrated_layers(published("decode")).values(), float("nan"))
    )
    with pytest.raises(BackendUnavailableError, match="which gives no scale"):
        fused.FusedBackend().program(source, job)


# ---- calibration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were measured."""
    jobs: list[Job] = []

    def measure(source: ModelSource, job: Job) -> dict[str, float]:
        jobs.append(job)
        return {"a": 1.5, "b": float(len(jobs))}

    monkeypatch.setattr(calibration, "measured_peaks", measure)
    return jobs


def test_calibration_is_kept_with_the_fingerprint_of_the_weights(micro: nn.Module, measured: list[Job], tmp_path: Path) -> None:
    source = ModelSource(micro, tmp_path)
    job = Job("decode", source.topology, torch.bfloat16, CPU, float8=True)
    first = calibrated_peaks(source, job)
    assert calibrated_peaks(ModelSource(micro, tmp_path), job) == first
    assert len(measured) == 1
    path = calibration_path(tmp_path, "decode", source.fingerprint("decode", torch.float32))
    assert json.loads(path.read_text())["weights"] == source.fingerprint("decode", torch.float32)
    with torch.no_grad():
        next(micro.decoder.parameters()).add_(1)
    assert calibrated_peaks(source, job) != first
    assert len(measured) == 2
    assert len(list(tmp_path.iterdir())) == 2, "that of the other weights stays, and nothing else"


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 2, "weights": "x", "peaks": {}}'])
def test_a_damaged_calibration_is_measured_again(micro: nn.Module, measured: list[Job], tmp_path: Path, text: str) -> None:
    source = ModelSource(micro, tmp_path)
    job = Job("decode", source.topology, torch.bfloat16, CPU, float8=True)
    path = calibration_path(tmp_path, "decode", source.fingerprint("decode", torch.float32))
    path.write_text(text)
    assert calibrated_peaks(source, job) == {"a": 1.5, "b": 1.0}
    assert calibrated_peaks(source, job) == {"a": 1.5, "b": 1.0}
    assert len(measured) == 1


def test_without_a_folder_nothing_is_written(micro: nn.Module, measured: list[Job], tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    job = Job("decode", ModelSource(micro).topology, torch.bfloat16, CPU, float8=True)
    assert calibrated_peaks(ModelSource(micro), job)["a"] == 1.5
    (tmp_path / "file").write_text("")
    assert calibrated_peaks(ModelSource(micro, tmp_path / "file" / "below"), job)["a"] == 1.5
    assert "cannot be kept" in caplog.text


# ---- commands -------------------------------------------------------------------------------------------------------


def test_bench_knows_float8_of_the_fused_decoder_alone() -> None:
    method = parse_method("fused:fp8", torch.bfloat16)
    assert method.label == "fused fp8"
    assert method.vae_dtype == torch.bfloat16
    trials = make_trials([method, parse_method("diffusers", torch.bfloat16)], [Size(32, 32)], ("decode", "encode"))
    assert [(trial.method.name, trial.task) for trial in trials] == [
        ("diffusers", "decode"), ("fused", "decode"), ("diffusers", "encode"),
    ]  # fmt: skip


def test_verify_reports_the_psnr_of_float8(cli: Cli, simulated: Simulated, tmp_path: Path) -> None:
    arguments = ("verify", "--vae", TINY_VAE, "--backend", "fused", "--sizes", "64x64", "--device", "cpu", "--json")
    result = cli(*arguments, "--decode-dtype", "float8_e4m3fn", "--engine-dir", tmp_path)
    assert result.code == 0
    found = {network["method"]: network for network in result.document["networks"]}
    assert found["decode"]["dtype"] == FLOAT8
    assert 40 < found["decode"]["psnr_db"] < 55 < found["encode"]["psnr_db"] + 20
    assert found["encode"]["dtype"] == "bfloat16"
    assert list(tmp_path.glob("calibration_decode_*.json"))


def test_verify_needs_something_to_verify(cli: Cli, micro_folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((), "give --engine-dir"),
        (("--engine-dir", tmp_path, "--decode-dtype", "fp8"), "are for --backend"),
        (("--backend", "inductor"), "is for fused and eager"),
    ):
        result = cli("verify", "--vae", micro_folder, *arguments, "--json")
        assert result.code == 2
        assert message in result.document["error"]["message"]
    refused = cli("verify", "--vae", micro_folder, "--backend", "fused", "--device", "cpu", "--json")
    assert refused.code == 1
    assert any("NVIDIA" in reason for reason in refused.document["error"]["reasons"])


@pytest.mark.numeric
def test_verify_runs_a_backend_without_engines(cli: Cli, micro_folder: Path) -> None:
    result = cli("verify", "--vae", micro_folder, "--backend", "eager", "--sizes", "32x32", "--device", "cpu", "--json")
    assert result.code == 0
    assert {network["method"] for network in result.document["networks"]} == {"encode", "decode"}
    assert all(network["relative_error"] <= network["relative_limit"] < 1e-5 for network in result.document["networks"])
