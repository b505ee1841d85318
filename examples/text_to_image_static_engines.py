"""Text-to-image with one engine per size, configured by the TensorRT guide's own JSON document.

    python examples/text_to_image_static_engines.py [ENGINE_DIR]

The first run compiles the engine into ENGINE_DIR, later runs load it in milliseconds. ``backend`` is overridden so that
it runs on any machine; leave the override out for TensorRT. ``sizes`` keeps the example short: without it, the guide's
five sizes get an engine each, and any other size gets one when it is first asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from rich import print

from qwen_vae_accel import accelerate
from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline

VAE = Path(__file__).parent / "data" / "tiny_qwen_image_vae"


def main(engine_dir: str = "engines/t2i_static") -> None:
    document = {
        "task": "t2i",
        "infer_steps": 8,  # keys of the guide's pipeline are read by the pipeline, not by us
        "vae_type": "tensorrt",
        "trt_vae_config": {"trt_engine_path": engine_dir, "multi_profile": False},
    }
    pipe = tiny_pipeline(AutoencoderKLQwenImage.from_pretrained(VAE, torch_dtype=torch.float32))
    with accelerate(pipe, document, backend="inductor", sizes=["64x64"]) as handle:
        for width, height in ((64, 64), (64, 64), (96, 64)):  # the last one is no size of the plan
            pipe("a red cup", height=height, width=width, num_inference_steps=2)
        print(handle.report())


if __name__ == "__main__":
    main(*sys.argv[1:])
