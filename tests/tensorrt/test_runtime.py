"""The runtime, over a STAND-IN for TensorRT (``standin.py``): nothing here runs TensorRT."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch

from qwen_vae_accel.backends.tensorrt import runtime as runtime_module
from qwen_vae_accel.backends.tensorrt.engine import TensorRTError, deserialize
from qwen_vae_accel.backends.tensorrt.runtime import TensorRTProgram
from qwen_vae_accel.errors import EngineError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.sizes import Size
from tests.helpers import CPU, Reference, randn
from tests.tensorrt.conftest import job_of, key_of
from tests.tensorrt.standin import ExecutionContextAllocationStrategy, StandIn, engine_file

STATIC = [((8, 8), (8, 8), (8, 8))]
THREE = [((4, 4), (8, 8), (12, 12)), ((8, 8), (16, 16), (24, 24)), ((4, 8), (8, 16), (12, 24))]


def program(trt: StandIn, data: bytes, dtype: torch.dtype = torch.float32) -> TensorRTProgram:
    engine = deserialize(trt, data, "engine.trt")  # type: ignore[arg-type]
    return TensorRTProgram(engine, dtype, CPU, trt.streams, len(data))


def exact(source: ModelSource, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> Reference:
    return Reference(source.vae, "decode", x, dtype)


# What comes out.


@pytest.mark.numeric
@pytest.mark.parametrize(("engine", "job"), [("FLOAT", torch.float32), ("HALF", torch.bfloat16), ("BF16", torch.bfloat16)])
def test_output_is_the_networks_in_the_jobs_dtype(trt: StandIn, source: ModelSource, engine: str, job: torch.dtype) -> None:
    # An engine of float16 buffers serves a bfloat16 job: buffers have the engine's dtype, results the job's.
    run = program(trt, engine_file("decode", STATIC, dtype=engine), job)
    z = randn(1, 4, 8, 8).to(job)
    output = run(z)
    assert (output.dtype, output.shape, output.is_contiguous()) == (job, (1, 3, 64, 64), True)
    exact(source, z, job).check(output)
    assert len(trt.named("execute_async_v3")) == 1
    assert trt.violations == []


def test_engines_with_a_frame_dimension_are_served(trt: StandIn, source: ModelSource) -> None:
    run = program(trt, engine_file("decode", STATIC, frames=True))
    z = randn(1, 4, 8, 8)
    output = run(z)
    assert output.shape == (1, 3, 64, 64)
    exact(source, z).check(output)
    assert trt.named("set_input_shape") == [("x", (1, 4, 1, 8, 8))]


@pytest.mark.numeric
def test_more_images_than_the_engine_takes_run_one_after_another(trt: StandIn, source: ModelSource) -> None:
    run = program(trt, engine_file("decode", STATIC))
    z = randn(3, 4, 8, 8)
    exact(source, z).check(run(z))
    assert len(trt.named("execute_async_v3")) == 3
    assert trt.violations == []  # each image of the batch is aligned, too


def test_an_engine_with_a_batch_range_takes_them_at_once(trt: StandIn, source: ModelSource) -> None:
    run = program(trt, engine_file("decode", [((1, 8, 8), (2, 8, 8), (4, 8, 8))]))
    z = randn(6, 4, 8, 8)
    exact(source, z).check(run(z))
    assert trt.named("set_input_shape") == [("x", (4, 4, 8, 8)), ("x", (2, 4, 8, 8))]


@pytest.mark.numeric
def test_misaligned_and_strided_input_is_copied(trt: StandIn, source: ModelSource) -> None:
    run = program(trt, engine_file("decode", STATIC))
    odd = torch.zeros(1 + 4 * 64)[1:].view(1, 4, 8, 8).copy_(randn(1, 4, 8, 8))
    strided = randn(1, 4, 8, 8).transpose(2, 3)
    assert odd.data_ptr() % runtime_module.ALIGNMENT
    for z in (odd, strided):
        exact(source, z).check(run(z))
    assert trt.violations == []


# Profiles, shapes, memory, streams.


def test_the_profile_given_is_the_profile_used(trt: StandIn) -> None:
    run = program(trt, engine_file("decode", THREE))
    small, large = randn(1, 4, 8, 8), randn(1, 4, 16, 16)
    run(small, 0)  # a new context has profile 0
    assert trt.named("set_optimization_profile_async") == []
    run(large, 1)
    run(large, 1)
    run(small, 1)  # fits 0 and 1 alike: stays where the caller says
    run(small, 0)
    run(small, 2)
    assert [profile for profile, _ in trt.named("set_optimization_profile_async")] == [1, 0, 2]
    # A switch forgets the shape; the same shape again is not set again.
    shapes = [shape[2:] for _, shape in trt.named("set_input_shape")]
    assert shapes == [(8, 8), (16, 16), (8, 8), (8, 8), (8, 8)]


def test_scratch_is_the_applications_and_as_large_as_the_shape_needs(trt: StandIn) -> None:
    run = program(trt, engine_file("decode", THREE, scratch=[100, 300, 200]))
    run(randn(1, 4, 8, 8), 0)
    run(randn(1, 4, 16, 16), 1)
    assert trt.named("create_execution_context") == [(ExecutionContextAllocationStrategy.USER_MANAGED,)]
    assert [size for _, size in trt.named("set_device_memory")] == [64, 256]
    trt.fail.add("update_device_memory_size_for_shapes")  # it returns 0: the profile's bound is used
    run(randn(1, 4, 12, 12), 1)
    assert trt.named("set_device_memory")[-1][1] == 300
    assert trt.violations == []


def test_memory_of_a_run_lives_until_the_run_is_over_and_no_longer(trt: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, weakref.ref[torch.Tensor]]] = []
    empty = torch.empty

    def tracked(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        if kwargs.get("device") == CPU:  # the runtime's own
            made.append((tensor.data_ptr(), weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(runtime_module.torch, "empty", tracked)
    z = randn(1, 4, 8, 8)
    trt.streams.live = lambda address: address == z.data_ptr() or any(p == address and ref() is not None for p, ref in made)
    run = program(trt, engine_file("decode", STATIC))
    output = run(z)
    assert trt.violations == []
    gc.collect()
    assert [ref() is None for _, ref in made] == [False, True], "the output stays, the scratch memory goes back"
    del output


def test_one_context_for_each_stream(trt: StandIn) -> None:
    run = program(trt, engine_file("decode", STATIC))
    for stream in (7, 8, 7, 9):
        trt.streams.local.stream = stream
        run(randn(1, 4, 8, 8))
    assert [stream for (stream,) in trt.named("execute_async_v3")] == [7, 8, 7, 9]
    assert trt.alive.count("context") == 3


def test_threads_on_the_same_and_on_different_streams(trt: StandIn, source: ModelSource) -> None:
    run = program(trt, engine_file("decode", THREE))
    wrong: list[str] = []

    def work(seed: int) -> None:
        trt.streams.local.stream = 7 + seed % 3
        for turn in range(6):
            side, profile = ((8, 0), (16, 1), (8, 2))[(seed + turn) % 3]
            z = randn(1, 4, side, 16 if profile == 2 else side, seed=seed * 100 + turn)
            if not exact(source, z).holds(run(z, profile)):
                wrong.append(f"{seed}/{turn}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and trt.violations == []
    assert trt.alive.count("context") == 3


def test_everything_is_freed_contexts_first(trt: StandIn) -> None:
    run = program(trt, engine_file("decode", STATIC))
    run(randn(1, 4, 8, 8))
    del run
    gc.collect()
    assert trt.named("free") == [("context",), ("engine",), ("runtime",)]


# Each way it fails: a typed error with TensorRT's reasons, and no image.


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("create_execution_context", "gives no execution context.*out of memory"),
        ("set_optimization_profile_async", "does not switch to optimization profile 1.*in use"),
        ("set_input_shape", r"takes no input of shape \[1, 4, 16, 16\].*profile 1.*setInputShape failed"),
        ("infer_shapes", "cannot infer shapes.*shape inference failed"),
        ("insufficient", r"says that \['x'\] lack"),
        ("get_tensor_shape", r"gives the output the shape \[1, 3, -1, -1\]"),
        ("set_tensor_address", "takes no address for 'x'.*setTensorAddress failed"),
        ("execute_async_v3", "did not run the engine.*enqueueV3 failed"),
    ],
)
def test_a_failed_call_is_an_error_and_not_an_image(trt: StandIn, call: str, says: str) -> None:
    run = program(trt, engine_file("decode", THREE))
    trt.fail.add(call)
    with pytest.raises(TensorRTError, match=says):
        run(randn(1, 4, 16, 16), 1)
    trt.fail.clear()
    assert run(randn(1, 4, 16, 16), 1).shape == (1, 3, 128, 128), "the next call is whole again"


def test_a_failed_call_says_only_its_own_reasons(trt: StandIn) -> None:
    run = program(trt, engine_file("decode", THREE))
    for shape in ((2, 2), (30, 30)):
        with pytest.raises(TensorRTError, match="outside of") as caught:
            run(randn(1, 4, *shape), 0)
        assert str(caught.value).count("outside of") == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("Runtime", "gives no runtime"),
        ("deserialize_cuda_engine", "10.99 cannot load engine.trt: unsupported cc; the engine plan file is not compatible"),
    ],
)
def test_an_engine_that_does_not_load_is_an_error(trt: StandIn, call: str, says: str) -> None:
    trt.fail.add(call)
    with pytest.raises(TensorRTError, match=says):
        program(trt, engine_file("decode", STATIC))


def test_bytes_that_are_no_engine(trt: StandIn) -> None:
    with pytest.raises(TensorRTError, match="magicTag"):
        program(trt, b"not an engine")
    assert issubclass(TensorRTError, EngineError)


def test_requests_that_the_engine_cannot_mean(trt: StandIn) -> None:
    run = program(trt, engine_file("decode", THREE))
    with pytest.raises(TensorRTError, match="profile 3 is not one of the engine's 3"):
        run(randn(1, 4, 8, 8), 3)
    with pytest.raises(TensorRTError, match="on cpu, its input on meta"):
        run(randn(1, 4, 8, 8).to("meta"))
    assert trt.named("execute_async_v3") == []


# What an engine says of itself.


def _tensor(**changes: object) -> dict[str, object]:
    return {"name": "x", "mode": "INPUT", "dtype": "FLOAT", "shape": [1, 4, 8, 8], "location": "DEVICE", **changes}


OUTPUT = _tensor(name="y", mode="OUTPUT", shape=[1, 3, 64, 64])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([_tensor(), _tensor(name="t"), OUTPUT], r"inputs \['x', 't'\]"),
        ([_tensor()], r"outputs \[\]"),
        ([_tensor(dtype="INT8"), OUTPUT], "'x' of the engine is INT8"),
        ([_tensor(location="HOST"), OUTPUT], "host memory"),
        ([_tensor(shape=[1, 4, 64]), OUTPUT], "expected .B, C, H, W."),
    ],
)
def test_an_engine_of_another_kind_is_refused(trt: StandIn, tensors: list[dict[str, object]], says: str) -> None:
    with pytest.raises(TensorRTError, match=says):
        program(trt, engine_file("decode", STATIC, tensors=tensors))


@pytest.mark.parametrize(
    ("method", "channels", "frames", "says"),
    [
        ("decode", (4, 3), False, []),
        ("decode", (4, 3), True, []),
        ("encode", (3, 8), True, []),
        ("decode", (16, 3), False, ["input 'x' has 16 channels, the VAE's decoder has 4"]),
        ("encode", (3, 4), False, ["output 'y' has 4 channels, the VAE's encoder has 8"]),
    ],
)
def test_an_engine_is_compared_with_the_vae(
    trt: StandIn, source: ModelSource, method: str, channels: tuple[int, int], frames: bool, says: list[str]
) -> None:
    run = program(trt, engine_file(method, STATIC, channels=channels, frames=frames))
    found = run.engine.differences(job_of(source, method))
    assert len(found) == len(says) and all(text.startswith(start) for text, start in zip(found, says, strict=True))


def test_profiles_are_compared_with_the_plan_in_their_order(trt: StandIn, source: ModelSource) -> None:
    key = key_of("decode", "32x32:64x64:96x96,64x64:128x128:192x192", multi_profile=True)
    good = [((4, 4), (8, 8), (12, 12)), ((8, 8), (16, 16), (24, 24))]
    job = job_of(source, "decode")

    def differences(profiles: list[tuple[tuple[int, int], ...]]) -> list[str]:
        return program(trt, engine_file("decode", profiles)).engine.range_differences(job, key)  # type: ignore[arg-type]

    assert differences(good) == []
    assert differences(good[:1]) == ["it has 1 optimization profiles, the plan 2"]
    swapped = differences(good[::-1])
    assert len(swapped) == 2 and "optimization profile 0 is 8x8..16x16..24x24" in swapped[0]


@pytest.mark.parametrize("sizes", ["1_1_1024,16_9_1080p", "lightx2v"])
def test_sizes_are_read_back_as_the_plan_writes_them(trt: StandIn, source: ModelSource, sizes: str) -> None:
    guide = key_of("decode", sizes, multi_profile=True)
    job = job_of(source, "decode")
    ranges = [tuple(map(job.input_hw, (p.minimum, p.optimum, p.maximum))) for p in guide.profiles]
    found = program(trt, engine_file("decode", ranges)).engine.sizes("decode", 8)  # type: ignore[arg-type]
    assert [p.name for p in found] == [p.name for p in guide.profiles]
    assert [p.optimum for p in found] == [p.optimum.floor(8) for p in guide.profiles]


def test_profiles_of_two_hosts_in_one_engine_have_names_of_their_own(trt: StandIn, source: ModelSource) -> None:
    job, sizes = job_of(source, "decode"), (Size(1920, 1080), Size(1920, 1088))
    ranges = [tuple(map(job.input_hw, (Size(960, 544), size, Size(1920, 1632)))) for size in sizes]
    found = program(trt, engine_file("decode", ranges)).engine.sizes("decode", 8)  # type: ignore[arg-type]
    assert [p.name for p in found] == ["16_9_1080p", "1920x1088"]


# The stand-in is no wider than the thing.


def test_the_stand_in_has_nothing_that_tensorrt_has_not(rtx: Callable[..., object]) -> None:
    import tensorrt_rtx as real

    from tests.tensorrt import standin

    own = {"refuse", "facts", "tensors", "trt", "kind", "profile", "shape", "addresses", "memory", "on_stream", "entered"}
    for cls in (standin.Runtime, standin.ICudaEngine, standin.IExecutionContext):
        used = {name for name in dir(cls) if not name.startswith("_")} - own
        assert used <= set(dir(getattr(real, cls.__name__))), cls.__name__
    for name in ("DataType", "TensorIOMode", "TensorLocation", "EngineStat", "ExecutionContextAllocationStrategy"):
        members = set(getattr(standin, name).__members__)
        assert members <= set(getattr(real, name).__members__), name
