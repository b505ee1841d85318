"""Image editing with one engine for a whole range of sizes: what users bring is never of one size.

    python examples/editing_multi_profile.py [ENGINE_DIR]

Editing encodes the user's photo and decodes the result, so ``task`` is "i2i" and both networks get an engine. The guide's
nine profiles are the default of ``multi_profile``; here one small range is asked for, as MINIMUM:OPTIMUM:MAXIMUM.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageImg2ImgPipeline
from PIL import Image
from rich import print

from qwen_vae_accel import AccelConfig, accelerate
from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline

DATA = Path(__file__).parent / "data"


def main(engine_dir: str = "engines/i2i_multi_profile") -> None:
    config = AccelConfig(
        task="i2i",
        backend="inductor",
        engine_dir=engine_dir,
        multi_profile=True,
        sizes=["48x48:64x64:96x128"],
    )
    vae = AutoencoderKLQwenImage.from_pretrained(DATA / "tiny_qwen_image_vae", torch_dtype=torch.float32)
    pipe = QwenImageImg2ImgPipeline(**tiny_pipeline(vae).components)
    pipe.set_progress_bar_config(disable=True)
    photo = Image.open(DATA / "photos" / "coffee.png")
    with accelerate(pipe, config) as handle:
        for width, height in ((64, 64), (96, 64), (64, 96)):
            edited = pipe("in the rain", image=photo, height=height, width=width, strength=0.5, num_inference_steps=4)
            print(f"{width}x{height}: {edited.images[0].size}")
        print(handle.report())


if __name__ == "__main__":
    main(*sys.argv[1:])
