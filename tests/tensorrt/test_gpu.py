"""The REAL thing: TensorRT or TensorRT-RTX, on a GPU. Needs both; prints what it ran, for a report.

Run with ``make test-gpu``. On a GPU without TensorRT these tests are skipped with that reason; on a GPU that the installed
flavour does not run on, its own reasons are shown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends.base import Environment
from qwen_vae_accel.backends.tensorrt import TensorRTBackend
from qwen_vae_accel.backends.tensorrt import flavour as flavours
from qwen_vae_accel.errors import EngineMissingError
from qwen_vae_accel.model import ModelSource
from tests.helpers import Reference, decoded, moments, picture, randn
from tests.tensorrt.conftest import job_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]
MULTI = ["128x128:256x256:384x384", "192x128:384x256:512x384", "128x192:256x384:384x512"]


@pytest.fixture(scope="module")
def machine() -> Environment:
    """This machine, if it can run TensorRT engines."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    found = Environment.detect(torch.device("cuda", torch.cuda.current_device()))
    reasons = flavours.build_reasons(found.packages)
    if reasons:
        pytest.skip("; ".join(reasons))
    print("\n" + "\n".join(f"{name}: {value}" for name, value in found.describe().items()))
    return found


@pytest.fixture
def vae(machine: Environment, tiny: nn.Module) -> Iterator[nn.Module]:
    """The trained tiny VAE on the GPU."""
    reasons = TensorRTBackend().reasons(machine, job_of(ModelSource(tiny), "decode", torch.float16))
    if reasons:
        pytest.skip("; ".join(reasons))
    with torch.no_grad():
        yield tiny.to("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multi", [False, True], ids=["static", "multi-profile"])
def test_engines_are_built_reloaded_and_right(
    vae: nn.Module, machine: Environment, tmp_path: Path, dtype: torch.dtype, multi: bool
) -> None:
    if dtype == torch.bfloat16 and machine.capability is not None and machine.capability < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    sizes = [(256, 256), (384, 256), (300, 180)] if multi else [(256, 256)]
    options = {
        "task": "i2i",
        "backend": "tensorrt",
        "engine_dir": tmp_path,
        "dtype": dtype,
        "multi_profile": multi,
        "sizes": MULTI if multi else ["256x256"],
    }
    with accelerate(vae, on_miss="build", **options) as handle:
        start = time.perf_counter()
        print(handle.warmup(progress=False), f"{time.perf_counter() - start:.1f} s")
    with torch.no_grad():
        inputs = [(randn(1, 16, 1, h // 8, w // 8).cuda(), picture(2, 3, 1, h, w).cuda()) for w, h in sizes]
        references = [(Reference(vae, "decode", z, dtype), Reference(vae, "encode", x, dtype)) for z, x in inputs]
        with accelerate(vae, on_miss="error", **options) as handle:
            for (z, x), (image, parameters) in zip(inputs, references, strict=True):
                image.check(decoded(vae, z))
                parameters.check(moments(vae, x))
            report = handle.report()
    print(report)
    assert report.as_dict()["calls"] == {"decode": {"tensorrt": len(sizes)}, "encode": {"tensorrt": len(sizes)}}
    assert report.as_dict()["fallbacks"] == []


def test_runs_follow_the_callers_stream_and_threads_do_not_meet(vae: nn.Module, tmp_path: Path) -> None:
    options = {"backend": "tensorrt", "engine_dir": tmp_path, "dtype": "fp16", "sizes": ["256x256"]}
    latents = [randn(1, 16, 1, 32, 32, seed=seed).cuda() for seed in range(8)]
    references = [Reference(vae, "decode", z, torch.float16) for z in latents]
    wrong: list[str] = []

    def work(seed: int, own_stream: bool) -> None:
        stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for turn in range(20):
                index = (seed + turn) % len(latents)
                busy = torch.randn(2048, 2048, device="cuda")
                for _ in range(4):
                    busy = busy @ busy * 1e-3
                # The input is made by work that the engine's run must wait for.
                z = latents[index] + (busy.sum() * 0).nan_to_num()
                if not references[index].holds(decoded(vae, z)):
                    wrong.append(f"thread {seed}, turn {turn}")

    with accelerate(vae, on_miss="build", **options) as handle:
        handle.warmup(progress=False)
        threads = [threading.Thread(target=work, args=(seed, seed % 2 == 0)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 80}
    assert wrong == []


def test_scratch_memory_goes_back_and_the_engine_too(vae: nn.Module, tmp_path: Path) -> None:
    options = {"backend": "tensorrt", "engine_dir": tmp_path, "dtype": "fp16", "sizes": ["512x512"]}
    z = randn(1, 16, 1, 64, 64).cuda()
    with accelerate(vae, on_miss="build", **options) as handle:
        decoded(vae, z)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        image = decoded(vae, z)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        kept = torch.cuda.memory_allocated() - before
        print(f"peak {peak / 1e6:.1f} MB, kept {kept / 1e6:.1f} MB", handle.report())
    assert kept <= 4 * image.numel() * image.element_size() and peak > kept


def test_a_foreign_or_damaged_engine_is_refused(vae: nn.Module, tmp_path: Path) -> None:
    options = {"backend": "tensorrt", "engine_dir": tmp_path, "dtype": "fp16", "sizes": ["256x256"]}
    with accelerate(vae, on_miss="build", **options) as handle:
        handle.warmup(progress=False)
    file = tmp_path / "256x256" / "vae_decoder.trt"
    file.write_bytes(file.read_bytes()[:-100])
    with accelerate(vae, on_miss="error", **options), pytest.raises(EngineMissingError, match="damaged"):
        decoded(vae, randn(1, 16, 1, 32, 32).cuda())


def test_the_file_also_loads_as_torch_tensorrts_own_module(vae: nn.Module, tmp_path: Path) -> None:
    import torch_tensorrt
    from torch_tensorrt.dynamo._settings import CompilationSettings

    options = {"backend": "tensorrt", "engine_dir": tmp_path, "dtype": "fp16", "sizes": ["256x256"]}
    with accelerate(vae, on_miss="build", **options) as handle:
        handle.warmup(progress=False)
    module = torch_tensorrt.runtime.TorchTensorRTModule(
        serialized_engine=(tmp_path / "256x256" / "vae_decoder.trt").read_bytes(),
        input_binding_names=["z"],
        output_binding_names=["output0"],
        settings=CompilationSettings(),
    )
    z = randn(1, 16, 1, 32, 32).cuda()
    output = module(z[:, :, 0].half())
    Reference(vae, "decode", z, torch.float16).check(output)
