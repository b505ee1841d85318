"""The ways people run pipelines: offloading, slicing, tiling, batches, LoRA, compiled transformers, shared VAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from qwen_vae_accel import accelerate
from tests.helpers import replaced_methods, state
from tests.pipelines.cases import BY_NAME, IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from tests.pipelines.factory import Case, micro_vae
from tests.pipelines.test_matrix import assert_fast, largest_difference

BOTH = pytest.mark.parametrize(
    "case",
    [TEXT_TO_IMAGE, IMAGE_TO_IMAGE, BY_NAME["EditPlus"], BY_NAME["QwenImage 2.1 with images"]],
    ids=lambda case: case.name,
)
EVERY_VAE = pytest.mark.parametrize("case", [TEXT_TO_IMAGE, BY_NAME["QwenImage 2.1"]], ids=lambda case: case.name)
CPU = torch.device("cpu")


def compare(case: Case, pipeline: Any, requests: int = 1, plain: Any = None, backend: str = "eager", **options: Any) -> None:
    """The same requests, plain and accelerated."""
    plain = pipeline if plain is None else plain
    before = [case.request(plain, seed, **options) for seed in range(requests)]
    with accelerate(pipeline, backend=backend) as handle:
        after = [case.request(pipeline, seed, **options) for seed in range(requests)]
        assert_fast(handle, case, backend, requests)
    assert max(map(largest_difference, after, before)) <= 1


@BOTH
def test_model_offload(case: Case) -> None:
    """The hooks of ``enable_model_cpu_offload``, with the CPU for a device: applied anew after every request."""
    pipeline, plain = case.pipeline(), case.pipeline()
    pipeline.enable_model_cpu_offload(device="cpu")
    evicted = []
    original = pipeline.transformer.to

    def to(*args: Any) -> Any:
        evicted.append(args)
        return original(*args)

    pipeline.transformer.to = to
    compare(case, pipeline, requests=2, plain=plain)
    assert hasattr(pipeline.vae, "_hf_hook") and pipeline.vae._hf_hook.execution_device == torch.device("cpu:0")
    assert len(evicted) >= 2  # the VAE's turn sends the transformer away


@BOTH
def test_sequential_offload(case: Case) -> None:
    """Parameters on ``meta`` between the calls, as ``enable_sequential_cpu_offload`` leaves them."""
    from accelerate import cpu_offload

    pipeline, plain = case.pipeline(), case.pipeline()
    for name in ("text_encoder", "transformer", "vae"):
        module = getattr(pipeline, name)
        cpu_offload(module, CPU, offload_buffers=len(module._parameters) > 0)
    assert next(pipeline.vae.parameters()).is_meta
    compare(case, pipeline, requests=2, plain=plain)
    assert next(pipeline.vae.parameters()).is_meta


@EVERY_VAE
def test_group_offload(case: Case) -> None:
    pipeline, plain = case.pipeline(), case.pipeline()
    try:
        pipeline.vae.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    except AttributeError:
        pytest.skip(f"group offloading of diffusers {diffusers.__version__} wants an accelerator")
    compare(case, pipeline, plain=plain)


@BOTH
def test_slicing(case: Case) -> None:
    pipeline = case.pipeline()
    pipeline.vae.enable_slicing()
    plain = case.request(pipeline, num_images_per_prompt=2)
    with accelerate(pipeline, backend="eager") as handle:
        fast = case.request(pipeline, num_images_per_prompt=2)
        report = handle.report().as_dict()
    assert report["calls"]["decode"] == {"eager": 2} and report["fallbacks"] == []
    assert len(fast) == 2 and largest_difference(fast, plain) <= 1


@pytest.mark.numeric
@EVERY_VAE
def test_tiling_is_exact(case: Case) -> None:
    """Unlike diffusers' tiles, ours give the image of the untiled VAE."""
    pipeline = case.pipeline()
    plain = case.request(pipeline, height=160, width=96)
    options = {
        f"tile_sample_{what}_{side}": size for what, size in (("min", 64), ("stride", 48)) for side in ("height", "width")
    }
    pipeline.vae.enable_tiling(**options)
    with accelerate(pipeline, backend="eager") as handle:
        tiled = case.request(pipeline, height=160, width=96)
        assert_fast(handle, case)
    assert largest_difference(tiled, plain) <= 1


@BOTH
def test_several_images_and_generators(case: Case) -> None:
    pipeline = case.pipeline()
    generators = [[torch.Generator().manual_seed(seed) for seed in (3, 4)] for _ in range(2)]
    plain = case.request(pipeline, num_images_per_prompt=2, generator=generators[0])
    with accelerate(pipeline, backend="eager") as handle:
        fast = case.request(pipeline, num_images_per_prompt=2, generator=generators[1])
        assert handle.report().as_dict()["fallbacks"] == []
    assert len(fast) == 2 and largest_difference(fast, plain) <= 1
    assert largest_difference(fast[:1], fast[1:]) > 1


def test_a_list_of_prompts() -> None:
    compare(TEXT_TO_IMAGE, TEXT_TO_IMAGE.pipeline(), prompt=["a cup", "a cat", "a longer prompt"])


