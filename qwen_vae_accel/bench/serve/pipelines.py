"""The pipelines that serve: real diffusers classes around a transformer of full size, no text encoder.

Prompt embeddings are given, as a service gives them that encodes prompts elsewhere. What is random has the size and the
arithmetic of the real thing; its images mean nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from qwen_vae_accel.bench.methods import BenchError
from qwen_vae_accel.demo.tiny_pipeline import TINY_TRANSFORMER, require_pipelines
from qwen_vae_accel.errors import ConfigError
from qwen_vae_accel.loading import load_model, load_vae, random_vae
from qwen_vae_accel.sizes import GUIDE_STATIC, STATIC_MULTIPLE, Size

STEPS = {"t2i": 5, "i2i": 4}
TRANSFORMERS = ("full", "tiny")
# The input images of the guide's editing benchmark. The pipeline scales them to an area of 1024^2, sides of 32.
I2I_SIZES = (Size(512, 512), Size(1024, 1024), Size(848, 480), Size(1280, 720), Size(1024, 768))
T2I_SIZES = tuple(size.floor(STATIC_MULTIPLE) for size in GUIDE_STATIC.values())
_PROMPT_TOKENS = 128
# Of each matrix, over the root of its inputs: small enough that 60 random layers stay finite.
_GAIN = 0.5


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What a service is asked for: one image.

    Attributes:
        task: ``"t2i"``, or ``"i2i"`` for an editing request with one image.
        size: of the image asked for; of the input image when editing.
    """

    task: str
    size: Size

    @property
    def steps(self) -> int:
        """Denoising steps, the guide's."""
        return STEPS[self.task]


def random_transformer(z_dim: int, device: torch.device, dtype: torch.dtype, seed: int = 0, **config: Any) -> nn.Module:
    """A ``QwenImageTransformer2DModel`` with random weights, made where it runs; 20 B parameters unless ``config`` says else.

    Matrices are normal, norms one, biases zero.
    """
    from diffusers import QwenImageTransformer2DModel

    config = {"in_channels": 4 * z_dim, "out_channels": z_dim, **config}
    with torch.device("meta"):
        transformer: Any = QwenImageTransformer2DModel(**config)
    # Not diffusers' own to(), which warns about casting weights; here there are none yet.
    transformer = nn.Module.to(transformer, dtype).to_empty(device=device)
    # Its tables are neither parameters nor buffers: taken from a model without layers, in which they are real.
    transformer.pos_embed = QwenImageTransformer2DModel(**{**config, "num_layers": 0}).pos_embed
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, _GAIN / parameter[0].numel() ** 0.5, generator=generator)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
    made: nn.Module = transformer.eval().requires_grad_(False)
    return made


def _stored_transformer(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return load_model(QwenImageTransformer2DModel, folder, device, dtype)


class Pipelines:
    """Both pipelines over one transformer and one VAE.

    Args:
        model: folder of a pipeline, or of a VAE alone; None: a full-size VAE with random weights.
        transformer: ``"full"`` or ``"tiny"``, with random weights; None: the one in ``model``.
        device: where everything is.
        dtype: of everything.

    Raises:
        ConfigError: if ``transformer`` is neither, or is None and ``model`` has none, or transformers is not installed.
        UnsupportedVAEError: if ``model`` cannot be loaded.
    """

    def __init__(self, model: Path | None, transformer: str | None, device: torch.device, dtype: torch.dtype) -> None:
        require_pipelines()
        stored = None if model is None else model / "transformer"
        if transformer not in (None, *TRANSFORMERS):
            raise ConfigError(f"transformer must be full or tiny, not {transformer!r}")
        if transformer is None and (stored is None or not os.path.isdir(stored)):
            raise ConfigError(f"{model} holds no transformer: name one of random weights with --transformer full (or tiny)")
        self.device = device
        self.dtype = dtype
        vae: Any = random_vae().to(device, dtype) if model is None else load_vae(model, device, dtype)
        self.vae = vae
        self.transformer: Any
        if transformer is None:
            assert stored is not None
            self.transformer = _stored_transformer(stored, device, dtype)
        else:
            config = TINY_TRANSFORMER if transformer == "tiny" else {}
            self.transformer = random_transformer(vae.config.z_dim, device, dtype, **config)
        self._pipelines: dict[str, Any] = {}

    @property
    def parameters(self) -> int:
        """Of the transformer."""
        return sum(parameter.numel() for parameter in self.transformer.parameters())

    def pipeline(self, task: str) -> Any:
        """The pipeline of ``task``; always the same."""
        if task not in self._pipelines:
            from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline, QwenImagePipeline

            parts = {"vae": self.vae, "transformer": self.transformer, "text_encoder": None, "tokenizer": None}
            parts["scheduler"] = FlowMatchEulerDiscreteScheduler()
            made = QwenImagePipeline(**parts) if task == "t2i" else QwenImageEditPlusPipeline(**parts, processor=None)
            made.set_progress_bar_config(disable=True)
            self._pipelines[task] = made
        return self._pipelines[task]

    def run(self, request: ImageRequest, output_type: str = "pil") -> Any:
        """The images of one request, always from the same seed."""
        generator = torch.Generator().manual_seed(0)
        width = self.transformer.config.joint_attention_dim
        embeds = torch.randn(1, _PROMPT_TOKENS, width, generator=generator, device="cpu").to(self.device, self.dtype)
        arguments: dict[str, Any] = {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": torch.ones(1, _PROMPT_TOKENS, dtype=torch.int64, device=self.device),
            "num_inference_steps": request.steps,
            "true_cfg_scale": 1.0,
            "generator": generator,
            "output_type": output_type,
        }
        if request.task == "t2i":
            arguments.update(width=request.size.width, height=request.size.height)
        else:
            arguments["image"] = picture(request.size)
        return self.pipeline(request.task)(**arguments).images

    def check_finite(self, request: ImageRequest) -> None:
        """Run ``request`` up to its latents.

        Raises:
            BenchError: if they are not finite: such values compute at another speed, and images would be empty.
        """
        if not bool(torch.isfinite(self.run(request, "latent")).all()):
            raise BenchError("the transformer's output is not finite")


def picture(size: Size) -> Image.Image:
    """A smooth random picture, always the same."""
    small = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size.width, size.height), Image.Resampling.BICUBIC)
