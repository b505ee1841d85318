"""The benchmark of whole requests: real pipelines, every part timed, the fast path proved, tables made of the JSON alone."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit

from qwen_vae_accel import accelerate
from qwen_vae_accel.bench.machine import machine
from qwen_vae_accel.bench.methods import BenchError
from qwen_vae_accel.bench.serve import measurement
from qwen_vae_accel.bench.serve.measurement import Measurement, postprocessing
from qwen_vae_accel.bench.serve.pipelines import ImageRequest, Pipelines, random_transformer
from qwen_vae_accel.bench.serve.request_sheet import make_document, make_sheet
from qwen_vae_accel.bench.serve.stopwatch import Stopwatch
from qwen_vae_accel.demo.tiny_pipeline import TINY_TRANSFORMER
from qwen_vae_accel.page.markdown import to_markdown
from qwen_vae_accel.sizes import Size
from tests.helpers import CPU, FakeBackend

if TYPE_CHECKING:
    from tests.fixtures_cli import Cli

pytest_plugins = ["tests.fixtures_cli"]


@pytest.fixture(autouse=True)
def small_area(monkeypatch: pytest.MonkeyPatch) -> None:
    """Editing scales its images to an area of 64^2 instead of 1024^2; the warm-up is as small."""
    monkeypatch.setattr(measurement, "WARMUP", Size(32, 48))
    original = edit.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: original(area // 256, ratio))


@pytest.fixture
def pipelines(micro_folder: Path) -> Pipelines:
    return Pipelines(micro_folder, "tiny", CPU, torch.float32)


def markdown(document: dict[str, Any]) -> str:
    return to_markdown(make_sheet(document))


def measured(pipelines: Pipelines, task: str, *sizes: Size, backend: str = "auto", engine_dir: Path | None = None) -> list[Any]:
    folder = None if engine_dir is None else str(engine_dir)
    return Measurement(pipelines, 1, backend, folder, lambda line: None).run({task: sizes})[0]


def test_the_command_measures_both_tasks_plain_and_accelerated(cli: Cli, micro_folder: Path, tmp_path: Path) -> None:
    result = cli(
        "serve-bench", "--model", micro_folder, "--transformer", "tiny", "--sizes", "96x64,48x100", "--repeats", "2",
        "--device", "cpu", "-o", tmp_path, "--name", "small", "--json",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    document = result.document
    rows = document["requests"]
    assert [(row["task"], row["size"], row["encoded"], row["decoded"], row["steps"]) for row in rows] == [
        ("t2i", "96x64", None, "96x64", 5),
        ("t2i", "48x96", None, "48x96", 5),
        ("i2i", "96x64", "64x64", "64x64", 4),
        ("i2i", "48x100", "32x96", "32x96", 4),
    ]
    for row in rows:
        assert row["error"] is None
        parts = {"denoising", "decode", "postprocess", "other", "total"}
        parts |= {"preprocess", "encode"} if row["task"] == "i2i" else set()
        for side in ("plain", "accelerated"):
            first = row[side]["first"]
            assert set(first) == set(row[side]["median"]) == parts
            assert first["total"] == pytest.approx(sum(ms for part, ms in first.items() if part != "total"))
            assert all(first[part] > 0 for part in parts - {"other"})
            assert row[side]["samples"] == 2
        calls = {"decode": {"eager": 3}, "postprocess": {"device": 3}}
        if row["task"] == "i2i":
            calls |= {"preprocess": {"device": 3}, "encode": {"eager": 3}}
        assert row["accelerated"]["served"] == calls
        assert row["difference"]["largest"] <= 1  # a rounding the other way
        medians = row["plain"]["median"], row["accelerated"]["median"]
        both = [median["decode"] + median["postprocess"] for median in medians]
        assert row["speedup"]["decode_postprocess"] == pytest.approx(both[0] / both[1])
    # The warm-up's 2:3 is scaled to 64x64 too, where the area is so small.
    assert [row["new_size"] for row in rows] == [True, True, False, True]
    assert document["postprocess"]["size"] == "1328x1328"
    assert document["summary"]["i2i"]["encode"] == pytest.approx(
        (rows[2]["speedup"]["encode"] * rows[3]["speedup"]["encode"]) ** 0.5
    )
    assert document["machine"]["device"] == "cpu"
    assert document["settings"]["backend"] == "auto"
    saved = json.loads((tmp_path / "small.json").read_text())
    assert saved["requests"] == rows
    assert (tmp_path / "small.md").read_text() == markdown(saved)
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    assert "guide" not in markdown(saved)  # figures of a GPU do not stand beside those of a CPU


def test_engines_are_built_first_and_serve_what_a_request_encodes_and_decodes(
    pipelines: Pipelines, fake: FakeBackend, tmp_path: Path
) -> None:
    row = measured(pipelines, "i2i", Size(64, 32), backend="tensorrt", engine_dir=tmp_path)[0]
    assert row["error"] is None
    assert row["encoded"] == row["decoded"] == "96x32"
    served = row["accelerated"]["served"]
    processing = {"preprocess": {"device": 2}, "postprocess": {"device": 2}}
    assert served == {"encode": {"tensorrt": 2}, "decode": {"tensorrt": 2}, **processing}


def test_a_request_that_was_not_fast_is_an_error(pipelines: Pipelines, fake: FakeBackend, tmp_path: Path) -> None:
    pipelines.run(ImageRequest("t2i", Size(32, 32)))
    with accelerate(pipelines.pipeline("t2i"), backend="tensorrt", engine_dir=tmp_path, on_miss="fallback") as handle:
        measuring = Measurement(pipelines, 1, "tensorrt", str(tmp_path), lambda line: None)
        done = measuring._send(ImageRequest("t2i", Size(32, 32)), handle)
    assert "decode was served by eager" in done.values["error"]


def test_a_failed_request_is_a_row_and_the_others_are_measured(
    pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    run = Pipelines.run

    def fails_once(self: Pipelines, request: ImageRequest, output_type: str = "pil") -> Any:
        if request.size == Size(64, 64):
            raise torch.OutOfMemoryError("out of memory")
        return run(self, request, output_type)

    monkeypatch.setattr(Pipelines, "run", fails_once)
    bad, good = measured(pipelines, "t2i", Size(64, 64), Size(32, 32))
    assert "plain: OutOfMemoryError" in bad["error"]
    assert good["error"] is None
    document = make_document([bad, good], [], None, {"device": "cpu", "cpu": "Some CPU"}, SETTINGS, "serve-bench")
    assert "Failed: t2i 64x64" in markdown(document)
    assert document["summary"]["t2i"]["total"] == pytest.approx(good["speedup"]["total"])


SETTINGS = {"backend": "auto", "repeats": 1, "dtype": "fp32", "weights": "random", "transformer": "tiny"}


def test_the_guides_figures_stand_beside_those_of_a_gpu(pipelines: Pipelines) -> None:
    row = measured(pipelines, "t2i", Size(32, 32))[0]
    for side in ("plain", "accelerated"):
        row[side]["peak_mib"] = 1000.0
        row[side]["activation_mib"] = {"decode": 100.0}
    row |= {"size": "1328x1328", "decoded": "1328x1328"}
    memory = [{"task": "t2i", "plain_mib": 3000.0, "accelerated_mib": 3100.0, "extra_mib": 100.0, "warmup_s": 1.0}]
    facts = {"device": "cuda", "device_name": "Some GPU", "cpu": "Some CPU"}
    text = markdown(make_document([row], memory, None, facts, SETTINGS, "serve-bench"))
    assert "157.6 / 106.2, 1.48x" in text
    assert "304.1" in text
    assert "published for an H100" in text
    assert "3000 / 3100" in text


def test_the_stopwatch_leaves_no_trace(pipelines: Pipelines) -> None:
    pipeline = pipelines.pipeline("i2i")
    pipelines.run(ImageRequest("i2i", Size(64, 64)))  # diffusers keeps the state of a call in the VAE
    before = [dict(owner.__dict__) for owner in (pipeline.vae, pipeline.image_processor)]
    with Stopwatch(pipeline, CPU) as watch:
        pipelines.run(ImageRequest("i2i", Size(64, 64)))
    assert set(watch.ms) == {"preprocess", "encode", "denoising", "decode", "postprocess"}
    for owner, attributes in zip((pipeline.vae, pipeline.image_processor), before, strict=True):
        assert dict(owner.__dict__) == attributes
    with accelerate(pipeline):
        with Stopwatch(pipeline, CPU), pytest.raises(ZeroDivisionError):
            pipeline.transformer.register_forward_pre_hook(lambda *_: 1 / 0)
            pipelines.run(ImageRequest("i2i", Size(64, 64)))
        pipeline.transformer._forward_pre_hooks.clear()
    assert [dict(owner.__dict__) for owner in (pipeline.vae, pipeline.image_processor)] == before


def test_a_random_transformer_is_finite_and_has_tables() -> None:
    config = {**TINY_TRANSFORMER, "num_layers": 8}
    made = [random_transformer(4, CPU, torch.bfloat16, seed, **config) for seed in (0, 0, 1)]
    states = [copy.deepcopy(model.state_dict()) for model in made]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    for name, value in states[0].items():
        assert value.dtype is torch.bfloat16
        assert value.isfinite().all()
        if value.dim() == 1:
            assert (value == (0 if name.endswith("bias") else 1)).all()
    assert made[0].pos_embed.pos_freqs.device.type == "cpu"


def test_values_that_are_not_finite_are_refused(pipelines: Pipelines) -> None:
    with torch.no_grad():
        pipelines.transformer.proj_out.weight.fill_(torch.nan)
    with pytest.raises(BenchError, match="not finite"):
        measured(pipelines, "t2i", Size(32, 32))


def test_post_processing_alone_is_compared_byte_for_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    found = postprocessing(Size(64, 32), CPU, torch.bfloat16, 3)
    assert found["size"] == "64x32"
    assert 0 < found["plain_least_ms"] <= found["plain_ms"]
    assert 0 < found["accelerated_least_ms"] <= found["accelerated_ms"]
    monkeypatch.setattr("qwen_vae_accel.plugin.processing.postprocess.to_pil", lambda pixels: [picture_of(pixels)])
    with pytest.raises(BenchError, match="differs"):
        postprocessing(Size(64, 32), CPU, torch.bfloat16, 3)


def picture_of(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(255 - pixels[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_memory_is_measured_and_the_fused_kernels_serve() -> None:
    device = torch.device("cuda", 0)
    pipelines = Pipelines(None, "tiny", device, torch.bfloat16)
    measuring = Measurement(pipelines, 1, "auto", None, lambda line: None, offload_reference=True)
    rows, memory = measuring.run({"t2i": [Size(256, 256)], "i2i": [Size(64, 64)]})
    for row in rows:
        assert row["error"] is None
        assert row["accelerated"]["served"]["decode"] == {"fused": 2}
        assert row["accelerated"]["served"]["postprocess"] == {"device": 2}
        assert row["accelerated"]["served"].get("preprocess") == ({"device": 2} if row["task"] == "i2i" else None)
        assert row["plain"]["peak_mib"] > row["plain"]["activation_mib"]["decode"] > 0
    assert [entry["task"] for entry in memory] == ["t2i", "i2i"]
    assert all(entry["extra_mib"] == entry["accelerated_mib"] - entry["plain_mib"] for entry in memory)
    document = make_document(rows, memory, None, machine(device), SETTINGS, "serve-bench")
    assert "extra memory at rest" in markdown(document)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "t2v"], "t2i, i2i or both"),
        (["--sizes", "12x"], "neither WIDTHxHEIGHT"),
        (["--backend", "cuda"], "backend"),
        (["--model", "nowhere", "--transformer", "tiny"], "nowhere"),
        (["--transformer", "huge", "--sizes", "32x32"], "full or tiny"),
        (["--repeats", "0"], "repeats"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(cli: Cli, arguments: list[str], message: str) -> None:
    result = cli("serve-bench", "--device", "cpu", *arguments)
    assert result.code in (1, 2)
    assert message in " ".join(result.stderr.split())


def test_without_transformers_it_says_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = cli("serve-bench", "--device", "cpu", "--transformer", "tiny", "--sizes", "32x32", "--json")
    assert result.code == 2
    assert json.loads(result.stdout)["error"]["message"].startswith("a pipeline needs transformers: pip install")
