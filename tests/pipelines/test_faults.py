"""What may go wrong around a request, and what the pipeline is worth afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends import registry
from qwen_vae_accel.backends.base import DirectBackend, Environment, Job
from qwen_vae_accel.backends.eager import EagerBackend
from qwen_vae_accel.errors import InvalidInputError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.plugin.methods import handle_of
from tests.helpers import FakeBackend, replaced_methods, state
from tests.pipelines.cases import BY_NAME, IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from tests.pipelines.exact import RequestReference
from tests.pipelines.factory import STEPS, Case, micro_vae
from tests.pipelines.test_matrix import ONE_STEP, assert_fast, largest_difference


class OwnProcessor(VaeImageProcessor):
    """Somebody's own post-processing."""

    def postprocess(self, image: Tensor, output_type: str = "pil", do_denormalize: Any = None) -> Any:
        return [image.transpose((0, 1)) for image in super().postprocess(image, output_type, do_denormalize)]


def test_a_pipeline_with_its_own_postprocess() -> None:
    pipeline = TEXT_TO_IMAGE.pipeline()
    own = type("OwnPipeline", (type(pipeline),), {})(**pipeline.components)
    own.set_progress_bar_config(disable=True)
    own.image_processor = OwnProcessor(vae_scale_factor=16)
    before = state(own.image_processor)
    with accelerate(own, backend="eager") as handle:
        own.image_processor.postprocess = lambda image, output_type: "mine"
        assert TEXT_TO_IMAGE.request(own) == list("mine")
        del own.image_processor.postprocess
        report = handle.report()
        assert state(own.image_processor) == before
    assert report.as_dict()["left_alone"] == ["postprocess: its image processor is a OwnProcessor, not a VaeImageProcessor"]
    assert report.as_dict()["calls"] == {"encode": {}, "decode": {"eager": 1}}
    assert "left alone: postprocess" in str(report)


def halved(case: Case) -> Any:
    """A pipeline in bfloat16 whose VAE is in float32."""
    pipeline = case.pipeline()
    for name in ("transformer", "text_encoder"):
        getattr(pipeline, name).to(torch.bfloat16)
    return pipeline


@pytest.mark.parametrize("case", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE], ids=lambda case: case.name)
def test_float32_vae_in_a_bfloat16_pipeline(case: Case) -> None:
    pipeline = halved(case)
    try:
        plain = case.request(pipeline)
    except RuntimeError:
        plain = None
    with accelerate(pipeline, backend="eager") as handle:
        if plain is None:  # image-to-image: its latents come from the VAE and do not meet the transformer's dtype
            with pytest.raises(RuntimeError):
                case.request(pipeline)
        else:
            assert largest_difference(case.request(pipeline), plain) <= ONE_STEP
            assert_fast(handle, case)
    assert case is not TEXT_TO_IMAGE or plain is not None


@pytest.mark.parametrize("name", ["EditPlus", "Layered"])
def test_editing_with_a_float32_vae_in_a_bfloat16_pipeline(name: str) -> None:
    """Plain editing pipelines hand such a VAE bfloat16 images and fail; accelerated ones fail as clearly, and survive."""
    case = BY_NAME[name]
    pipeline = halved(case)
    with pytest.raises(RuntimeError, match="dtype|type"):
        case.request(pipeline)
    with accelerate(pipeline, backend="eager"):
        with pytest.raises(RuntimeError, match="dtype|type"):
            case.request(pipeline)
        pipeline.vae.to(torch.bfloat16)
        fast = case.request(pipeline)
    RequestReference(pipeline, lambda: case.request(pipeline)).check(fast)


@pytest.mark.numeric
def test_decoding_in_bfloat16_for_a_float32_vae() -> None:
    pipeline = TEXT_TO_IMAGE.pipeline()
    exact = RequestReference(pipeline, lambda: TEXT_TO_IMAGE.request(pipeline), torch.bfloat16)
    with accelerate(pipeline, backend="eager", decode_dtype="bfloat16") as handle:
        exact.check(TEXT_TO_IMAGE.request(pipeline))
        assert_fast(handle, TEXT_TO_IMAGE)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupt_between_steps(error: type[BaseException]) -> None:
    pipeline = IMAGE_TO_IMAGE.pipeline()
    plain = IMAGE_TO_IMAGE.request(pipeline)

    def stop(*_: Any) -> dict[str, Any]:
        raise error("enough")

    with accelerate(pipeline, backend="eager") as handle:
        with pytest.raises(error, match="enough"):
            IMAGE_TO_IMAGE.request(pipeline, callback_on_step_end=stop)
        assert handle.report().as_dict()["calls"] == {"encode": {"eager": 1}, "decode": {}, "preprocess": {"device": 1}}
        assert largest_difference(IMAGE_TO_IMAGE.request(pipeline), plain) <= 1
    assert largest_difference(IMAGE_TO_IMAGE.request(pipeline), plain) == 0


