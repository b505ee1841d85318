"""Does TensorRT work here? Builds engines of a small random VAE, reloads them, compares with the exact model, and says so.

Exit code 0: yes; 1: no, with the reasons. Takes a minute or two, most of it in TensorRT's builder.
"""

from __future__ import annotations

import sys
import tempfile

import torch

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends.base import Environment, default_device
from qwen_vae_accel.errors import AccelError
from qwen_vae_accel.loading import random_vae

CONFIGS = {
    "static": {"sizes": ["256x256"]},
    "multi-profile": {"sizes": ["128x128:256x256:384x384", "192x128:384x256:512x384"], "multi_profile": True},
}


def main() -> int:
    device = default_device()
    for name, value in Environment.detect(device).describe().items():
        print(f"{name:>28}  {value}")
    vae = random_vae(base_dim=16).to(device)
    z = torch.randn(1, 16, 1, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    with tempfile.TemporaryDirectory() as folder:
        for name, options in CONFIGS.items():
            for on_miss in ("build", "error"):
                common = {"task": "i2i", "backend": "tensorrt", "dtype": "fp16", "engine_dir": f"{folder}/{name}"}
                try:
                    with accelerate(vae, on_miss=on_miss, **common, **options) as handle, torch.inference_mode():
                        handle.warmup()
                        vae.encode(vae.decode(z, return_dict=False)[0])
                        print(f"{name}, on_miss={on_miss}:", handle.report(), sep="\n")
                        fallbacks = handle.report().as_dict()["fallbacks"]
                except AccelError as error:
                    print(error, file=sys.stderr)
                    return 1
                if fallbacks:
                    print("an engine was not used; see the report", file=sys.stderr)
                    return 1
    print("TensorRT engines are built, reloaded and right here.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
