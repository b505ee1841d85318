"""Encode in float32, decode in bfloat16: an edit of an edit adds up the encoder's rounding, not the decoder's.

python examples/mixed_precision.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from qwen_vae_accel import accelerate

DATA = Path(__file__).parent / "data"


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    return 10 * math.log10(4 / (image.float() - reference.float()).square().mean().item())


@torch.inference_mode()
def edit(vae, image: torch.Tensor, rounds: int = 3) -> torch.Tensor:
    """Photo -> latents -> photo, several times over, as a chain of edits does."""
    for _ in range(rounds):
        latents = vae.encode(image.to(vae.dtype)).latent_dist.mode()
        image = vae.decode(latents, return_dict=False)[0]
    return image


def main() -> None:
    pixels = np.asarray(Image.open(DATA / "photos" / "coffee.png").convert("RGB").resize((96, 64)))
    photo = torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None, :, None]
    vae = AutoencoderKLQwenImage.from_pretrained(DATA / "tiny_qwen_image_vae", torch_dtype=torch.float32)
    exact = edit(vae, photo)
    for encode, decode in (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")):
        with accelerate(vae, encode_dtype=encode, decode_dtype=decode):
            print(f"encode {encode:8}  decode {decode:8}  {psnr(edit(vae, photo), exact):6.1f} dB to float32 diffusers")


if __name__ == "__main__":
    main()
