"""Qwen-Image 2.1's pipelines around its own VAE, tiny and random: 16 pixels per latent pixel, four image channels."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from tests.helpers import spread_gammas
from tests.pipelines.factory import HIDDEN, Z_DIM, TinyProcessor, components, modular, qwen3_vl, tiny

MICRO = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": Z_DIM,
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.0, 0.3, 0.2, -0.1],
    "latents_std": [1.5, 0.8, 1.0, 2.0, 0.9, 1.2],
}


def micro_vae_21(channels: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small ``AutoencoderKLQwenImage21`` with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLQwenImage21(**MICRO, in_channels=channels, out_channels=channels)
        return spread_gammas(vae).eval().to(dtype)


class Inputs(dict[str, Any]):
    """What a processor gives: a dictionary whose entries are attributes, too."""

    __getattr__ = dict.__getitem__

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self, name)

    def to(self, device: torch.device) -> Inputs:
        return Inputs({name: value.to(device) for name, value in self.items()})


class TinyProcessor21(TinyProcessor):
    """As Qwen3-VL's processor: patches of 16 pixels, and a chat template that it can tokenize."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
        self.image_processor = type(self.image_processor)(size=size, patch_size=16)

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> list[list[int]]:
        text = "".join(part["text"] for part in messages[0]["content"])
        return [self.tokenizer.encode(f"<|im_start|>system\n{text}<|im_end|>\n")]

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> Inputs:
        inputs = super().__call__(text, images, **options)
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return Inputs({**inputs, "mm_token_type_ids": (inputs["input_ids"] == pad).long()})


def parts(vae: nn.Module) -> dict[str, Any]:
    """The components of Qwen-Image 2.1 around ``vae``."""
    tokenizer = components(vae)["tokenizer"]
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": vae,
        "text_encoder": qwen3_vl("Qwen3VLForConditionalGeneration", tokenizer, vae, layers=2),
        "processor": TinyProcessor21(tokenizer),
        "transformer": tiny(
            diffusers.QwenImage21Transformer2DModel,
            11,
            vae,
            in_channels=Z_DIM,
            out_channels=Z_DIM,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=HIDDEN,
            axes_dims_rope=(4, 6, 6),
        ),
    }


def qwen_image_21(vae: nn.Module) -> Any:
    return diffusers.QwenImage21Pipeline(**parts(vae))


def modular_qwen_21(vae: nn.Module) -> Any:
    return modular("QwenImage21AutoBlocks", parts(vae))
