"""The benchmark: every trial gives a row, the baseline is what it says, the report says what was measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.accuracy import FACTOR
from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.bench import kernel_sheet, kernels
from qwen_vae_accel.bench.harness import Effort, Harness, Row, geometric_mean, make_trials, run_all
from qwen_vae_accel.bench.methods import BenchError, Trial, parse_method, parse_sizes
from qwen_vae_accel.bench.overhead import overhead
from qwen_vae_accel.bench.result import write
from qwen_vae_accel.bench.vae_sheet import make_document, make_sheet
from qwen_vae_accel.cli import bench as command
from qwen_vae_accel.engines.selfcheck import published_error
from qwen_vae_accel.errors import ConfigError
from qwen_vae_accel.kernels.fused import KernelTime
from qwen_vae_accel.loading import VAE_TYPES
from qwen_vae_accel.loading import random_vae as full_size_vae
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.page.charts import png
from qwen_vae_accel.page.markdown import to_markdown
from qwen_vae_accel.page.sheet import Chart
from qwen_vae_accel.sizes import Size
from tests.conftest import random_vae
from tests.helpers import CPU, FakeBackend

if TYPE_CHECKING:
    from tests.fixtures_cli import Cli

pytest_plugins = ["tests.fixtures_cli"]

QUICK = Effort(iterations=3, seconds=1.0, warmup=0)


def rows(vae: nn.Module, folder: Path, *methods: str, tasks: tuple[str, ...] = ("decode", "encode")) -> dict[tuple, Row]:
    """Measure ``vae`` at 32x32."""
    harness = Harness(vae, CPU, QUICK, folder)
    trials = make_trials([parse_method(text, torch.float32) for text in methods], [Size(32, 32)], tasks)
    return {(row.label, row.task): row for row in map(harness.run, trials)}


def test_every_trial_has_a_row_with_its_error_against_float32(micro: nn.Module, fake: FakeBackend, tmp_path: Path) -> None:
    found = rows(micro, tmp_path, "diffusers", "eager", "eager:bf16", "tensorrt")
    assert len(found) == 8
    assert all(row.median_ms and row.p10_ms <= row.median_ms <= row.p90_ms and row.samples == 3 for row in found.values())
    assert found["diffusers fp32", "decode"].relative_l2 == 0
    source = ModelSource(micro)
    for label, task, dtype in (
        ("eager fp32", "encode", torch.float32),
        ("eager bf16", "decode", torch.bfloat16),
        ("tensorrt fp32", "decode", torch.float32),
    ):
        own = published_error(source, Job(task, source.topology, dtype, CPU)).relative
        # Of two that are this far from float64, and no further than that from each other.
        assert 0.1 * own < found[label, task].relative_l2 < (FACTOR + 1) * own
    assert fake.count("build") == 2
    assert "encode" not in micro.__dict__


def test_qwen_image_21_is_measured_as_the_other_vae(tmp_path: Path) -> None:
    found = rows(random_vae("2.1"), tmp_path, "diffusers", "eager")
    assert len(found) == 4 and not any(row.error for row in found.values())
    assert found["diffusers fp32", "decode"].relative_l2 == 0 < (found["eager fp32", "decode"].relative_l2 or 0) < 1e-5


def test_the_command_makes_the_vae_that_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def small(*, kind: str) -> nn.Module:
        made.append(kind)
        return random_vae("2.1")

    monkeypatch.setattr(command, "random_vae", small)
    options = ("--sizes", "32x32", "--methods", "diffusers,eager", "--device", "cpu", "--seconds", "0.1", "--json")
    result = cli("bench", "--vae-type", "qwen-image-2.1", *options)
    assert result.code == 0 and made == ["qwen-image-2.1"]
    assert result.document["settings"]["weights"].startswith("qwen-image-2.1: random")
    assert len(result.document["rows"]) == 4
    wrong = cli("bench", "--vae-type", "wan", *options)
    assert wrong.code == 2 and "qwen-image, qwen-image-2.1" in wrong.document["error"]["message"] and len(made) == 1


def test_what_it_makes_is_of_the_class_that_is_named() -> None:
    random_vae("2.1")  # skips where diffusers does not have it
    small = {"base_dim": 8, "num_res_blocks": 1}
    vaes = {kind: full_size_vae(kind=kind, **small) for kind in VAE_TYPES}
    assert {kind: type(vae).__name__ for kind, vae in vaes.items()} == VAE_TYPES
    for vae in vaes.values():
        for parameter in vae.parameters():
            assert torch.equal(parameter, parameter.bfloat16().float())


def test_a_failure_is_a_row(micro: nn.Module, fake: FakeBackend, tmp_path: Path) -> None:
    fake.fail_build = RuntimeError("out of memory")
    found = rows(micro, tmp_path, "tensorrt", "eager", tasks=("decode",))
    assert found["eager fp32", "decode"].error is None
    failed = found["tensorrt fp32", "decode"]
    assert failed.median_ms is None
    # on_miss="build" falls back, with its reason; that would be measured as another backend's time.
    assert failed.error is not None
    assert "served by eager" in failed.error
    assert "out of memory" in failed.error


def test_a_patched_baseline_is_refused(micro: nn.Module, tmp_path: Path) -> None:
    trial = make_trials([parse_method("diffusers", torch.float32)], [Size(32, 32)], ["decode"])[0]
    with accelerate(micro), pytest.raises(BenchError, match="patched"), trial.method.prepare(micro, trial, tmp_path):
        pass


def test_methods_and_sizes_are_read() -> None:
    assert parse_method("eager:fp16", torch.float32).dtype is torch.float16
    assert parse_method("eager", torch.bfloat16).label == "eager bf16"
    assert parse_sizes(["4_3", "768x1024"]) == [Size(1472, 1136), Size(768, 1024)]
    for bad in ("eagr", "eager:fp8"):
        with pytest.raises(ConfigError):
            parse_method(bad, torch.float32)
    with pytest.raises(ConfigError, match="at least 16"):
        parse_sizes(["8x64"])


def test_the_plugin_adds_little() -> None:
    # Far above what it is: other work on the machine evicts caches. The benchmark prints the number.
    measured = overhead(CPU, calls=30)
    assert 0 < measured["overhead_us"] < 500
    assert measured["overhead_us"] < measured["overhead_cold_us"] + 500
    assert set(measured) == {"overhead_us", "overhead_cold_us", "overhead_latency_us"}


ROW = Row("diffusers", "bf16", "decode", Size(768, 1024), 50.0, 49.0, 52.0, 20, 1.0, 4000.0, 500.0, 10.0, 1e-2, 0.1, 45.0)


def document_of(*found: Row, device: str = "cuda", kernel_times: dict[str, Any] | None = None) -> dict[str, Any]:
    facts = {"device": device, "device_name": "Some GPU", "cpu": "Some CPU", "package:torch": "2.13.0"}
    settings = {"dtype": "bf16", "weights": "random"}
    return make_document(found, facts, settings, None, "qwen-vae-accel bench", kernel_times)


def markdown(document: dict[str, Any]) -> str:
    return to_markdown(make_sheet(document))


def test_speedups_are_against_the_baseline_of_the_same_size() -> None:
    other = dataclasses.replace(ROW, size=Size(512, 512), median_ms=20.0)
    ours = [
        dataclasses.replace(ROW, method="fused", median_ms=10.0),
        dataclasses.replace(other, method="fused", median_ms=1.0),
        dataclasses.replace(ROW, method="eager", median_ms=None, error="OutOfMemoryError: no"),
    ]
    document = document_of(ROW, other, *ours)
    assert [row["speedup"] for row in document["rows"]] == [1.0, 1.0, 5.0, 20.0, None]
    entry = {"method": "fused bf16", "task": "decode", "speedup": pytest.approx(10.0), "sizes": 2}
    assert entry in document["summary"]
    sheet, text = make_sheet(document), markdown(document)
    assert list(sheet.answer.figures) == [("10.00x", "decode")]
    assert "fused bf16 against diffusers bf16, geometric means over 2 sizes" in text
    assert "5.00x" in text
    assert "OutOfMemoryError: no" in text
    assert "26.86" in text  # the guide's figure for this size
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_without_a_baseline_there_are_times_and_no_speedups() -> None:
    alone = dataclasses.replace(ROW, method="fused", median_ms=12.0)
    for rows in ([alone], [alone, dataclasses.replace(alone, size=Size(512, 512))], [ROW]):
        sheet = make_sheet(document_of(*rows))
        assert not sheet.answer.figures
        assert [block.title for block in sheet.blocks if isinstance(block, Chart)] == ["Milliseconds by size"]
        assert png(next(block for block in sheet.blocks if isinstance(block, Chart)), sheet.title)
    failed = dataclasses.replace(ROW, median_ms=None, error="OutOfMemoryError: no")
    assert not any(isinstance(block, Chart) for block in make_sheet(document_of(failed)).blocks)


def test_an_interrupt_keeps_what_was_measured(micro: nn.Module, tmp_path: Path) -> None:
    harness = Harness(micro, CPU, Effort(3, 0.1, 0), tmp_path)
    trials = make_trials([parse_method("diffusers", torch.float32)], [Size(32, 32), Size(48, 32)], ["decode"])
    seen: list[Row] = []

    def done(row: Row) -> None:
        seen.append(row)
        raise KeyboardInterrupt

    assert run_all(harness, trials, done) == seen
    assert len(seen) == 1 and seen[0].median_ms


def test_kernel_times_make_a_table_and_a_roofline(tmp_path: Path) -> None:
    bounds = {"matmul_tflops": 800.0, "copy_tbps": 4.0}
    conv = KernelTime("conv3x3 96->96 norm", "1x1024x1024", 0.25, 0.174, 0.4)
    add = KernelTime("conv_out sum 3", "1x1024x1024", 0.05, 0.0001, 0.12)
    entries = [kernels._entry(row, bounds) for row in (conv, conv, add)]
    assert entries[0]["tflops"] == pytest.approx(696)
    assert entries[0]["share_of_floor"] == pytest.approx(696 / 800)  # bound by arithmetic
    assert entries[2]["share_of_floor"] == pytest.approx(0.12e9 / 4e12 / 0.05e-3)  # bound by traffic
    table = kernel_sheet.grouped(entries)
    assert [row[2] for row in table] == ["2", "1", "3"] and table[0][3] == "0.500" and table[-1][3] == "0.550"
    times = {"size": "1024x1024", "dtype": "bf16", "limits": bounds, "decode": entries, "encode": entries[:1]}
    document = document_of(ROW, kernel_times=times)
    assert "| conv3x3 96->96 norm" in markdown(document)
    written = write(document, make_sheet(document), tmp_path, "x")
    assert [path.name for path in written] == ["x.json", "x.md", "x.png", "x_roofline.png"]
    assert all(path.stat().st_size > 1000 for path in written[2:])
    assert json.loads(written[0].read_text())["kernels"] == times


def test_published_gpu_figures_stand_beside_gpu_runs_only() -> None:
    on_cpu = document_of(ROW, device="cpu")
    assert "26.86" not in markdown(on_cpu)
    assert "published_tensorrt_h100_ms" not in on_cpu["rows"][0]
    assert document_of(ROW)["rows"][0]["published_tensorrt_h100_ms"] == 26.86


def test_the_command_writes_json_markdown_and_a_chart(cli: Cli, micro_folder: Path, tmp_path: Path) -> None:
    result = cli(
        "bench", "--vae", micro_folder, "--sizes", "32x32,64x32", "--methods", "diffusers,eager,fused", "--task", "decode",
        "--iters", "3", "-o", tmp_path, "--name", "small", "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.code == 1  # fused needs a GPU: its rows say so, the others are there
    document = result.document
    assert {row["method"]: bool(row["error"]) for row in document["rows"]} == {
        "diffusers": False,
        "eager": False,
        "fused": True,
    }
    assert document["machine"]["device"] == "cpu"
    assert document["machine"]["package:torch"] == torch.__version__
    saved = json.loads((tmp_path / "small.json").read_text())
    assert saved["rows"] == document["rows"]
    assert "eager fp32" in (tmp_path / "small.md").read_text()
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_stored_whatever_ends_the_run(
    cli: Cli, micro_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(harness: Harness, trials: list[Trial], done: Callable[[Row], None]) -> list[Row]:
        done(harness.run(trials[0]))
        raise KilledError

    monkeypatch.setattr("qwen_vae_accel.cli.bench.run_all", killed)
    with pytest.raises(KilledError):
        cli(
            "bench", "--vae", micro_folder, "--sizes", "32x32,64x32", "--methods", "diffusers", "--task", "decode",
            "--iters", "3", "-o", tmp_path, "--name", "half", "--device", "cpu",
        )  # fmt: skip
    (saved,) = tmp_path.glob("*")
    document = json.loads(saved.read_text())
    assert saved.name == "half.json" and document["settings"]["complete"] is False
    assert [row["size"] for row in document["rows"]] == ["32x32"] and document["rows"][0]["median_ms"] > 0
    assert "32x32" in markdown(document)
