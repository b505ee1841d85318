"""The new process of the demo: engines from disk, a photo through the VAE, an image out of a pipeline.

``python -m qwen_vae_accel.demo.reload REQUEST.json`` writes its findings to the file that they name.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.config import DTYPES, AccelConfig
from qwen_vae_accel.demo.picture import amplified, open_photo, psnr, save_each, side_by_side, to_image, to_tensor
from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline
from qwen_vae_accel.documents import dump_json, read_json
from qwen_vae_accel.errors import AccelError
from qwen_vae_accel.files import write_atomically
from qwen_vae_accel.loading import load_vae
from qwen_vae_accel.plugin.entry import accelerate
from qwen_vae_accel.plugin.handle import Handle

PROMPT = "a cup of coffee on a wooden table"
STEPS = 4
SCHEMA = 1
KIND = "demo"
FILE = "demo.json"
PANELS = ("photo", "diffusers", "accelerated", "difference")


@dataclass(frozen=True, slots=True)
class Instructions:
    """What the new process is to do; JSON values only.

    Attributes:
        model: folder of the VAE.
        image: the photo.
        area: pixels of the photo at most.
        dtype: of the VAE's parameters.
        device: where to run.
        config: an :class:`AccelConfig` as :meth:`~AccelConfig.as_dict` gives it.
        output: folder of the pictures and of ``demo.json``.
        repeats: timed calls per method.
    """

    model: str
    image: str
    area: int
    dtype: str
    device: str
    config: dict[str, Any]
    output: str
    repeats: int = 3

    @property
    def findings(self) -> Path:
        """The file that the new process writes."""
        return Path(self.output) / FILE


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(call: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[Tensor, float, float]:
    """The result, milliseconds of the first call, and the median of ``repeats`` more."""
    times = []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        result = call()
        _synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return result, times[0], statistics.median(times[1:])


def _through(vae: Any, x: Tensor, device: torch.device, repeats: int) -> dict[str, Any]:
    """Encode and decode ``x``: outputs and times."""
    mode, first_encode, encode = _timed(lambda: vae.encode(x).latent_dist.mode(), device, repeats)
    image, first_decode, decode = _timed(lambda: vae.decode(mode, return_dict=False)[0], device, repeats)
    times = {"encode_ms": encode, "decode_ms": decode, "first_encode_ms": first_encode, "first_decode_ms": first_decode}
    return {"latent": mode, "image": image, "times": times}


def _photo(instructions: Instructions, vae: nn.Module, device: torch.device) -> tuple[dict[str, Any], Handle]:
    photo = open_photo(Path(instructions.image), instructions.area)
    channels = int(getattr(vae.config, "input_channels", 3) or 3)
    exact = to_tensor(photo, channels)
    x = exact.to(device, DTYPES[instructions.dtype])
    plain = _through(vae, x, device, instructions.repeats)
    handle = accelerate(vae, instructions.config)
    ours = _through(vae, x, device, instructions.repeats)
    theirs, mine = plain["image"], ours["image"]
    quality = {"diffusers": psnr(theirs, exact), "accelerated": psnr(mine, exact), "between": psnr(mine, theirs)}
    difference, largest, factor = amplified(mine, theirs)
    speed = {name: plain["times"][f"{name}_ms"] / ours["times"][f"{name}_ms"] for name in ("encode", "decode")}
    panels = [
        (photo, "photo", f"{Path(instructions.image).name}, {photo.width}x{photo.height}"),
        (to_image(theirs), "diffusers", _line(plain["times"], quality["diffusers"])),
        (to_image(mine), f"accelerated ({handle.config.backend})", _line(ours["times"], quality["accelerated"])),
        (difference, f"difference x {factor:,}", f"largest {largest:.1e} of [-1, 1], PSNR {quality['between']:.1f} dB"),
    ]
    path = Path(instructions.output) / "photo.png"
    side_by_side(panels, path)
    each = save_each(panels, PANELS, Path(instructions.output) / "panels")
    latents = (ours["latent"].float() - plain["latent"].float()).abs().max().item()
    return {
        "image": Path(instructions.image).name,
        "size": f"{photo.width}x{photo.height}",
        "diffusers": plain["times"],
        "accelerated": ours["times"],
        "speedup": speed,
        "psnr_db": {name: _number(value) for name, value in quality.items()},
        "largest_difference": largest,
        "largest_latent_difference": latents,
        "picture": str(path),
        "panels": each,
    }, handle


def _line(times: dict[str, float], quality: float) -> str:
    return f"encode {times['encode_ms']:.0f} ms, decode {times['decode_ms']:.0f} ms, {quality:.1f} dB to the photo"


def _pipeline(instructions: Instructions, vae: nn.Module, handle: Handle, device: torch.device) -> dict[str, Any]:
    """The same image with and without acceleration; ``handle`` is restored in between."""
    pipeline = tiny_pipeline(vae)
    photo = open_photo(Path(instructions.image), instructions.area)

    def generate() -> tuple[Tensor, float]:
        start = time.perf_counter()
        result = pipeline(
            prompt=PROMPT,
            width=photo.width,
            height=photo.height,
            num_inference_steps=STEPS,
            true_cfg_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        _synchronize(device)
        return result.images[0][None, :, None] * 2 - 1, (time.perf_counter() - start) * 1e3

    ours, our_ms = generate()
    calls = handle.report().as_dict()["calls"]
    handle.restore()
    theirs, their_ms = generate()
    difference, largest, factor = amplified(ours, theirs)
    between = psnr(ours, theirs)
    path = Path(instructions.output) / "pipeline.png"
    side_by_side(
        [
            (to_image(theirs), "QwenImagePipeline, diffusers", f"tiny random transformer, {STEPS} steps, {their_ms:.0f} ms"),
            (to_image(ours), "QwenImagePipeline, accelerated", f"same seed, {our_ms:.0f} ms"),
            (difference, f"difference x {factor:,}", f"largest {largest:.1e} of [-1, 1], PSNR {between:.1f} dB"),
        ],
        path,
    )
    return {
        "pipeline": type(pipeline).__name__,
        "size": f"{photo.width}x{photo.height}",
        "steps": STEPS,
        "diffusers_ms": their_ms,
        "accelerated_ms": our_ms,
        "psnr_db": _number(between),
        "largest_difference": largest,
        "calls": calls,
        "picture": str(path),
    }


def _number(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)


def perform(instructions: Instructions) -> dict[str, Any]:
    """Everything the new process does; the findings, as JSON values."""
    start = time.perf_counter()
    device = torch.device(instructions.device)
    vae = load_vae(instructions.model, device, DTYPES[instructions.dtype])
    loaded = time.perf_counter()
    config = AccelConfig.from_dict(instructions.config)
    with torch.inference_mode():
        photo, handle = _photo(instructions, vae, device)
        report = handle.report()
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "model": Path(instructions.model).name,
            "device": instructions.device,
            "dtype": instructions.dtype,
            "backend": config.backend,
            "load_vae_ms": (loaded - start) * 1e3,
            "load_engine_ms": {entry["engine"]: entry["ms"] for entry in report.as_dict()["load_ms"]},
            "photo": photo,
            "report": report.as_dict(),
            "report_text": str(report),
            "pipeline": _pipeline(instructions, vae, handle, device),
        }


def main(path: str) -> int:
    """Follow the instructions in a file; an error of ours is written as the finding."""
    instructions = Instructions(**read_json(Path(path)))
    try:
        findings = perform(instructions)
    except AccelError as error:
        findings = {"error": {"type": type(error).__name__, "message": str(error)}}
    write_atomically(instructions.findings, dump_json(findings))
    return 1 if "error" in findings else 0


def as_json(instructions: Instructions) -> str:
    """The text of an instruction file."""
    return json.dumps(dataclasses.asdict(instructions), indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
