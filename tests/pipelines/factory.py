"""Real diffusers pipelines around a VAE, tiny and random, made without downloads.

The transformers, text encoders and tokenizers are small enough for a second a request; every step from prompt to images
is the pipeline's own. A case says how a pipeline is made and called, and how often a request encodes and decodes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn

from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline
from tests.helpers import spread_gammas

Z_DIM = 6  # not 4: the Layered pipeline takes an image of as many channels for latents
HIDDEN = 16
SIDE = 64
STEPS = 2
# dim_mult as a list: diffusers 0.36 cannot take its own default.
MICRO = {
    "base_dim": 8,
    "z_dim": Z_DIM,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.0, 0.3, 0.2, -0.1],
    "latents_std": [1.5, 0.8, 1.0, 2.0, 0.9, 1.2],
}
TRANSFORMER = {
    "in_channels": 4 * Z_DIM,
    "out_channels": Z_DIM,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": HIDDEN,
    "axes_dims_rope": (8, 4, 4),
}


def micro_vae(channels: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A VAE of 8 pixels per latent pixel with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        extra = {"input_channels": channels} if channels != 3 else {}
        return spread_gammas(AutoencoderKLQwenImage(**MICRO, **extra)).eval().to(dtype)


def picture(width: int = SIDE, height: int = SIDE, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
    return Image.fromarray(small[..., 0] if mode == "L" else small).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """White where the right half is to be painted anew."""
    image = Image.new("L", (width, height), 0)
    image.paste(255, (width // 2, 0, width, height))
    return image


class TinyProcessor:
    """Text and images to a Qwen-VL model's inputs, with the transformers library's PIL image processor alone.

    ``Qwen2VLProcessor`` itself also wants a video processor, and that wants torchvision.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = tokenizer
        self.image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        user = "".join(part["text"] for part in messages[-1]["content"])
        return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> Any:
        vision: dict[str, Any] = {}
        if images is not None:
            images = list(images) if isinstance(images, (list, tuple)) else [images]
            vision = dict(self.image_processor([image.convert("RGB") for image in images], return_tensors="pt"))
            counts = [int(grid.prod()) // self.image_processor.merge_size**2 for grid in vision["image_grid_thw"]]
            # Every prompt of a batch shows the same images.
            vision = {name: torch.cat([value] * len(text)) for name, value in vision.items()}
            text = [_expand(prompt, counts) for prompt in text]
        inputs = self.tokenizer(text, **options)
        inputs.update(vision)
        return inputs


def _expand(prompt: str, counts: list[int]) -> str:
    parts = prompt.split("<|image_pad|>")
    assert len(parts) == len(counts) + 1
    return parts[0] + "".join("<|image_pad|>" * n + part for n, part in zip(counts, parts[1:], strict=True))


def has(*names: str, module: str = "diffusers") -> Callable[[], str]:
    """Why a case cannot run with this diffusers: the classes that ``module`` lacks."""

    def missing() -> str:
        try:
            found = importlib.import_module(module)
        except ImportError:
            return f"diffusers {diffusers.__version__} has no {module}"
        absent = [name for name in names if not hasattr(found, name)]
        return f"diffusers {diffusers.__version__} has no {', '.join(absent)}" if absent else ""

    return missing


@dataclass(frozen=True)
class Case:
    """One pipeline of the matrix.

    Attributes:
        make: a VAE -> the pipeline.
        inputs: what a request is given beside prompt, steps and generator; made anew for each.
        missing: why this release of diffusers cannot run it, or "".
        encode, decode: VAE calls of one request.
        preprocess: calls of the image processor's ``preprocess`` that the handle takes over.
        channels: image channels of its VAE.
        vae: makes a VAE of so many channels in a dtype.
        pil_only: it pastes its images into others and makes no arrays.
        images: a request's result -> a flat list of PIL images.
    """

    name: str
    make: Callable[[nn.Module], Any]
    inputs: Callable[[], dict[str, Any]]
    missing: Callable[[], str]
    encode: int = 0
    decode: int = 1
    preprocess: int = 0
    channels: int = 3
    pil_only: bool = False
    vae: Callable[[int, torch.dtype], nn.Module] = micro_vae
    images: Callable[[Any], list[Any]] = field(default=lambda result: list(result))

    def pipeline(self, vae: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """The pipeline, over a VAE of its own unless one is given; skips the test where it does not exist."""
        reason = self.missing()
        if reason:
            pytest.skip(reason)
        pipeline = self.make(self.vae(self.channels, dtype) if vae is None else vae)
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def request(self, pipeline: Any, seed: int = 0, **options: Any) -> list[Any]:
        """One request with the same seed: its PIL images."""
        arguments = {
            "prompt": "a cup of coffee",
            "num_inference_steps": STEPS,
            "generator": torch.Generator().manual_seed(seed),
            **self.inputs(),
            **options,
        }
        output = pipeline(**arguments)
        return self.images(output.images if hasattr(output, "images") else output)


def tiny(cls: type, seed: int, like: Any, **config: Any) -> Any:
    """A random model of ``cls``, in the dtype of ``like``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**config).eval().to(like.dtype)


def components(vae: nn.Module, **extra: Any) -> dict[str, Any]:
    """Those of ``QwenImagePipeline``, and more."""
    return {**tiny_pipeline(vae).components, **extra}


def classic(name: str, *more: Callable[[dict[str, Any]], None]) -> Callable[[nn.Module], Any]:
    """Makes the pipeline class of that name from the usual components, changed by ``more``."""

    def make(vae: nn.Module) -> Any:
        parts = components(vae)
        for change in more:
            change(parts)
        return getattr(diffusers, name)(**parts)

    return make


def with_processor(parts: dict[str, Any]) -> None:
    parts["processor"] = TinyProcessor(parts["tokenizer"])


def with_controlnet(**config: Any) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        options = {**TRANSFORMER, **config}
        parts["controlnet"] = tiny(diffusers.QwenImageControlNetModel, 3, parts["vae"], **options)

    return change


def with_layered_transformer(parts: dict[str, Any]) -> None:
    options = {**TRANSFORMER, "use_additional_t_cond": True, "use_layer3d_rope": True}
    parts["transformer"] = tiny(diffusers.QwenImageTransformer2DModel, 4, parts["vae"], **options)


def qwen3_vl(cls: str, tokenizer: Any, like: Any, layers: int) -> nn.Module:
    """A tiny Qwen3-VL text encoder."""
    import transformers

    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 1,
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|vision_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return tiny(getattr(transformers, cls), 5, like, config=config)


def krea2(vae: nn.Module) -> Any:
    parts = components(vae)
    transformer = tiny(
        diffusers.Krea2Transformer2DModel,
        6,
        vae,
        in_channels=4 * Z_DIM,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=HIDDEN,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=HIDDEN,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    return diffusers.Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen3_vl("Qwen3VLModel", parts["tokenizer"], vae, layers=2),
        tokenizer=parts["tokenizer"],
        transformer=transformer,
        text_encoder_select_layers=(0, 1),
    )


def nucleus(vae: nn.Module) -> Any:
    tokenizer = components(vae)["tokenizer"]
    transformer = tiny(
        diffusers.NucleusMoEImageTransformer2DModel,
        7,
        vae,
        in_channels=4 * Z_DIM,
        out_channels=Z_DIM,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=False,
        capacity_factors=[8.0, 8.0],
    )
    return diffusers.NucleusMoEImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=qwen3_vl("Qwen3VLForConditionalGeneration", tokenizer, vae, layers=3),
        processor=TinyProcessor(tokenizer),
    )


def modular(blocks: str, parts: dict[str, Any]) -> Any:
    """The modular pipeline of those blocks, with every component that it takes and ``parts`` has."""
    pipeline = getattr(importlib.import_module("diffusers.modular_pipelines"), blocks)().init_pipeline()
    wanted = {name: part for name, part in parts.items() if name in pipeline.components or name in pipeline._component_specs}
    pipeline.update_components(**wanted)
    return pipeline


def modular_qwen(blocks: str, *more: Callable[[dict[str, Any]], None]) -> Callable[[nn.Module], Any]:
    def make(vae: nn.Module) -> Any:
        parts = components(vae)
        for change in more:
            change(parts)
        return modular(blocks, parts)

    return make


def anima(vae: nn.Module) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = components(vae)["tokenizer"]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    parts = {
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": tiny(Qwen3Model, 8, vae, config=config),
        "tokenizer": tokenizer,
        "t5_tokenizer": tokenizer,
        "text_conditioner": tiny(
            diffusers.AnimaTextConditioner,
            9,
            vae,
            source_dim=HIDDEN,
            target_dim=HIDDEN,
            model_dim=HIDDEN,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=len(tokenizer),
            min_sequence_length=8,
        ),
        "transformer": tiny(
            diffusers.CosmosTransformer3DModel,
            10,
            vae,
            in_channels=Z_DIM,
            out_channels=Z_DIM,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            mlp_ratio=2,
            text_embed_dim=HIDDEN,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            patch_size=(1, 2, 2),
            concat_padding_mask=True,
            extra_pos_embed_type=None,
        ),
    }
    return modular("AnimaAutoBlocks", parts)
