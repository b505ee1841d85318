"""Time an image's way between the VAE and PIL, as diffusers goes it and as this package does.

    python -m qwen_vae_accel.processing.measure [--device cuda] [--sizes 1328x1328,1664x928] [--dtype bfloat16] [--json FILE]

Prints a Markdown table: post-processing of one decoded image, both ways, checked to be equal byte for byte; and the two
parts of pre-processing, the resize and the conversion to a tensor, which this package leaves to diffusers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwen_vae_accel.backends.base import default_device
from qwen_vae_accel.config import DTYPES, dtype_name
from qwen_vae_accel.plan import Size, parse_size
from qwen_vae_accel.processing.postprocess import PostProcessing
from qwen_vae_accel.report import Journal


def _milliseconds(calls: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call, in turns, so that what else the machine does falls on all; two warm-up turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-2, repeats):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if turn >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(size: Size, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, Any]:
    """All times of one size, in milliseconds.

    Raises:
        AssertionError: if the two ways to PIL images do not agree in every byte.
    """
    from diffusers.image_processor import VaeImageProcessor

    plain, ours = VaeImageProcessor(vae_scale_factor=16), VaeImageProcessor(vae_scale_factor=16)
    PostProcessing.install(ours, Journal())
    generator = torch.Generator().manual_seed(0)
    decoded = (torch.rand(1, 3, size.height, size.width, generator=generator) * 2 - 1).to(device, dtype)
    picture = plain.postprocess(decoded)[0]
    if picture.tobytes() != ours.postprocess(decoded)[0].tobytes():
        raise AssertionError(f"post-processing differs at {size}")
    source = picture.resize((size.width * 3 // 2, size.height * 3 // 2))
    calls: dict[str, Callable[[], object]] = {
        "to PIL, diffusers": lambda: plain.postprocess(decoded),
        "to PIL, here": lambda: ours.postprocess(decoded),
        "to array, diffusers": lambda: plain.postprocess(decoded, "np"),
        "to array, here": lambda: ours.postprocess(decoded, "np"),
        "from PIL: resize": lambda: plain.resize(source, size.height, size.width),
        "from PIL: to tensor": lambda: plain.preprocess(picture, size.height, size.width).to(device, dtype),
        "from PIL: to tensor, by table": lambda: _by_table(picture).to(device, dtype),
    }
    if not torch.equal(_by_table(picture), plain.preprocess(picture, size.height, size.width)):
        raise AssertionError(f"pre-processing by table differs at {size}")
    times = _milliseconds(calls, device, repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"size": str(size), "ms": medians, "least": {name: min(values) for name, values in times.items()}}


_TABLE = 2.0 * (np.arange(256).astype(np.float32) / 255.0) - 1.0


def _by_table(picture: Image.Image) -> torch.Tensor:
    """What a replacement of the conversion would do: the 256 values that diffusers' arithmetic has, looked up."""
    return torch.from_numpy(_TABLE[np.asarray(picture)][None].transpose(0, 3, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--sizes", default="1328x1328,1664x928,1024x1024")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=argparse.FileType("w"))
    options = parser.parse_args()
    dtype = DTYPES[dtype_name(options.dtype)]
    rows = [measure(parse_size(text), dtype, options.device, options.repeats) for text in options.sizes.split(",")]
    gpu = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else None
    machine = {"device": gpu or platform.processor() or platform.machine(), "torch": str(torch.__version__)}
    where = f"{machine['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{options.dtype} on {where}; median of {options.repeats} in ms (least)\n")
    print("| | " + " | ".join(row["size"] for row in rows) + " |\n" + "|---" * (len(rows) + 1) + "|")
    for name in rows[0]["ms"]:
        print(f"| {name} | " + " | ".join(f"{row['ms'][name]:.1f} ({row['least'][name]:.1f})" for row in rows) + " |")
    if options.json is not None:
        values = {"machine": machine, "dtype": options.dtype, "threads": torch.get_num_threads(), "results": rows}
        json.dump(values, options.json, indent=2)


if __name__ == "__main__":
    main()
