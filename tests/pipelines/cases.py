"""The matrix: every pipeline of diffusers that holds this VAE."""

from __future__ import annotations

from typing import Any

from tests.pipelines.factory import (
    SIDE,
    Case,
    anima,
    classic,
    has,
    krea2,
    mask,
    modular_qwen,
    nucleus,
    picture,
    with_controlnet,
    with_layered_transformer,
    with_processor,
)
from tests.pipelines.qwen_image_21 import micro_vae_21, modular_qwen_21, qwen_image_21


def _size(**more: Any) -> dict[str, Any]:
    return {"height": SIDE, "width": SIDE + 32, **more}


def _nested(result: list[list[Any]]) -> list[Any]:
    return [image for images in result for image in images]


CASES = [
    Case("QwenImage", classic("QwenImagePipeline"), _size, has("QwenImagePipeline")),
    Case(
        "Img2Img",
        classic("QwenImageImg2ImgPipeline"),
        lambda: _size(image=picture(), strength=0.9),
        has("QwenImageImg2ImgPipeline"),
        encode=1,
        preprocess=1,
    ),
    Case(
        "Inpaint",
        classic("QwenImageInpaintPipeline"),
        lambda: _size(image=picture(), mask_image=mask(), strength=0.9),
        has("QwenImageInpaintPipeline"),
        encode=2,
    ),
    Case(
        "Inpaint with a crop",
        classic("QwenImageInpaintPipeline"),
        lambda: {
            "height": SIDE,
            "width": SIDE,
            "image": picture(96, 80),
            "mask_image": mask(96, 80),
            "strength": 0.9,
            "padding_mask_crop": 8,
        },
        has("QwenImageInpaintPipeline"),
        encode=2,
        pil_only=True,
    ),
    Case(
        "ControlNet",
        classic("QwenImageControlNetPipeline", with_controlnet()),
        lambda: _size(control_image=picture(), controlnet_conditioning_scale=0.5),
        has("QwenImageControlNetPipeline"),
        encode=1,
    ),
    Case(
        "ControlNetInpaint",
        classic("QwenImageControlNetInpaintPipeline", with_controlnet(extra_condition_channels=4)),
        lambda: _size(control_image=picture(), control_mask=mask(), controlnet_conditioning_scale=0.5),
        has("QwenImageControlNetInpaintPipeline"),
        encode=1,
    ),
    Case(
        "Edit",
        classic("QwenImageEditPipeline", with_processor),
        lambda: {"image": picture(80, 64)},
        has("QwenImageEditPipeline"),
        encode=1,
        preprocess=1,
    ),
    Case(
        "EditInpaint",
        classic("QwenImageEditInpaintPipeline", with_processor),
        lambda: {"image": picture(80, 64), "mask_image": mask(80, 64), "strength": 0.9},
        has("QwenImageEditInpaintPipeline"),
        encode=2,
    ),
    Case(
        "EditPlus",
        classic("QwenImageEditPlusPipeline", with_processor),
        lambda: _size(image=[picture(64, 64), picture(160, 48, seed=1), picture(40, 96, seed=2)]),
        has("QwenImageEditPlusPipeline"),
        encode=3,
        preprocess=3,
    ),
    Case(
        "Layered",
        classic("QwenImageLayeredPipeline", with_processor, with_layered_transformer),
        lambda: {"image": picture(mode="RGBA"), "layers": 3},
        has("QwenImageLayeredPipeline"),
        encode=1,
        preprocess=1,
        channels=4,
        images=_nested,
    ),
    Case("Krea2", krea2, lambda: _size(max_sequence_length=8), has("Krea2Pipeline")),
    Case("NucleusMoE", nucleus, lambda: _size(return_index=-1, max_sequence_length=64), has("NucleusMoEImagePipeline")),
    Case("Anima (modular)", anima, lambda: _size(max_sequence_length=16), has("AnimaModularPipeline", "AnimaTextConditioner")),
    Case(
        "Anima image-to-image (modular)",
        anima,
        lambda: _size(max_sequence_length=16, image=picture(), strength=0.9),
        has("AnimaImg2ImgVaeEncoderStep", module="diffusers.modular_pipelines.anima.encoders"),
        encode=1,
    ),
    Case("QwenImage 2.1", qwen_image_21, _size, has("QwenImage21Pipeline"), channels=4, vae=micro_vae_21),
    Case(
        "QwenImage 2.1 with images",
        qwen_image_21,
        lambda: _size(image=[picture(64, 64, "RGBA"), picture(96, 48, seed=1)]),
        has("QwenImage21Pipeline"),
        encode=2,
        preprocess=2,
        channels=4,
        vae=micro_vae_21,
    ),
    Case(
        "QwenImage 2.1 (modular)",
        modular_qwen_21,
        _size,
        has("QwenImage21AutoBlocks", module="diffusers.modular_pipelines"),
        channels=4,
        vae=micro_vae_21,
    ),
    Case(
        "QwenImage 2.1 with images (modular)",
        modular_qwen_21,
        lambda: _size(image=[picture(64, 64, "RGBA"), picture(96, 48, seed=1)]),
        has("QwenImage21AutoBlocks", module="diffusers.modular_pipelines"),
        encode=2,
        channels=4,
        vae=micro_vae_21,
    ),
    Case("QwenImage (modular)", modular_qwen("QwenImageAutoBlocks"), _size, has("QwenImageAutoBlocks")),
    Case(
        "Img2Img (modular)",
        modular_qwen("QwenImageAutoBlocks"),
        lambda: _size(image=picture(), strength=0.9),
        has("QwenImageAutoBlocks"),
        encode=1,
    ),
    Case(
        "Inpaint (modular)",
        modular_qwen("QwenImageAutoBlocks"),
        lambda: _size(image=picture(), mask_image=mask(), strength=0.9),
        has("QwenImageAutoBlocks"),
        encode=1,
        pil_only=True,
    ),
    Case(
        "ControlNet (modular)",
        modular_qwen("QwenImageAutoBlocks", with_controlnet()),
        lambda: _size(control_image=picture(), controlnet_conditioning_scale=0.5),
        has("QwenImageAutoBlocks"),
        encode=1,
    ),
    Case(
        "Edit (modular)",
        modular_qwen("QwenImageEditAutoBlocks", with_processor),
        lambda: {"image": picture(80, 64)},
        has("QwenImageEditAutoBlocks"),
        encode=1,
    ),
    Case(
        "EditPlus (modular)",
        modular_qwen("QwenImageEditPlusAutoBlocks", with_processor),
        lambda: {"image": [picture(64, 64), picture(160, 48, seed=1)]},
        has("QwenImageEditPlusAdditionalInputsStep", module="diffusers.modular_pipelines.qwenimage.inputs"),
        encode=2,
    ),
    Case(
        "Layered (modular)",
        modular_qwen("QwenImageLayeredAutoBlocks", with_processor, with_layered_transformer),
        lambda: {"image": picture(mode="RGBA"), "layers": 3},
        has("QwenImageLayeredAutoBlocks"),
        encode=1,
        channels=4,
        images=_nested,
    ),
]
BY_NAME = {case.name: case for case in CASES}
TEXT_TO_IMAGE = BY_NAME["QwenImage"]
IMAGE_TO_IMAGE = BY_NAME["Img2Img"]
