"""``qwen-vae-accel tune``, and an engine directory that holds its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from qwen_vae_accel.backends.base import Environment
from qwen_vae_accel.cli import tune as command
from qwen_vae_accel.errors import TuningError
from qwen_vae_accel.kernels import reasons
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.network import QWEN_IMAGE, QWEN_IMAGE_21, Kind
from qwen_vae_accel.kernels.tuning import measure as autotune
from qwen_vae_accel.kernels.tuning.configs import ConvConfig
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.stored import Machine, Measured, TunedGpu, write_tuned

if TYPE_CHECKING:
    from tests.fixtures_cli import Cli

pytest_plugins = ["tests.fixtures_cli"]

MACHINE = Machine("NVIDIA H200", "9.0", 132, "3.6.0")
MEASURED = Measured(KernelKey(Kind.QKV, 384, 1152), (ConvConfig(64, 64, 8, 3, wave=0.9),), 0.5, 1.0)
TUNED = TunedGpu(MACHINE, "2.11.0", "bfloat16", ("512x512",), "2026-01-01T00:00:00+00:00", (MEASURED,))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_VAE_ACCEL_CPU", "1")


@pytest.fixture
def gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A GPU as far as the command can see; what it asks for is listed."""
    asked = []

    def measure(*arguments):
        asked.append(arguments[:4])
        return [MEASURED]

    monkeypatch.setattr(command, "device_reasons", lambda *_, **__: [])
    monkeypatch.setattr(autotune, "tune", measure)
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device: MACHINE))
    monkeypatch.setattr(command, "describe_gpu", lambda device: Gpu(132, 232448, True, True))
    return asked


def test_without_a_gpu(cli: Cli, no_gpu: None, tmp_path: Path):
    result = cli("tune", "--engine-dir", tmp_path / "engines", "--json")
    assert result.code == 1 and result.document["error"]["type"] == "BackendUnavailableError"
    assert result.document["error"]["reasons"] == ["needs an NVIDIA GPU, not cpu"]
    assert not (tmp_path / "engines").exists()


def test_an_old_gpu_without_triton(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    old = Environment("cuda", "NVIDIA T4", (7, 5))
    monkeypatch.setattr(Environment, "detect", classmethod(lambda cls, device: old))
    monkeypatch.setattr(command.common, "parse_device", lambda text: torch.device("cuda"))
    monkeypatch.setattr(reasons.importlib.util, "find_spec", lambda name: None)
    result = cli("tune", "--engine-dir", tmp_path)
    assert result.code == 1
    assert "triton is not installed" in result.stderr and "needs compute capability >= 8.0, not 7.5" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [("--dtype", "float32", "bfloat16 or float16"), ("--dtype", "int3", "int3"), ("--sizes", "big", "big"),
     ("--device", "tpu", "tpu"), ("--vae-type", "wan", "qwen-image, qwen-image-2.1")],
)  # fmt: skip
def test_options_that_cannot_be_meant(cli: Cli, no_gpu: None, tmp_path: Path, option: str, value: str, reason: str):
    result = cli("tune", "--engine-dir", tmp_path, option, value)
    assert result.code == 2 and reason in result.stderr


def test_a_folder_that_cannot_be_written_is_named_before_measuring(cli: Cli, gpu: list, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "engines", "/proc/engines"):
        result = cli("tune", "--engine-dir", folder, "--json")
        assert result.code == 1 and result.document["error"]["type"] == "EngineError"
        assert str(folder) in result.document["error"]["message"]
    assert gpu == []


