"""Build engines ahead of time, as an image build or a deployment step does; serving then only loads them.

    python examples/prebuild_engines.py [ENGINE_DIR]

The same from the command line: ``qwen-vae-accel build --vae PATH --backend inductor --engine-dir DIR --sizes 64x64``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage

from qwen_vae_accel import AccelConfig, accelerate

VAE = Path(__file__).parent / "data" / "tiny_qwen_image_vae"


def load_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(VAE, torch_dtype=torch.float32)


def main(engine_dir: str = "engines/t2i_static") -> None:
    config = AccelConfig(task="t2i", backend="inductor", engine_dir=engine_dir, sizes=["64x64"])

    # At deployment: build what is missing or stale, skip what is current.
    with accelerate(load_vae(), config, on_miss="build") as handle:
        report = handle.warmup().as_dict()
    print(f"built: {[build['engine'] for build in report['builds']] or 'nothing, all engines are current'}")

    # In the service: never build; a missing or foreign engine is an error at start-up, not a slow first request.
    vae = load_vae()
    with accelerate(vae, config, on_miss="error") as handle:
        report = handle.warmup(progress=False).as_dict()
        with torch.inference_mode():
            vae.decode(torch.zeros(1, 16, 1, 8, 8))
        for load in report["load_ms"]:
            print(f"loaded {load['engine']} in {load['ms']:.1f} ms")
        print(f"served by: {handle.report().as_dict()['calls']['decode']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
