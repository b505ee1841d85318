"""One image over several GPUs of a machine: every process gives the same input and gets the whole image.

    torchrun --nproc-per-node 2 examples/several_gpus.py

Without GPUs the processes share the CPU, which only shows that the images are the same.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLQwenImage

from qwen_vae_accel import accelerate

VAE = Path(__file__).parent / "data" / "tiny_qwen_image_vae"


def main() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    vae = AutoencoderKLQwenImage.from_pretrained(VAE, torch_dtype=torch.float32).to("cuda" if cuda else "cpu")
    latents = torch.randn(1, 16, 1, 24, 20, generator=torch.Generator().manual_seed(0)).to(vae.device)
    with torch.no_grad():
        before = vae.decode(latents).sample
        with accelerate(vae, backend="eager", process_group=dist.group.WORLD):
            after = vae.decode(latents).sample
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: largest difference {(after - before).abs().max():.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
