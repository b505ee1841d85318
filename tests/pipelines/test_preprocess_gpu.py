"""Pre-processing on a real GPU: the same bits as diffusers', made there, alone and in whole requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from qwen_vae_accel import accelerate
from tests.pipelines.factory import Case
from tests.pipelines.test_matrix import assert_fast, largest_difference
from tests.pipelines.test_preprocess import OPTIONS, TAKEN, assert_equal, assert_same, every_byte, named, random_image, replaced

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_on_a_gpu(mode: str, options: dict[str, Any]) -> None:
    vae = nn.Linear(1, 1).cuda()
    assert_same(every_byte(mode), vae=vae, **{**options, "do_resize": False})
    for width, height in ((97, 131), (17, 16), (1664, 928)):
        assert_same(random_image(mode, width, height), vae=vae, **options)
        assert_same([random_image(mode, width, height, seed) for seed in range(3)], vae=vae, **options)


def test_pinned_memory_is_not_reused_too_early_on_a_gpu() -> None:
    """Many images in a row, none waited for, while the GPU is busy."""
    processor, _ = replaced(nn.Linear(1, 1).cuda())
    images = [random_image("RGB", 512, 512, seed) for seed in range(8)]
    expected = [VaeImageProcessor(vae_scale_factor=16).preprocess(image) for image in images]
    busy = torch.rand(4096, 4096, device="cuda")
    for _ in range(20):
        busy = (busy @ busy).clamp(0, 1)
    tensors = [processor.preprocess(image) for image in images]
    for tensor, other in zip(tensors, expected, strict=True):
        assert_equal(tensor.cpu(), other)


@pytest.mark.parametrize("offload", [False, True], ids=["on the GPU", "model offload"])
@pytest.mark.parametrize("case", TAKEN, ids=named)
def test_whole_requests_on_a_gpu(case: Case, offload: bool) -> None:
    """What the encoder is given is the same bit for bit, and comes from the GPU."""
    pipeline = case.pipeline(dtype=torch.bfloat16)
    if offload:
        pipeline.enable_model_cpu_offload()
    else:
        pipeline.to("cuda")
    given: list[Tensor] = []
    made: list[str] = []

    def request() -> list[Any]:
        encode, preprocess = pipeline.vae.encode, pipeline.image_processor.preprocess
        own = pipeline.vae.__dict__.get("encode"), pipeline.image_processor.__dict__.get("preprocess")
        pipeline.vae.__dict__["encode"] = lambda x, *args, **kwargs: given.append(x.cpu()) or encode(x, *args, **kwargs)

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            tensor = preprocess(*args, **kwargs)
            made.append(tensor.device.type)
            return tensor

        pipeline.image_processor.__dict__["preprocess"] = watched
        try:
            return case.request(pipeline)
        finally:
            for owner, name, method in zip(
                (pipeline.vae, pipeline.image_processor), ("encode", "preprocess"), own, strict=True
            ):
                owner.__dict__.pop(name)
                if method is not None:
                    owner.__dict__[name] = method

    with accelerate(pipeline, backend="eager", preprocess=False):
        plain = request()
    with accelerate(pipeline, backend="eager") as handle:
        fast = request()
        assert_fast(handle, case)
    count = case.preprocess
    assert made == ["cpu"] * count + ["cuda"] * count
    for one, other in zip(given[:count], given[count:], strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    assert largest_difference(fast, plain) == 0
