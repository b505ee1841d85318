"""The one-liner: any Qwen-Image pipeline, same images, a faster VAE.

    python examples/one_liner.py

Here the pipeline is a toy around the shipped tiny VAE, so that it runs offline in seconds; with real weights it is
``pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16).to("cuda")``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from rich import print

from qwen_vae_accel import accelerate
from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline

VAE = Path(__file__).parent / "data" / "tiny_qwen_image_vae"


def generate(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a cup of coffee", height=128, width=192, num_inference_steps=2, generator=generator, output_type="pt").images


def main() -> None:
    pipe = tiny_pipeline(AutoencoderKLQwenImage.from_pretrained(VAE, torch_dtype=torch.float32))
    before = generate(pipe)

    handle = accelerate(pipe)
    after = generate(pipe)

    print(handle.report())
    print(f"largest difference between the two images: {(after - before).abs().max():.1e}")
    handle.restore()


if __name__ == "__main__":
    main()
