"""A whole ``QwenImagePipeline`` around a VAE, small enough for any machine and made without downloads.

The transformer and the text encoder are tiny and random, the tokenizer knows single bytes: the image means nothing, but
every step from prompt to pixels is the pipeline's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen_vae_accel.errors import ConfigError

_HIDDEN = 16
# Of a QwenImageTransformer2DModel; its channels follow the VAE's.
TINY_TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": _HIDDEN,
    "axes_dims_rope": (8, 4, 4),
}
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
)


def _tokenizer() -> Any:
    """A byte-level tokenizer: the 256 bytes and the special tokens of the pipeline's prompt template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_SPECIAL[0], eos_token=_SPECIAL[2])


def _text_encoder(tokenizer: Any) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokens = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]},
        "pad_token_id": tokens["<|endoftext|>"],
        "bos_token_id": tokens["<|im_start|>"],
        "eos_token_id": tokens["<|im_end|>"],
    }
    vision = {"depth": 1, "hidden_size": _HIDDEN, "intermediate_size": _HIDDEN, "num_heads": 2, "out_hidden_size": _HIDDEN}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        vision_token_id=tokens["<|vision_pad|>"],
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|image_pad|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def require_pipelines() -> None:
    """Raise ConfigError if transformers or tokenizers, without which diffusers has no pipelines, is not installed."""
    try:
        import tokenizers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a pipeline needs {error.name}: pip install 'qwen-vae-accel[pipelines]'") from error


def tiny_pipeline(vae: Any, seed: int = 0) -> Any:
    """A ``QwenImagePipeline`` with ``vae`` in it, on the VAE's device and in its dtype.

    Raises:
        ConfigError: if transformers or tokenizers is not installed.
    """
    require_pipelines()
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    tokenizer = _tokenizer()
    z_dim = vae.config.z_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(in_channels=4 * z_dim, out_channels=z_dim, **TINY_TRANSFORMER).eval()
        text_encoder = _text_encoder(tokenizer)
    transformer, text_encoder = (model.to(vae.device, vae.dtype) for model in (transformer, text_encoder))
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
