"""How long a fresh process takes to its first image: ``python benchmarks/first_image.py > first_image.json`` (needs a GPU).

Two processes in turn share empty kernel caches: the first compiles, the second finds what the first left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

WIDTH, HEIGHT = 1024, 1024


def first_image() -> dict[str, float]:
    """Seconds of each step, in this process."""
    spans: dict[str, float] = {}
    start = time.perf_counter()

    def done(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        spans[name], start = now - start, now

    import torch

    done("import_torch")
    from diffusers import AutoencoderKLQwenImage

    done("import_diffusers")
    from qwen_vae_accel import accelerate

    done("import_qwen_vae_accel")
    with torch.device("cuda"), torch.no_grad():
        vae = AutoencoderKLQwenImage().to(torch.bfloat16).eval()
        z = torch.randn(1, 16, 1, HEIGHT // 8, WIDTH // 8, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        done("make_vae")
        accelerate(vae, backend="fused")
        image = vae.decode(z).sample
        torch.cuda.synchronize()
        done("first_decode")
        vae.encode(image)
        torch.cuda.synchronize()
        done("first_encode")
    spans["import_to_first_image"] = spans["import_qwen_vae_accel"] + spans["first_decode"]
    return spans


def main() -> None:
    if sys.argv[1:] == ["--child"]:
        print(json.dumps(first_image()))
        return
    import torch

    from qwen_vae_accel.bench.machine import machine

    found = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": f"{folder}/cache"}
        for _ in range(2):
            child = [sys.executable, __file__, "--child"]
            output = subprocess.run(child, env={**os.environ, **caches}, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(output.stdout.splitlines()[-1]))
    facts = machine(torch.device("cuda", torch.cuda.current_device()))
    values = {"size": f"{WIDTH}x{HEIGHT}", "machine": facts, "first_process_s": found[0], "second_process_s": found[1]}
    print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