def test_what_was_measured_is_kept_and_shown(cli: Cli, gpu: list, tmp_path: Path):
    folder = tmp_path / "engines"
    result = cli("tune", "--engine-dir", folder, "--sizes", "512x512,16_9", "--dtype", "fp16", "--json")
    assert result.code == 0
    assert gpu == [(torch.float16, torch.device("cpu"), [(512, 512), (928, 1664)], QWEN_IMAGE)]
    (path,) = folder.iterdir()
    document = json.loads(path.read_text())
    assert {**document, "file": str(path)} == result.document
    assert document["dtype"] == "float16" and document["sizes"] == ["512x512", "1664x928"]
    assert document["kernels"][0]["choices"][0]["block_rows"] == 64
    assert document["kernels"][0]["milliseconds"] == 0.5 and document["kernels"][0]["shipped_milliseconds"] == 1.0
    text = cli("tune", "--engine-dir", folder).stdout
    assert "qkv 384->1152" in text and "0.50 ms where the shipped configurations take 1.00" in text


def test_the_vae_that_is_asked_for_is_tuned_and_what_was_found_for_the_other_stays(
    cli: Cli, gpu: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    assert cli("tune", "--engine-dir", tmp_path, "--sizes", "512x512", "--json").code == 0
    other = Measured(KernelKey(Kind.CONV, 1152, 1152, sm90=True), (), 2.0, 2.0)
    monkeypatch.setattr(autotune, "tune", lambda *arguments: gpu.append(arguments[:4]) or [other])
    monkeypatch.setattr(command, "runs_sm90", lambda capability: True)
    result = cli("tune", "--engine-dir", tmp_path, "--sizes", "1024x1024", "--vae-type", "qwen-image-2.1", "--json")
    assert result.code == 0 and [arguments[3] for arguments in gpu] == [QWEN_IMAGE, QWEN_IMAGE_21]
    (path,) = tmp_path.iterdir()
    kept = TunedGpu.loads(path.read_text(), MACHINE, Gpu(132, 232448, True, True))
    assert kept.kernels == (other, MEASURED) and kept.sizes == ("1024x1024", "512x512")
    assert "conv 1152->1152" in cli("tune", "--engine-dir", tmp_path, "--vae-type", "qwen-image-2.1").stdout
    again = TunedGpu.loads(path.read_text(), MACHINE, Gpu(132, 232448, True, True))
    assert again.kernels == kept.kernels  # measured anew in place of what it was


def test_a_vae_without_kernels_on_this_gpu_is_told_before_measuring(
    cli: Cli, gpu: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(command, "runs_sm90", lambda capability: False)
    result = cli("tune", "--engine-dir", tmp_path / "engines", "--vae-type", "qwen-image-2.1", "--json")
    assert result.code == 1 and result.document["error"]["type"] == "BackendUnavailableError"
    assert len(result.document["error"]["reasons"]) == 2 and gpu == [] and not (tmp_path / "engines").exists()
    assert all("need compute capability 9.0 (Hopper)" in reason for reason in result.document["error"]["reasons"])


def test_wrong_results_are_not_kept(cli: Cli, gpu: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def wrong(*_):
        raise TuningError("the result differs")

    monkeypatch.setattr(autotune, "tune", wrong)
    result = cli("tune", "--engine-dir", tmp_path, "--json")
    assert result.code == 1 and result.document["error"]["type"] == "TuningError" and list(tmp_path.iterdir()) == []


def test_the_other_commands_leave_the_file_alone(cli: Cli, engines: Path, micro_folder: Path):
    before = cli("list", "--engine-dir", engines, "--device", "cpu", "--json")
    path = write_tuned(engines, TUNED)
    text = path.read_text()
    after = cli("list", "--engine-dir", engines, "--device", "cpu", "--json")
    assert (after.code, after.document) == (before.code, before.document) == (0, before.document)
    pruned = cli("prune", "--engine-dir", engines, "--device", "cpu", "--sizes", "1_1", "--yes", "--json")
    assert pruned.code == 0 and pruned.document["files"]
    adopted = cli("adopt", "--engine-dir", engines, "--vae", micro_folder, "--device", "cpu", "--trust", "--json")
    assert adopted.code == 0 and adopted.document["engines"] == []
    assert path.read_text() == text
