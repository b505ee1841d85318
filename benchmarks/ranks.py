"""One image over the GPUs of one machine, beside one GPU of it: results, times, and what the cost model predicts.

    torchrun --nproc-per-node 4 benchmarks/ranks.py benchmarks/results/h100x4_ranks.json

Random weights at published widths. ``--check`` compares small images alone, and measures nothing.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.network import QWEN_IMAGE, QWEN_IMAGE_21, describe
from qwen_vae_accel.model.topology import Topology
from qwen_vae_accel.share import Share

VAES = {"Qwen-Image": QWEN_IMAGE, "Qwen-Image 2.1": QWEN_IMAGE_21}
SIZES = {
    ("Qwen-Image", "decode"): (1024, 2048, 4096, 8192), ("Qwen-Image", "encode"): (1024, 2048, 4096),
    ("Qwen-Image 2.1", "decode"): (1024, 2048, 4096), ("Qwen-Image 2.1", "encode"): (1024, 2048, 4096),
}  # fmt: skip
SMALL = ((1, 256, 320), (2, 496, 304), (1, 16, 64))


def random_state(topology: Topology, method: str, device: torch.device) -> dict[str, Tensor]:
    """Weights that keep activations near one, the same on every rank."""
    generator = torch.Generator("cuda").manual_seed(0)

    def values(name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device)
        if name.endswith("gamma"):
            return 1 + 0.1 * drawn
        return drawn * (0.1 if name.endswith("bias") else float(max(1, torch.tensor(shape[1:]).prod())) ** -0.5)

    return {name: values(name, shape) for name, shape in describe(topology, method).parameters().items()}


def milliseconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The best of some calls, of the slowest rank."""
    best = float("inf")
    for _ in range(repeats + 2):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, 1e3 * (time.perf_counter() - start))
    slowest = torch.tensor(best, device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def main() -> None:
    checks = "--check" in sys.argv
    target = next((Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")), None)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    share = Share.of_group(dist.group.WORLD)
    assert share is not None
    rows = []
    for (name, method), sides in SIZES.items():
        topology, kind = VAES[name], FusedDecoder if method == "decode" else FusedEncoder
        state = random_state(topology, method, device)
        alone = kind(state, dtype=torch.bfloat16, device=device, config=FusedConfig(memory_limit=8 << 30))
        together = kind(state, dtype=torch.bfloat16, device=device, config=FusedConfig(memory_limit=8 << 30), share=share)
        for batch, height, width in SMALL if checks else [(1, side, side) for side in sides]:
            if method == "decode":
                shape = batch, topology.z_dim, height // topology.scale, width // topology.scale
            else:
                shape = batch, topology.image_channels, height, width
            x = torch.randn(shape, device=device, generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
            one, all_of_us = alone(x), together(x)
            error = ((all_of_us.float() - one.float()).norm() / one.float().norm()).item()
            assert error < 0.01, (name, method, height, error)
            everywhere = [torch.empty_like(all_of_us) for _ in range(share.size)]
            dist.all_gather(everywhere, all_of_us)
            assert all(torch.equal(all_of_us, other) for other in everywhere), "ranks have different images"
            equal = torch.equal(one, all_of_us)
            del one, all_of_us, everywhere
            if checks:
                continue
            times = milliseconds(partial(alone, x)), milliseconds(partial(together, x))
            predicted = together.predicted_ms(shape, times[0])
            rows.append(
                {"vae": name, "method": method, "size": f"{width}x{height}", "one_ms": times[0], "all_ms": times[1],
                 "predicted_ms": predicted, "equal": equal, "relative_difference": error}
            )  # fmt: skip
            if share.rank == 0:
                speedups = f"{times[0] / times[1]:.2f}x, predicted {times[0] / predicted:.2f}x"
                print(
                    f"{name} {method} {width}x{height}: {times[0]:.2f} -> {times[1]:.2f} ms, {speedups}, equal {equal}",
                    flush=True,
                )
        alone = together = state = None
        torch.cuda.empty_cache()
    if target is not None and share.rank == 0:
        document = {
            "gpu": torch.cuda.get_device_name(), "gpus": share.size, "torch": torch.__version__, "dtype": "bfloat16",
            "command": f"torchrun --nproc-per-node {share.size} benchmarks/ranks.py {target}",
            "made_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "rows": rows,
        }  # fmt: skip
        target.write_text(json.dumps(document, indent=1) + "\n")
    dist.destroy_process_group()
    print("all right")


if __name__ == "__main__":
    main()
