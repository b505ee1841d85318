"""Every pipeline gives the images of the plain one, and the report proves that the fast path made them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen_vae_accel import accelerate
from tests.pipelines.cases import CASES
from tests.pipelines.exact import RequestReference
from tests.pipelines.factory import Case

# Largest difference of two images in steps of 1/255: in float32 rounding moves a value that lies on the edge of a step.
ONE_STEP = 1


def largest_difference(one: list[Any], other: list[Any]) -> int:
    """Over two lists of PIL images, which must agree in everything else."""
    assert [(a.mode, a.size) for a in one] == [(b.mode, b.size) for b in other]
    pairs = zip(one, other, strict=True)
    return max(int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()) for a, b in pairs)


def expected_calls(case: Case, backend: str = "eager", requests: int = 1) -> dict[str, dict[str, int]]:
    """What the report must say after ``requests``."""
    calls = {"encode": case.encode * requests, "decode": case.decode * requests}
    served = {method: {backend: count} if count else {} for method, count in calls.items()}
    preprocess = {"preprocess": {"device": case.preprocess * requests}} if case.preprocess else {}
    return {**served, **preprocess, "postprocess": {"device": requests}}


def assert_fast(handle: Any, case: Case, backend: str = "eager", requests: int = 1) -> None:
    """Everything went the fast way."""
    report = handle.report().as_dict()
    assert report["calls"] == expected_calls(case, backend, requests)
    assert report["fallbacks"] == [] and report["left_alone"] == [] and report["note"] == ""


@pytest.mark.numeric
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_images_of_the_plain_pipeline(case: Case) -> None:
    pipeline = case.pipeline()
    plain = case.request(pipeline)
    with accelerate(pipeline, backend="eager") as handle:
        fast = case.request(pipeline)
        assert_fast(handle, case)
    assert largest_difference(fast, plain) <= ONE_STEP
    assert min(np.asarray(image).std() for image in plain) > 5, "the images show nothing"
    # Restored: plain in every bit, and nothing counted.
    again = case.request(pipeline)
    assert largest_difference(again, plain) == 0
    assert handle.report().as_dict()["calls"]["decode"] == {"eager": case.decode}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_post_processing_is_bitwise(case: Case) -> None:
    """With the same tensors from the VAE, the images are equal bit for bit."""
    pipeline = case.pipeline()
    with accelerate(pipeline, backend="eager", postprocess=False):
        plain = case.request(pipeline)
        plain_array = [] if case.pil_only else case.request(pipeline, output_type="np")
    with accelerate(pipeline, backend="eager") as handle:
        assert largest_difference(case.request(pipeline), plain) == 0
        arrays = [] if case.pil_only else case.request(pipeline, output_type="np")
        assert_fast(handle, case, requests=1 if case.pil_only else 2)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, plain_array, strict=True))


@pytest.mark.numeric
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bfloat16(case: Case) -> None:
    pipeline = case.pipeline(dtype=torch.bfloat16)
    exact = RequestReference(pipeline, lambda: case.request(pipeline))
    with accelerate(pipeline, backend="eager") as handle:
        exact.check(case.request(pipeline))
        assert_fast(handle, case)


@pytest.mark.numeric
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_latents_need_no_decoder(case: Case) -> None:
    """``output_type="latent"`` decodes nothing; text-to-image never makes an encoder."""
    if case.name == "Layered":
        pytest.skip("this pipeline of diffusers fails with output_type='latent'")
    if "modular" in case.name:
        pytest.skip("the last step of modular pipelines refuses output_type='latent'")
    pipeline = case.pipeline()
    exact = RequestReference(pipeline, lambda: pipeline(**_latent_request(case)).images)
    with accelerate(pipeline, backend="eager") as handle:
        exact.check(pipeline(**_latent_request(case)).images)
        calls = handle.report().as_dict()["calls"]
    expected = {**expected_calls(case), "decode": {}}
    assert calls == {name: served for name, served in expected.items() if name != "postprocess"}


def _latent_request(case: Case) -> dict[str, Any]:
    arguments = {key: value for key, value in case.inputs().items() if key != "padding_mask_crop"}
    generator = torch.Generator().manual_seed(0)
    return {"prompt": "coffee", "num_inference_steps": 1, "generator": generator, "output_type": "latent", **arguments}