def test_a_batch_of_layered_images() -> None:
    case = BY_NAME["Layered"]
    pipeline = case.pipeline()
    plain = case.request(pipeline, num_images_per_prompt=2)
    with accelerate(pipeline, backend="eager") as handle:
        fast = case.request(pipeline, num_images_per_prompt=2)
        assert_fast(handle, case)
    assert len(fast) == 6 and fast[0].mode == "RGBA" and largest_difference(fast, plain) <= 1


def test_classifier_free_guidance() -> None:
    compare(TEXT_TO_IMAGE, TEXT_TO_IMAGE.pipeline(), negative_prompt="blurry", true_cfg_scale=3.0)


def test_given_embeddings() -> None:
    embeds = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 7, dtype=torch.int64)
    compare(TEXT_TO_IMAGE, TEXT_TO_IMAGE.pipeline(), prompt=None, prompt_embeds=embeds, prompt_embeds_mask=mask)


def test_lora_on_the_transformer(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    from peft import LoraConfig

    pipeline = TEXT_TO_IMAGE.pipeline()
    bare = TEXT_TO_IMAGE.request(pipeline)
    with accelerate(pipeline, backend="eager") as handle:
        config = LoraConfig(r=4, lora_alpha=64, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline.transformer.add_adapter(config, adapter_name="style")
        fast = TEXT_TO_IMAGE.request(pipeline)
        assert_fast(handle, TEXT_TO_IMAGE)
    assert largest_difference(fast, bare) > 1, "the adapter does nothing"
    assert largest_difference(fast, TEXT_TO_IMAGE.request(pipeline)) <= 1
    compare(TEXT_TO_IMAGE, pipeline)
    pipeline.transformer.delete_adapters("style")
    assert largest_difference(TEXT_TO_IMAGE.request(pipeline), bare) == 0


@pytest.mark.slow
def test_compiled_transformer() -> None:
    pipeline = TEXT_TO_IMAGE.pipeline()
    pipeline.transformer.compile()
    compare(TEXT_TO_IMAGE, pipeline)


@EVERY_VAE
@pytest.mark.parametrize("first", [True, False], ids=["engines built before", "engines built on the way"])
def test_engines(case: Case, first: bool, fake: Any, tmp_path: Path) -> None:
    """The pipeline's own sizes find their engines, and text-to-image loads no encoder."""
    pipeline = case.pipeline()
    plain = case.request(pipeline)
    with accelerate(pipeline, backend="tensorrt", engine_dir=tmp_path / "engines", sizes=["96x64"]) as handle:
        if first:
            handle.warmup(progress=False)
        fast = [case.request(pipeline) for _ in range(2)]
        assert_fast(handle, case, "tensorrt", requests=2)
        assert handle.report().as_dict()["engines"] == ["96x64/vae_decoder.fake"]
    assert max(largest_difference(images, plain) for images in fast) <= 1


def test_two_pipelines_of_one_vae() -> None:
    vae = micro_vae()
    text, image = TEXT_TO_IMAGE.pipeline(vae), IMAGE_TO_IMAGE.pipeline(vae)
    plain = TEXT_TO_IMAGE.request(text), IMAGE_TO_IMAGE.request(image)
    before = [state(pipeline.image_processor) for pipeline in (text, image)]
    handle = accelerate(text, backend="eager")
    assert accelerate(image, backend="eager") is handle
    fast = TEXT_TO_IMAGE.request(text), IMAGE_TO_IMAGE.request(image)
    assert max(map(largest_difference, fast, plain)) <= 1
    calls = handle.report().as_dict()["calls"]
    assert calls == {"encode": {"eager": 1}, "decode": {"eager": 2}, "preprocess": {"device": 1}, "postprocess": {"device": 2}}
    handle.restore()
    assert [state(pipeline.image_processor) for pipeline in (text, image)] == before
    again = TEXT_TO_IMAGE.request(text), IMAGE_TO_IMAGE.request(image)
    assert max(map(largest_difference, again, plain)) == 0


def test_from_pipe_shares_the_vae() -> None:
    from diffusers import QwenImageImg2ImgPipeline

    text = TEXT_TO_IMAGE.pipeline()
    with accelerate(text, backend="eager") as handle:
        image = QwenImageImg2ImgPipeline.from_pipe(text)
        image.set_progress_bar_config(disable=True)
        IMAGE_TO_IMAGE.request(image)
        calls = handle.report().as_dict()["calls"]
        assert calls == {"encode": {"eager": 1}, "decode": {"eager": 1}}  # its own image processor is not ours yet
        assert accelerate(image, backend="eager") is handle
        IMAGE_TO_IMAGE.request(image)
        assert handle.report().as_dict()["calls"]["postprocess"] == {"device": 1}
    assert not replaced_methods(image.image_processor)


def test_save_and_load_while_accelerated(tmp_path: Path) -> None:
    pipeline = TEXT_TO_IMAGE.pipeline()
    with accelerate(pipeline, backend="eager"):
        pipeline.vae.save_pretrained(tmp_path)
        fast = TEXT_TO_IMAGE.request(pipeline)
    again = TEXT_TO_IMAGE.pipeline(type(pipeline.vae).from_pretrained(tmp_path))
    assert largest_difference(TEXT_TO_IMAGE.request(again), fast) <= 1
