"""One VAE, many threads: requests of several sizes at once, each answered with its own image.

python examples/threaded_serving.py
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from rich import print

from qwen_vae_accel import accelerate

VAE = Path(__file__).parent / "data" / "tiny_qwen_image_vae"
SIZES = ((64, 64), (96, 64), (64, 96), (128, 64))


def main() -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(VAE, torch_dtype=torch.float32)
    # With engines, max_resident=2 would keep two sizes loaded and release the one that was used longest ago.
    handle = accelerate(vae)

    @torch.inference_mode()  # is a setting of each thread
    def decode(request: int) -> tuple[int, torch.Tensor]:
        width, height = SIZES[request % len(SIZES)]
        latents = torch.randn(1, 16, 1, height // 8, width // 8, generator=torch.Generator().manual_seed(request))
        return request, vae.decode(latents, return_dict=False)[0]

    with ThreadPoolExecutor(max_workers=4) as pool:
        images = dict(pool.map(decode, range(16)))

    alone = {request: decode(request)[1] for request in images}
    same = sum(torch.equal(images[request], alone[request]) for request in images)
    print(f"{same} of {len(images)} images are the same as without other threads")
    print(handle.report())
    handle.restore()


if __name__ == "__main__":
    main()
