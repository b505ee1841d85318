"""Pre-processing on the device gives diffusers' tensors, and leaves what it does not know alone."""

from __future__ import annotations

import copy
import pickle
import types
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.errors import HandleError
from qwen_vae_accel.journal import Journal
from qwen_vae_accel.plugin.methods import handle_of
from qwen_vae_accel.plugin.processing import PreProcessing
from qwen_vae_accel.plugin.processing.preprocess import PIPELINES
from tests.helpers import replaced_methods, state
from tests.pipelines.cases import BY_NAME, CASES, IMAGE_TO_IMAGE
from tests.pipelines.factory import Case
from tests.pipelines.test_matrix import assert_fast, largest_difference

TAKEN = [case for case in CASES if case.preprocess]
LEFT = [case for case in CASES if case.encode and not case.preprocess]
CPU_VAE = nn.Linear(1, 1)


def named(case: Case) -> str:
    return case.name


def random_image(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Every byte is as likely as another."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def every_byte(mode: str) -> Image.Image:
    """All 256 values in each channel, in 256x16 pixels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    line = np.stack([np.roll(np.arange(256, dtype=np.uint8), 37 * channel) for channel in range(channels)], axis=-1)
    return Image.frombytes(mode, (256, 16), np.stack([line, line[::-1]] * 8).tobytes())


def replaced(vae: nn.Module = CPU_VAE, **options: Any) -> tuple[VaeImageProcessor, Journal]:
    """A processor with its ``preprocess`` replaced."""
    processor, journal = VaeImageProcessor(vae_scale_factor=16, **options), Journal()
    assert PreProcessing.install(processor, journal, vae=vae) is not None
    return processor, journal


def calls(journal: Journal) -> dict[str, int]:
    return journal.report("", []).as_dict()["calls"].get("preprocess", {})


def assert_same(image: Any, *args: Any, served: str = "device", vae: nn.Module = CPU_VAE, **options: Any) -> None:
    """The replaced and the plain processor agree on ``image`` bit for bit, and ``served`` did it."""
    expected = VaeImageProcessor(vae_scale_factor=16, **options).preprocess(image, *args)
    processor, journal = replaced(vae, **options)
    for _ in range(2):  # the second time with the table of the first
        actual = processor.preprocess(image, *args)
        assert actual.device == (next(vae.parameters()).device if served == "device" else torch.device("cpu"))
        assert_equal(actual.cpu(), expected)
    assert calls(journal) == {served: 2}


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """In dtype, shape, every bit, and the strides of all dimensions that have a second element."""
    assert (type(actual), actual.dtype, actual.shape) == (Tensor, expected.dtype, expected.shape)
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))
    pairs = zip(actual.shape, actual.stride(), expected.stride(), strict=True)
    assert all(one == other for length, one, other in pairs if length > 1)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_normalize": False},
    {"do_convert_rgb": True},
    {"do_convert_grayscale": True},
    {"do_convert_grayscale": True, "do_normalize": False},
    {"resample": "bilinear", "reducing_gap": 2},
    {"do_resize": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "CMYK", "P"])
def test_every_byte_mode_and_option(mode: str, options: dict[str, Any]) -> None:
    assert_same(every_byte(mode), **{**options, "do_resize": False})
    for width, height in ((64, 48), (97, 131), (17, 16), (16, 333)):
        assert_same(random_image(mode, width, height), **options)
        assert_same([random_image(mode, width, height, seed) for seed in range(3)], **options)


@pytest.mark.parametrize("size", [(48, 64), (41, 70), (None, 64), (48, None)], ids=str)
def test_sizes_asked_for(size: tuple[int | None, int | None]) -> None:
    images = [random_image("RGB", 97, 51), random_image("RGB", 40, 90, seed=1)]
    assert_same(images[0], *size)
    assert_same(images, *size)
    processor, _ = replaced()
    asked = processor.preprocess(image=images[0], width=32, height=16)
    assert_equal(asked, VaeImageProcessor(vae_scale_factor=16).preprocess(images[0], 16, 32))


@pytest.mark.parametrize("pixels", [(1, 1), (1, 40), (40, 1)], ids=str)
def test_lines_and_points(pixels: tuple[int, int]) -> None:
    for mode in ("RGB", "L"):
        assert_same(random_image(mode, *pixels), do_resize=False)


def test_inference_mode_and_after() -> None:
    processor, _ = replaced()
    expected = VaeImageProcessor(vae_scale_factor=16).preprocess(every_byte("RGB"))
    with torch.inference_mode():
        assert_equal(processor.preprocess(every_byte("RGB")), expected)
    tensor = processor.preprocess(every_byte("RGB"))
    assert not tensor.is_inference() and not tensor.requires_grad
    assert_equal(tensor, expected)


def test_the_callers_image_and_list_stay() -> None:
    images = [random_image("RGB", 64, 48)]
    before = images[0].tobytes()
    processor, _ = replaced()
    processor.preprocess(images, 16, 16).zero_()
    assert len(images) == 1 and images[0].size == (64, 48) and images[0].tobytes() == before
    assert_equal(processor.preprocess(images), VaeImageProcessor(vae_scale_factor=16).preprocess(images))


# What diffusers does itself.

UNUSUAL: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "a tensor": (torch.rand(1, 3, 32, 32), {}, {}),
    "an array": (np.random.default_rng(0).random((1, 32, 32, 3), dtype=np.float32), {}, {}),
    "a list of tensors": ([torch.rand(3, 32, 32)] * 2, {}, {}),
    "latents": (torch.rand(1, 4, 4, 4), {}, {}),
    "fill": (random_image("RGB", 64, 48), {"resize_mode": "fill", "height": 32, "width": 32}, {}),
    "crop": (random_image("RGB", 64, 48), {"resize_mode": "crop", "height": 32, "width": 32}, {}),
    "crops_coords": (random_image("RGB", 64, 48), {"crops_coords": (0, 0, 32, 16)}, {}),
    "a mask": (random_image("L", 64, 48), {}, {"do_binarize": True, "do_normalize": False, "do_convert_grayscale": True}),
    "one bit": (Image.new("1", (32, 32), 1), {}, {}),
    "integers": (Image.new("I", (32, 32), 70000), {}, {}),
    "floats": (Image.new("F", (32, 32), 0.3), {}, {}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_calls_are_diffusers_own(name: str) -> None:
    image, arguments, options = UNUSUAL[name]
    expected = VaeImageProcessor(vae_scale_factor=16, **options).preprocess(image, **arguments)
    processor, journal = replaced(**options)
    assert_equal(processor.preprocess(image, **arguments), expected)
    assert calls(journal) == {"diffusers": 1}
    fallback = journal.report("", []).as_dict()["fallbacks"][0]
    assert fallback["method"] == "preprocess" and fallback["reason"]


BAD: dict[str, tuple[Any, dict[str, Any]]] = {
    "nothing": (None, {}),
    "an empty list": ([], {}),
    "text": ("coffee.png", {}),
    "a tuple": ((random_image("RGB", 32, 32),), {}),
    "an image and an array": ([random_image("RGB", 32, 32), np.zeros((32, 32, 3), np.float32)], {}),
    "a size of nothing": (random_image("RGB", 8, 8), {}),
    "an unknown resize mode": (random_image("RGB", 32, 32), {"resize_mode": "stretch"}),
    "two modes": ([random_image("RGB", 32, 32), random_image("L", 32, 32)], {}),
    "a negative size": (random_image("RGB", 32, 32), {"height": -16}),
    "a size in words": (random_image("RGB", 32, 32), {"width": "wide"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_fares_as_with_diffusers(name: str) -> None:
    def outcome(processor: VaeImageProcessor) -> Any:
        image, arguments = BAD[name]
        try:
            return processor.preprocess(image, **arguments).tolist()
        except Exception as error:
            return type(error), str(error)

    processor, journal = replaced()
    assert outcome(processor) == outcome(VaeImageProcessor(vae_scale_factor=16))
    assert "device" not in calls(journal)


def test_images_of_two_sizes_and_without_pixels() -> None:
    processor, journal = replaced(do_resize=False)
    for images in ([random_image("RGB", 32, 32), random_image("RGB", 32, 48)], [Image.new("RGB", (0, 4))]):
        with pytest.raises((ValueError, RuntimeError)) as plain:
            VaeImageProcessor(do_resize=False).preprocess(images)
        with pytest.raises(plain.type) as ours:
            processor.preprocess(images)
        assert str(ours.value) == str(plain.value)
    assert calls(journal) == {}


def test_where_the_vae_is() -> None:
    vae = nn.Linear(1, 1)
    processor, journal = replaced(vae)
    vae.to("meta")  # no place for a tensor
    assert processor.preprocess(every_byte("RGB")).device == torch.device("cpu")
    assert calls(journal) == {"diffusers": 1}
    assert journal.report("", []).as_dict()["fallbacks"][0]["reason"] == "a VAE on meta"
    del vae
    processor.preprocess(every_byte("RGB"))
    assert calls(journal) == {"diffusers": 2}


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("qwen_vae_accel.plugin.processing.preprocess.to_values", full)
    processor, journal = replaced()
    assert_equal(processor.preprocess(every_byte("RGB")), VaeImageProcessor(vae_scale_factor=16).preprocess(every_byte("RGB")))
    assert calls(journal) == {"diffusers": 1}
    assert journal.report("", []).as_dict()["fallbacks"][0]["reason"] == "out of memory on cpu"


# Into a processor and out of it.


def test_remove_leaves_no_trace() -> None:
    processor = VaeImageProcessor(vae_scale_factor=16)
    before = state(processor)
    replacement = PreProcessing.install(processor, Journal(), vae=CPU_VAE)
    assert replacement is not None and PreProcessing.install(processor, Journal(), vae=CPU_VAE) is None
    assert processor.preprocess.__name__ == "preprocess"
    assert processor.preprocess.__doc__ == VaeImageProcessor.preprocess.__doc__
    replacement.remove()
    assert state(processor) == before
    assert processor.preprocess.__func__ is VaeImageProcessor.preprocess


def test_copies_and_pickles_are_plain_and_can_be_replaced() -> None:
    processor, journal = replaced()
    for make in (copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))):
        other = make(processor)
        other.preprocess(every_byte("RGB"))
        assert calls(journal) == {}
        own = Journal()
        assert PreProcessing.install(other, own, vae=CPU_VAE) is not None
        other.preprocess(every_byte("RGB"))
        assert calls(own) == {"device": 1}


@pytest.mark.parametrize("part", ["preprocess", "pil_to_numpy", "numpy_to_pt", "normalize"])
def test_a_patched_processor_is_left_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor, journal = VaeImageProcessor(), Journal()
    setattr(processor, part, lambda *args, **kwargs: "mine")
    assert PreProcessing.install(processor, journal, vae=CPU_VAE) is None
    assert journal.report("", []).as_dict()["left_alone"] == [f"preprocess: its image processor has its own {part}"]
    monkeypatch.setattr(VaeImageProcessor, part, lambda *args, **kwargs: "everyone's")
    assert PreProcessing.install(VaeImageProcessor(), Journal(), vae=CPU_VAE) is None


def test_what_is_patched_later_is_respected() -> None:
    processor, journal = replaced()
    processor.resize = lambda image, height, width, resize_mode="default": image.transpose(0).resize((width, height))
    plain = VaeImageProcessor(vae_scale_factor=16)
    plain.resize = processor.resize
    image = random_image("RGB", 70, 50)
    assert_equal(processor.preprocess(image), plain.preprocess(image))
    assert calls(journal) == {"device": 1}
    processor.normalize = plain.normalize = lambda x: x * 3
    assert_equal(processor.preprocess(image), plain.preprocess(image))
    assert calls(journal) == {"device": 1, "diffusers": 1}


# Through accelerate, in real pipelines.


def test_which_pipelines() -> None:
    """Each of them is tested."""
    kinds = {type(case.pipeline()).__name__ for case in TAKEN if not case.missing()}
    assert kinds == {name for name in PIPELINES if hasattr(diffusers, name)}


@pytest.mark.parametrize("case", TAKEN, ids=named)
def test_pre_processing_is_bitwise(case: Case) -> None:
    """With the same networks, the images are equal bit for bit."""
    pipeline = case.pipeline()
    with accelerate(pipeline, backend="eager", preprocess=False) as handle:
        assert "preprocess" not in replaced_methods(pipeline.image_processor)
        plain = case.request(pipeline)
        assert "preprocess" not in handle.report().as_dict()["calls"]
    before = state(pipeline.image_processor)
    with accelerate(pipeline, backend="eager") as handle:
        assert largest_difference(case.request(pipeline), plain) == 0
        assert_fast(handle, case)
        assert "preprocess" in str(handle.report())
    assert state(pipeline.image_processor) == before


@pytest.mark.parametrize("case", LEFT, ids=named)
def test_other_pipelines_are_left_alone(case: Case) -> None:
    pipeline = case.pipeline()
    with accelerate(pipeline, backend="eager") as handle:
        for name in ("image_processor", "mask_processor", "image_mask_processor"):
            processor = getattr(pipeline, name, None)
            assert processor is None or "preprocess" not in replaced_methods(processor)
        case.request(pipeline)
        report = handle.report().as_dict()
    assert "preprocess" not in report["calls"] and report["left_alone"] == []


def test_a_subclass_is_left_alone_and_named() -> None:
    case = BY_NAME["Edit"]
    kind = type(case.pipeline())

    class Own(kind):
        pass

    pipeline = case.pipeline()
    pipeline.__class__ = Own
    with accelerate(pipeline, backend="eager") as handle:
        assert "preprocess" not in replaced_methods(pipeline.image_processor)
        assert handle.report().as_dict()["left_alone"] == ["preprocess: its pipeline is a Own, not a QwenImageEditPipeline"]
    impostor = type("QwenImageEditPipeline", (), {})()
    impostor.vae, impostor.image_processor = pipeline.vae, VaeImageProcessor()
    with accelerate(impostor, backend="eager"):
        assert "preprocess" not in replaced_methods(impostor.image_processor)


def test_a_request_with_a_tensor_is_diffusers_own() -> None:
    pipeline = IMAGE_TO_IMAGE.pipeline()
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    plain = IMAGE_TO_IMAGE.request(pipeline, image=image)
    with accelerate(pipeline, backend="eager") as handle:
        assert largest_difference(IMAGE_TO_IMAGE.request(pipeline, image=image), plain) <= 1
        report = handle.report().as_dict()
    assert report["calls"]["preprocess"] == {"diffusers": 1}
    assert report["fallbacks"] == [{"method": "preprocess", "backend": "diffusers", "reason": "not PIL images", "count": 1}]


def test_restore_refuses_to_drop_another_patch() -> None:
    pipeline = IMAGE_TO_IMAGE.pipeline()
    processor = pipeline.image_processor
    handle = accelerate(pipeline, backend="eager")
    ours = processor.preprocess
    processor.preprocess = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(HandleError, match=r"image_processor\.preprocess was patched again"):
        handle.restore()
    assert handle_of(pipeline.vae) is not None and "postprocess" in replaced_methods(processor)
    processor.preprocess = ours
    handle.restore()
    assert not replaced_methods(processor)


def test_a_pipeline_without_an_image_processor(micro: Any) -> None:
    with accelerate(types.SimpleNamespace(vae=micro)) as handle:
        assert handle.report().as_dict()["left_alone"] == []


def test_nan_and_infinity_are_diffusers_own() -> None:
    """No image of bytes has them; others go diffusers' way."""
    values = np.full((1, 32, 32, 3), 0.5, dtype=np.float32)
    values[0, 3, 4] = np.nan, np.inf, -np.inf
    images = [values, torch.from_numpy(values).permute(0, 3, 1, 2), Image.fromarray(values[0, :, :, 0]), [values[0]] * 2]
    for image in images:
        processor, journal = replaced()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers' own, of negative numbers
            expected = VaeImageProcessor(vae_scale_factor=16).preprocess(image)
            actual = processor.preprocess(image)
        assert torch.equal(actual.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0)) and actual.isnan().any()
        assert calls(journal) == {"diffusers": 1}
