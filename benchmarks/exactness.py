"""How far diffusers' and our networks are from float64, in every dtype: the margins of ``docs/exactness.md``.

python benchmarks/exactness.py [VAE folder ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from qwen_vae_accel.accuracy import FACTOR, measure
from qwen_vae_accel.backends.base import Environment, Job, default_device
from qwen_vae_accel.backends.samples import sample_input
from qwen_vae_accel.engines.selfcheck import exact_output, published_error
from qwen_vae_accel.loading import load_vae
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.sizes import Size

TINY = Path(__file__).parents[1] / "examples" / "data" / "tiny_qwen_image_vae"
SIZES = (Size(64, 64), Size(128, 96))


@torch.no_grad()
def main() -> None:
    device = default_device()
    print(f"{Environment.detect(device).describe()}, {torch.get_num_threads()} threads, {FACTOR} times is allowed\n")
    print("| VAE | network | dtype | size | diffusers: whole, worst line | here: whole, worst line | times |")
    print("|---|---|---|---|---|---|---|")
    for folder in map(Path, sys.argv[1:] or [TINY]):
        source = ModelSource(load_vae(folder, device))
        for method in ("encode", "decode"):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                job = Job(method, source.topology, dtype, device)
                theirs = published_error(source, job)
                for size in SIZES:
                    x = sample_input(job, size, source.config).to(dtype)
                    ours = measure(source.model(method, dtype, device)(x), exact_output(source, job, x))
                    print(
                        f"| {folder.name} | {method} | {str(dtype)[6:]} | {size} | {theirs.relative:.1e}, {theirs.line:.1e} "
                        f"| {ours.relative:.1e}, {ours.line:.1e} | {ours.times(theirs):.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
