"""What bands of rows cost and take: ``python benchmarks/memory.py`` writes ``results/h100_memory.json`` (a GPU, a minute).

Every size runs in one piece and within limits of its scratch memory, with random weights. Beside the time stand the planned and
the measured peak of a call, and whether the result equals that of one piece bit for bit. ``--large`` adds 8192x8192 (one minute
more), ``--output FILE`` names another file. The file is written after every size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_vae_accel.bench.machine import machine
from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.network import QWEN_IMAGE, QWEN_IMAGE_21, describe
from qwen_vae_accel.kernels.timing import elapsed_ms

MIB = 2**20
NO_LIMIT = 2**50
VAES = {"Qwen-Image": QWEN_IMAGE, "Qwen-Image 2.1": QWEN_IMAGE_21}
# VAE, method, side of the square image, limits in MiB: None is the default, 0 one piece.
CASES: list[tuple[str, str, int, list[int | None]]] = [
    ("Qwen-Image", "decode", 1024, [0, 300, 150]),
    ("Qwen-Image", "decode", 2048, [0, 1000, 700, 500]),
    ("Qwen-Image", "decode", 4096, [0, None, 1536, 1024]),
    ("Qwen-Image", "encode", 2048, [0, 700, 500]),
    ("Qwen-Image 2.1", "decode", 2048, [0, None, 2200]),
    ("Qwen-Image 2.1", "decode", 4096, [0, None, 2560]),
    ("Qwen-Image 2.1", "encode", 2048, [0, 1000, 700]),
]
LARGE: list[tuple[str, str, int, list[int | None]]] = [("Qwen-Image", "decode", 8192, [0, 8192, 4096])]
RESULT = Path(__file__).parent / "results" / "h100_memory.json"


def random_state(vae: str, method: str) -> dict[str, Tensor]:
    """Weights that keep activations near one."""
    draw = torch.Generator("cuda").manual_seed(0)

    def values(name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=draw, device="cuda")
        if name.endswith("gamma"):
            return 1 + 0.1 * x
        return x * (0.1 if name.endswith("bias") else math.prod(shape[1:]) ** -0.5)

    return {name: values(name, shape) for name, shape in describe(VAES[vae], method).parameters().items()}


def peak_of(network: FusedDecoder | FusedEncoder, x: Tensor) -> tuple[Tensor, int]:
    """The output of a call without a graph, and the most bytes that were allocated beside what was before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = network.run_plain(x)
    torch.cuda.synchronize()
    return output, torch.cuda.max_memory_allocated() - before


def median_ms(network: FusedDecoder | FusedEncoder, x: Tensor, repeats: int) -> float:
    """Of calls as a pipeline makes them, after those that capture the graph."""
    for _ in range(2 if repeats > 1 else 0):
        network(x)
    return statistics.median(elapsed_ms(lambda: network(x)) for _ in range(repeats))


def rows_of(vae: str, method: str, side: int, limits: list[int | None], network: FusedDecoder | FusedEncoder) -> Iterator[dict]:
    """One row a limit, the first of which is one piece."""
    topology = VAES[vae]
    pixels, channels = (side // topology.scale, topology.z_dim) if method == "decode" else (side, topology.image_channels)
    x = torch.randn(1, channels, pixels, pixels, generator=torch.Generator("cuda").manual_seed(1), device="cuda").bfloat16()
    repeats = 7 if side <= 2048 else 3 if side <= 4096 else 1
    whole = None
    for limit in limits:
        network.limit_memory(None if limit is None else limit * MIB or NO_LIMIT)
        plan = network.plan(x.shape)
        if whole is None:
            network.run_plain(x)  # packs layers and compiles what was not yet
        output, measured = peak_of(network, x)
        whole = output if whole is None else whole
        equal = torch.equal(output, whole)
        del output
        yield {
            "vae": vae,
            "method": method,
            "size": f"{side}x{side}",
            "limit_mib": limit,
            "bands": plan.bands,
            "level": plan.level,
            "fits": plan.fits,
            "operations": plan.cost,
            "scratch_mib": plan.scratch_bytes / MIB,
            "planned_mib": plan.call_bytes / MIB,
            "measured_mib": measured / MIB,
            "ms": median_ms(network, x, repeats),
            "equal": equal,
        }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--large", action="store_true", help="8192x8192 too")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    networks: dict[tuple[str, str], FusedDecoder | FusedEncoder] = {}
    document = {"machine": machine(torch.device("cuda", torch.cuda.current_device())), "command": sys.argv, "rows": found}
    for vae, method, side, limits in CASES + (LARGE if options.large else []):
        if (vae, method) not in networks:
            networks.clear()
            torch.cuda.empty_cache()
            cls = FusedDecoder if method == "decode" else FusedEncoder
            device = torch.device("cuda")
            network = cls(random_state(vae, method), dtype=torch.bfloat16, device=device, config=FusedConfig())
            network.compile()
            networks[vae, method] = network
        for row in rows_of(vae, method, side, limits, networks[vae, method]):
            found.append(row)
            memory = f"{row['scratch_mib']:.0f} MiB, planned {row['planned_mib']:.0f}, measured {row['measured_mib']:.0f}"
            result = f"{row['ms']:.1f} ms, {'equal' if row['equal'] else 'DIFFERENT'}"
            print(f"{vae} {method} {row['size']}: {row['bands']} bands, {memory}, {result}", flush=True)
        networks[vae, method].release()
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