def test_the_pipelines_own_interrupt() -> None:
    """Setting ``_interrupt`` skips the remaining steps; the image is decoded all the same."""
    pipeline = TEXT_TO_IMAGE.pipeline()
    steps = []

    def stop(pipeline: Any, step: int, *_: Any) -> dict[str, Any]:
        steps.append(step)
        pipeline._interrupt = True
        return {}

    plain = TEXT_TO_IMAGE.request(pipeline, callback_on_step_end=stop)
    with accelerate(pipeline, backend="eager") as handle:
        assert largest_difference(TEXT_TO_IMAGE.request(pipeline, callback_on_step_end=stop), plain) <= 1
        assert_fast(handle, TEXT_TO_IMAGE)
    assert len(steps) == 2 and STEPS > 1


def test_interrupt_inside_an_engine(fake: FakeBackend, tmp_path: Any) -> None:
    """The engine is free again: the next request runs, and another size can take its place."""
    pipeline = TEXT_TO_IMAGE.pipeline()
    plain = TEXT_TO_IMAGE.request(pipeline)

    def interrupt() -> None:
        fake.on_run = None
        raise KeyboardInterrupt

    options = {"sizes": ["96x64", "64x64"], "max_resident": 1, "verify": False}
    with accelerate(pipeline, backend="tensorrt", engine_dir=tmp_path, **options) as handle:
        fake.on_run = interrupt
        with pytest.raises(KeyboardInterrupt):
            TEXT_TO_IMAGE.request(pipeline)
        assert largest_difference(TEXT_TO_IMAGE.request(pipeline), plain) <= 1
        TEXT_TO_IMAGE.request(pipeline, width=64)
        report = handle.report().as_dict()
    assert report["calls"]["decode"] == {"tensorrt": 2} and report["evictions"] == 1


def test_pipeline_to_another_dtype_and_back() -> None:
    pipeline, half = TEXT_TO_IMAGE.pipeline(), TEXT_TO_IMAGE.pipeline().to(torch.bfloat16)
    exact = RequestReference(half, lambda: TEXT_TO_IMAGE.request(half))
    with accelerate(pipeline, backend="eager") as handle:
        pipeline.to(torch.bfloat16)
        assert pipeline.vae.dtype == torch.bfloat16
        exact.check(TEXT_TO_IMAGE.request(pipeline))
        pipeline.to("cpu", torch.float32)
        TEXT_TO_IMAGE.request(pipeline)
        assert_fast(handle, TEXT_TO_IMAGE, requests=2)


def test_another_vae_after_accelerate() -> None:
    pipeline = TEXT_TO_IMAGE.pipeline()
    handle = accelerate(pipeline, backend="eager")
    first, pipeline.vae = pipeline.vae, micro_vae()
    plain = TEXT_TO_IMAGE.request(pipeline)
    report = handle.report().as_dict()
    assert report["calls"]["decode"] == {} and "replaced after accelerate" in report["note"]
    second = accelerate(pipeline, backend="eager")
    assert second is not handle
    assert largest_difference(TEXT_TO_IMAGE.request(pipeline), plain) <= 1
    assert second.report().as_dict()["calls"]["decode"] == {"eager": 1}
    second.restore()
    handle.restore()
    assert handle_of(first) is None and handle_of(pipeline.vae) is None
    assert not replaced_methods(pipeline.image_processor)


def test_a_vae_on_another_device_than_the_latents() -> None:
    vae = micro_vae()
    with accelerate(vae, backend="eager"), torch.no_grad(), pytest.raises(InvalidInputError, match="meta"):
        vae.decode(torch.empty(1, 6, 1, 4, 4, device="meta"))


# Out of memory. A direct backend that is preferred to eager and has less memory than it wants.


class Wrapped:
    """A program with something in front of it."""

    def __init__(self, program: Any, before: Callable[[str], None]) -> None:
        self._program, self._before = program, before
        self.nbytes = 0

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
        self._before("run")
        return self._program(x)

    def tiled(self, x: Tensor, tile_pixels: int) -> Tensor:
        self._before("tiled")
        return self._program.tiled(x, tile_pixels)


class Short(DirectBackend):
    """Raises ``error`` where it is told to: in ``run`` or while making its ``program``."""

    name: ClassVar[str] = "fused"

    def __init__(self, where: str, error: Exception) -> None:
        self.where, self.error, self.tried = where, error, 0

    def reasons(self, environment: Environment, job: Job) -> list[str]:
        return []

    def _fail(self, where: str) -> None:
        if where in self.where:
            self.tried += 1
            raise self.error

    def program(self, source: ModelSource, job: Job) -> Any:
        self._fail("program")
        return Wrapped(EagerBackend().program(source, job), self._fail)


