"""Post-processing on the device gives diffusers' bytes, and leaves what it does not know alone."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import InpaintProcessor, VaeImageProcessor
from PIL import Image
from torch import Tensor

from qwen_vae_accel import accelerate
from qwen_vae_accel.errors import ConfigError, HandleError
from qwen_vae_accel.journal import Journal
from qwen_vae_accel.plugin.methods import handle_of
from qwen_vae_accel.plugin.processing import PostProcessing, pixels, processors_of
from tests.helpers import replaced_methods, state

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Subclass(VaeImageProcessor):
    pass


def journal_calls(journal: Journal) -> dict[str, int]:
    return journal.report("", []).as_dict()["calls"].get("postprocess", {})


def replaced(**options: Any) -> tuple[VaeImageProcessor, Journal]:
    """A processor with its ``postprocess`` replaced."""
    processor, journal = VaeImageProcessor(vae_scale_factor=16, **options), Journal()
    assert PostProcessing.install(processor, journal) is not None
    return processor, journal


def assert_same(image: Tensor, output_type: str = "pil", served: str = "device", **options: Any) -> None:
    """The replaced and the plain processor agree on ``image`` bit for bit, and ``served`` did it."""
    do_denormalize = options.pop("do_denormalize", None)
    before = image.clone()
    expected = VaeImageProcessor(vae_scale_factor=16, **options).postprocess(image, output_type, do_denormalize)
    processor, journal = replaced(**options)
    actual = processor.postprocess(image, output_type, do_denormalize)
    assert type(actual) is type(expected) and len(actual) == len(expected)
    if output_type == "pil":
        for a, b in zip(actual, expected, strict=True):
            assert (a.mode, a.size, a.readonly) == (b.mode, b.size, b.readonly)
            assert a.tobytes() == b.tobytes()
        # What a GPU would run, here on the CPU.
        denormalize = functools.partial(processor._denormalize_conditionally, do_denormalize=do_denormalize)
        block = pixels.on_device(image, denormalize)
        assert (block is None) == (served != "device")
        if block is not None:
            assert [i.tobytes() for i in pixels.to_pil(block)] == [i.tobytes() for i in expected]
    else:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.strides == expected.strides
        assert np.array_equal(actual, expected, equal_nan=True)
    assert journal_calls(journal) == {served: 1}
    assert torch.equal(image.nan_to_num(nan=9.0), before.nan_to_num(nan=9.0))


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images that reach beyond [-1, 1]."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2).to(dtype)


@pytest.mark.parametrize("output_type", ["pil", "np"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 3, 16, 24), (2, 4, 17, 9), (3, 1, 8, 8), (1, 3, 1, 1), (1, 3, 1, 40), (2, 3, 333, 211)], ids=str
)
def test_modes_batches_and_sizes(shape: tuple[int, ...], dtype: torch.dtype, output_type: str) -> None:
    assert_same(images(*shape, dtype=dtype), output_type)


@pytest.mark.parametrize("output_type", ["pil", "np"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_value_of_two_bytes(dtype: torch.dtype, output_type: str) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = torch.where(values.isfinite(), values, torch.zeros_like(values))
    assert_same(values.reshape(1, 1, 256, 256), output_type)
    assert_same(values.reshape(1, 1, 256, 256).expand(1, 3, 256, 256), output_type)


def test_a_million_float32_values() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=generator).to(torch.int32).view(torch.float32)
    bits = torch.where(bits.isfinite(), bits, torch.zeros_like(bits))
    # The values whose scaled images lie nearest to a half, where rounding decides.
    halves = (torch.arange(256, dtype=torch.float64) + 0.5) / 255 * 2 - 1
    near = halves.float()
    steps = [near]
    for _ in range(8):
        steps = [torch.nextafter(steps[0], torch.tensor(-9.0)), *steps, torch.nextafter(steps[-1], torch.tensor(9.0))]
    assert_same(bits.reshape(1, 1, 1024, 1024))
    assert_same(torch.stack(steps)[None, None])
    assert_same(images(4, 4, 511, 513))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [None, [True, True], [1, "yes", None], [True, False], [False, False]], ids=str)
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_denormalize_patterns(pattern: list[bool] | None, dtype: torch.dtype, output_type: str) -> None:
    inside = images(2, 3, 8, 8, dtype=dtype).clamp(-1, 1).abs()
    assert_same(inside, output_type, do_denormalize=pattern)
    assert_same(inside, output_type, do_denormalize=pattern, do_normalize=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("options", [{"do_denormalize": [True, False]}, {"do_normalize": False}], ids=str)
def test_values_outside_the_range_are_cast_by_numpy(options: dict[str, Any]) -> None:
    assert_same(images(2, 3, 8, 8), served="diffusers", **options)
    assert_same(images(2, 3, 8, 8), "np", **options)


def test_nan_and_infinity() -> None:
    image = images(1, 3, 8, 8)
    image[0, 0, 0, 0], image[0, 0, 0, 1] = torch.inf, -torch.inf
    assert_same(image)
    image[0, 1, 3, 3] = torch.nan
    processor, journal = replaced()
    with pytest.warns(RuntimeWarning, match="invalid value"):  # numpy's, and what it makes of NaN
        actual = processor.postprocess(image)
    with pytest.warns(RuntimeWarning, match="invalid value"):
        assert actual[0].tobytes() == VaeImageProcessor().postprocess(image)[0].tobytes()
    assert "NaN" in journal.report("", []).as_dict()["fallbacks"][0]["reason"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [(slice(None),), (0, 0, 0, 0), (1, 2, -1, -1)], ids=["everywhere", "first", "last"])
def test_nan_is_seen_wherever_it_is(where: tuple[Any, ...], dtype: torch.dtype) -> None:
    image = images(2, 3, 333, 211, dtype=dtype)
    image[where] = torch.nan
    assert_same(image, "np")
    denormalize = VaeImageProcessor()._denormalize_conditionally
    assert pixels.on_device(image, denormalize) is None and pixels.in_bands(image, denormalize) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_strides(dtype: torch.dtype, output_type: str) -> None:
    x = images(2, 4, 3, 16, 24, dtype=dtype)
    assert_same(x[:, :3, 1], output_type)
    assert_same(x[:, :3, 1, ::2, 1::3], output_type)
    assert_same(x[:, :, 0].contiguous(memory_format=torch.channels_last), output_type)
    assert_same(x[:1, :1, 0].expand(3, 3, 16, 24), output_type)
    assert_same(x[:, 0].transpose(2, 3), output_type)


def test_inference_mode() -> None:
    with torch.inference_mode():
        assert_same(images(1, 3, 8, 8))
        assert_same(images(1, 3, 8, 8), "np")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("output_type", ["pil", "np"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype, output_type: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = (bits.view(dtype) if dtype != torch.float32 else torch.linspace(-1.1, 1.1, 2**16)).reshape(1, 1, 256, 256)
    values = torch.where(values.isfinite(), values, torch.zeros_like(values)).cuda()
    assert_same(values, output_type)
    for shape in ((1, 3, 1328, 1328), (2, 4, 333, 211), (1, 3, 1, 40)):
        assert_same(images(*shape, dtype=dtype).cuda(), output_type)
    assert_same(images(2, 3, 8, 8, dtype=dtype).abs().clamp(0, 1).cuda(), output_type, do_denormalize=[True, False])
    assert_same(images(2, 4, 3, 16, 24, dtype=dtype).cuda()[:, :3, 1, ::2, 1::3], output_type)


@pytest.mark.parametrize("band", [1, 100, 10**9])
def test_bands_are_no_matter(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "_CPU_BAND_ELEMENTS", band)
    assert_same(images(2, 3, 37, 41, dtype=torch.bfloat16), do_denormalize=[True, True])


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_tensors_pass_through(output_type: str) -> None:
    processor, journal = replaced()
    image = images(1, 3, 8, 8)
    expected = VaeImageProcessor().postprocess(image, output_type)
    assert torch.equal(processor.postprocess(image, output_type), expected)
    assert journal_calls(journal) == {}


BAD: dict[str, tuple[Any, str, Any]] = {
    "an array": (np.zeros((1, 3, 8, 8)), "pil", None),
    "None": (None, "pil", None),
    "three dimensions": (images(3, 8, 8), "pil", None),
    "five dimensions": (images(1, 3, 1, 8, 8), "pil", None),
    "five channels": (images(1, 5, 8, 8), "pil", None),
    "a line of one channel": (images(1, 1, 1, 8), "pil", None),
    "a short list": (images(2, 3, 8, 8), "pil", [True]),
    "no list": (images(2, 3, 8, 8), "pil", True),
    "no list, no image": (images(0, 3, 8, 8), "np", []),
    "integers": (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "pil", None),
    "gradients": (images(1, 3, 8, 8).requires_grad_(), "pil", None),
    "gradients, array": (images(1, 3, 8, 8).requires_grad_(), "np", None),
    "an unknown type": (images(1, 3, 8, 8), "png", None),
    "no pixels": (images(1, 3, 0, 8), "pil", None),
    "no image": (images(0, 3, 8, 8), "pil", None),
    "doubles": (images(1, 3, 8, 8).double(), "pil", None),
    "two channels": (images(1, 2, 8, 8), "pil", None),
    "meta": (torch.empty(1, 3, 8, 8, device="meta"), "pil", None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_fares_as_with_diffusers(name: str) -> None:
    def outcome(processor: VaeImageProcessor) -> Any:
        image, output_type, pattern = BAD[name]
        try:
            result = processor.postprocess(image, output_type, pattern)
        except Exception as error:
            return type(error), str(error)
        return [(i.mode, i.size, i.tobytes()) for i in result] if isinstance(result, list) else result.tolist()

    processor, journal = replaced()
    assert outcome(processor) == outcome(VaeImageProcessor(vae_scale_factor=16))
    assert "device" not in journal_calls(journal)


def test_rgba_shares_memory_and_rgb_is_its_own() -> None:
    block = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 4), dtype=np.uint8)
    shared = pixels.to_pil(block)
    block[1, 0, 0] = 7
    assert shared[1].getpixel((0, 0)) == (7, 7, 7, 7)
    own = pixels.to_pil(np.ascontiguousarray(block[..., :3]))
    own[0].load()[0, 0] = (1, 2, 3)  # as with diffusers, its pixels can be written
    assert own[0].getpixel((0, 0)) == (1, 2, 3)


# Into a processor and out of it.


def test_name_signature_and_documentation_stay() -> None:
    processor, _ = replaced()
    original = VaeImageProcessor.postprocess
    assert isinstance(processor.postprocess, types.MethodType) and processor.postprocess.__self__ is processor
    assert processor.postprocess.__name__ == "postprocess" and processor.postprocess.__doc__ == original.__doc__
    a = processor.postprocess(image=images(1, 3, 8, 8), output_type="np")
    assert isinstance(a, np.ndarray)
    assert isinstance(processor.postprocess(images(1, 3, 8, 8))[0], Image.Image)


def test_remove_leaves_no_trace() -> None:
    processor = VaeImageProcessor(vae_scale_factor=16)
    before = state(processor)
    post = PostProcessing.install(processor, Journal())
    assert post is not None and PostProcessing.install(processor, Journal()) is None
    post.remove()
    assert state(processor) == before
    assert processor.postprocess.__func__ is VaeImageProcessor.postprocess


def test_copies_and_pickles_are_plain_and_can_be_replaced() -> None:
    processor, journal = replaced()
    image = images(1, 3, 8, 8)
    for make in (copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))):
        other = make(processor)
        assert type(other) is VaeImageProcessor and other.__dict__ == VaeImageProcessor(vae_scale_factor=16).__dict__
        assert other.postprocess(image)[0].tobytes() == VaeImageProcessor().postprocess(image)[0].tobytes()
        assert journal_calls(journal) == {}
        own = Journal()
        post = PostProcessing.install(other, own)
        assert post is not None
        other.postprocess(image)
        assert journal_calls(own) == {"device": 1}
        post.remove()
        assert state(other) == state(VaeImageProcessor(vae_scale_factor=16))
    processor.postprocess(image)
    assert journal_calls(journal) == {"device": 1}


@pytest.mark.parametrize("part", ["postprocess", "denormalize", "numpy_to_pil"])
def test_a_patched_processor_is_left_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor, journal = VaeImageProcessor(), Journal()
    setattr(processor, part, lambda *args, **kwargs: "mine")
    before = state(processor)
    assert PostProcessing.install(processor, journal) is None
    assert state(processor) == before
    assert journal.report("", []).as_dict()["left_alone"] == [f"postprocess: its image processor has its own {part}"]
    monkeypatch.setattr(VaeImageProcessor, part, lambda *args, **kwargs: "everyone's")
    assert PostProcessing.install(VaeImageProcessor(), Journal()) is None


def test_other_classes_are_left_alone() -> None:
    for processor in (Subclass(), object(), InpaintProcessor()):
        journal = Journal()
        assert PostProcessing.install(processor, journal) is None
        assert type(processor).__name__ in journal.report("", []).as_dict()["left_alone"][0]


def test_a_part_patched_later_is_respected() -> None:
    processor, journal = replaced()
    processor.numpy_to_pil = lambda array: "mine"  # type: ignore[method-assign]
    assert processor.postprocess(images(1, 3, 8, 8)) == "mine"
    assert journal_calls(journal) == {"diffusers": 1}


def test_processors_of_a_pipeline() -> None:
    one, two = VaeImageProcessor(), InpaintProcessor()
    pipeline = types.SimpleNamespace(image_processor=one, image_mask_processor=two)
    assert processors_of(pipeline) == [one, two._image_processor]
    assert processors_of(types.SimpleNamespace(image_processor=one, image_mask_processor=one)) == [one]
    assert processors_of(types.SimpleNamespace(image_processor=None)) == []


# Through accelerate.


class Pipeline:
    """What accelerate looks at."""

    def __init__(self, vae: Any, processor: Any) -> None:
        self.vae = vae
        self.image_processor = processor


def test_accelerate_and_restore(micro: Any) -> None:
    processor = VaeImageProcessor(vae_scale_factor=16)
    pipeline = Pipeline(micro, processor)
    before = state(processor), state(micro)
    with accelerate(pipeline) as handle:
        processor.postprocess(images(1, 3, 8, 8))
        report = handle.report()
        assert report.as_dict()["calls"]["postprocess"] == {"device": 1}
        assert "postprocess" in str(report)
    assert (state(processor), state(micro)) == before


def test_the_setting(micro: Any) -> None:
    processor = VaeImageProcessor(vae_scale_factor=16)
    with accelerate(Pipeline(micro, processor), postprocess=False):
        assert not replaced_methods(processor)
    with pytest.raises(ConfigError, match="postprocess must be true or false"):
        accelerate(micro, postprocess="yes")


def test_two_pipelines_of_one_vae(micro: Any) -> None:
    first, second = (Pipeline(micro, VaeImageProcessor(vae_scale_factor=16)) for _ in range(2))
    handle = accelerate(micro)
    assert not replaced_methods(first.image_processor)
    assert accelerate(first) is accelerate(second) is accelerate(first) is handle
    for pipeline in (first, second):
        pipeline.image_processor.postprocess(images(1, 3, 8, 8))
    assert handle.report().as_dict()["calls"]["postprocess"] == {"device": 2}
    handle.restore()
    assert not any(replaced_methods(pipeline.image_processor) for pipeline in (first, second))


def test_restore_refuses_to_drop_another_patch(micro: Any) -> None:
    pipeline = Pipeline(micro, VaeImageProcessor())
    handle = accelerate(pipeline)
    ours = pipeline.image_processor.postprocess
    pipeline.image_processor.postprocess = lambda image: ours(image)  # type: ignore[method-assign]
    with pytest.raises(HandleError, match="image_processor.postprocess was patched again"):
        handle.restore()
    assert handle_of(micro) is not None
    pipeline.image_processor.postprocess = ours  # type: ignore[method-assign]
    handle.restore()
    assert not replaced_methods(pipeline.image_processor)


def test_a_pipeline_that_is_gone_is_no_trouble(micro: Any) -> None:
    handle = accelerate(Pipeline(micro, VaeImageProcessor()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.restore()