class ShortEager(EagerBackend):
    """Eager that has no memory in the places that ``where`` lists."""

    where: tuple[str, ...] = ("run",)

    def _fail(self, where: str) -> None:
        if where in self.where:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {where}")

    def program(self, source: ModelSource, job: Job) -> Any:
        return Wrapped(super().program(source, job), self._fail)


ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.5 GiB."),
    RuntimeError("run_func_(...) failed: CUDA out of memory"),
]


@pytest.mark.parametrize("config", ["auto", "fused"])
@pytest.mark.parametrize("error", ERRORS, ids=["typed", "text"])
@pytest.mark.parametrize("where", ["run", "program"])
def test_out_of_memory_is_retried(where: str, error: Exception, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Short(where, error)
    monkeypatch.setattr(registry, "_BACKENDS", (short, EagerBackend()))
    pipeline = IMAGE_TO_IMAGE.pipeline()
    plain = IMAGE_TO_IMAGE.request(pipeline)
    with accelerate(pipeline, backend=config) as handle:
        assert largest_difference(IMAGE_TO_IMAGE.request(pipeline), plain) <= 1
        report = handle.report().as_dict()
        assert report["calls"]["encode"] == report["calls"]["decode"] == {"eager": 1}
        assert [f["method"] for f in report["fallbacks"]] == ["encode", "decode"]
        assert all("fused: out of memory at 96x64" in f["reason"] for f in report["fallbacks"][1:])
        assert "out of memory" in str(handle.report())
        # It is tried again at the next request, when there may be room.
        short.where, tried = "", short.tried
        IMAGE_TO_IMAGE.request(pipeline)
        assert handle.report().as_dict()["calls"]["decode"] == {"eager": 1, "fused": 1}
        assert short.tried == tried


@pytest.mark.parametrize("bands", [True, False])
def test_the_last_resort_is_in_bands(bands: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = ShortEager()
    eager.where = ("run",) if bands else ("run", "tiled")
    monkeypatch.setattr(registry, "_BACKENDS", (Short("run", ERRORS[0]), eager))
    pipeline = TEXT_TO_IMAGE.pipeline()
    plain = TEXT_TO_IMAGE.request(pipeline, height=320)
    with accelerate(pipeline) as handle:
        if bands:
            assert largest_difference(TEXT_TO_IMAGE.request(pipeline, height=320), plain) <= 1
            reason = handle.report().as_dict()["fallbacks"][0]["reason"]
            assert "fused: out of memory at 96x320" in reason and "eager in one piece: out of memory" in reason
        else:
            with pytest.raises(torch.OutOfMemoryError, match="tiled"):
                TEXT_TO_IMAGE.request(pipeline, height=320)
    assert largest_difference(TEXT_TO_IMAGE.request(pipeline, height=320), plain) == 0


def test_out_of_memory_in_an_engine(fake: FakeBackend, tmp_path: Any) -> None:
    pipeline = TEXT_TO_IMAGE.pipeline()
    plain = TEXT_TO_IMAGE.request(pipeline)
    with accelerate(pipeline, backend="tensorrt", engine_dir=tmp_path, sizes=["96x64"], verify=False) as handle:
        handle.warmup(progress=False)

        def fail() -> None:
            fake.on_run = None
            raise ERRORS[0]

        fake.on_run = fail
        for _ in range(2):
            assert largest_difference(TEXT_TO_IMAGE.request(pipeline), plain) <= 1
        report = handle.report().as_dict()
    assert report["calls"]["decode"] == {"eager": 1, "tensorrt": 1}
    assert [f["reason"] for f in report["fallbacks"]] == ["tensorrt: out of memory at 96x64"]


def test_an_engine_that_does_not_fit_is_tried_again(fake: FakeBackend, tmp_path: Any) -> None:
    pipeline = TEXT_TO_IMAGE.pipeline()
    options = {"backend": "tensorrt", "engine_dir": tmp_path, "sizes": ["96x64"], "verify": False}
    with accelerate(pipeline, **options) as handle:
        handle.warmup(progress=False)
    fake.fail_load = ERRORS[0]
    with accelerate(pipeline, **options, on_miss="fallback") as handle:
        TEXT_TO_IMAGE.request(pipeline)
        fake.fail_load = None
        TEXT_TO_IMAGE.request(pipeline)
        assert handle.report().as_dict()["calls"]["decode"] == {"eager": 1, "tensorrt": 1}


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", (Short("run", RuntimeError("mat1 and mat2 disagree")), EagerBackend()))
    pipeline = TEXT_TO_IMAGE.pipeline()
    with accelerate(pipeline) as handle:
        with pytest.raises(RuntimeError, match="disagree"):
            TEXT_TO_IMAGE.request(pipeline)
        assert handle.report().as_dict()["calls"]["decode"] == {}
