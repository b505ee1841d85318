"""Builds the demo's engines and starts the new process that reloads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qwen_vae_accel
from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.demo.picture import open_photo
from qwen_vae_accel.demo.reload import Instructions, as_json
from qwen_vae_accel.documents import read_json
from qwen_vae_accel.engines.builder import Builder, BuildResult
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import AccelError, BuildError, ConfigError, UnsupportedVAEError
from qwen_vae_accel.files import write_atomically
from qwen_vae_accel.loading import load_vae, stored_dtype, vae_folder
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.sizes import LATENT_SCALE

_DATA = Path(qwen_vae_accel.__file__).resolve().parents[1] / "examples" / "data"


class DemoError(AccelError, RuntimeError):
    """The new process of the demo failed."""


def shipped(name: str) -> Path:
    """A file or folder of the data that a source checkout holds.

    Raises:
        ConfigError: in an installation without it.
    """
    path = _DATA / name
    if not path.exists():
        raise ConfigError("this installation has no sample data; give --model and --image, or run from a source checkout")
    return path


def fetch_model(model: str) -> Path:
    """The folder of a VAE: a local path, or the VAE of a model on the Hugging Face Hub, downloaded if it is not cached.

    Raises:
        UnsupportedVAEError: if there is none.
    """
    if os.path.exists(os.path.expanduser(model)) or model.count("/") != 1:
        return vae_folder(model)
    from huggingface_hub import snapshot_download

    try:
        return vae_folder(snapshot_download(model, allow_patterns=["vae/*", "config.json", "*.safetensors"]))
    except AccelError:
        raise
    except Exception as error:  # its client's own, and those of the network below it
        reasons = [
            "there is no such folder",
            f"it could not be loaded from the Hub: {type(error).__name__}: {error}".splitlines()[0],
        ]
        raise UnsupportedVAEError(model, reasons) from error


def make_instructions(
    model: str | None,
    image: Path | None,
    output: Path,
    backend: str,
    dtype: str | None,
    device: torch.device,
    area: int,
) -> Instructions:
    """The instructions with their defaults filled in: the shipped VAE and photo, float32 on the CPU, bfloat16 on the GPU."""
    folder = shipped("tiny_qwen_image_vae") if model is None else fetch_model(model)
    photo = shipped("photos/coffee.png") if image is None else image
    size = open_photo(photo, area)
    stored = str(torch.float32 if device.type == "cpu" else stored_dtype(folder)).removeprefix("torch.")
    config = AccelConfig(
        task="i2i",
        backend=backend,
        engine_dir=str(output / "engines"),
        sizes=(f"{size.width}x{size.height}",),
        dtype=dtype,
        on_miss="error",
    )
    return Instructions(
        model=str(folder),
        image=str(photo),
        area=area,
        dtype=config.dtype or stored,
        device=str(device),
        config=config.as_dict(),
        output=str(output),
    )


def build(
    instructions: Instructions, report: Callable[[int, Wanted, BuildResult | None], None]
) -> tuple[Instructions, list[BuildResult]]:
    """Build the engines; the instructions then name the backend that ``auto`` took.

    Raises:
        UnsupportedVAEError: if the VAE is not one of 8 pixels per latent pixel.
        BuildError: if an engine could not be built.
    """
    device = torch.device(instructions.device)
    config = AccelConfig.from_dict(instructions.config)
    source = ModelSource(load_vae(instructions.model, device, getattr(torch, instructions.dtype)))
    scale = source.topology.scale
    if scale != LATENT_SCALE:
        reason = f"the demo is for {LATENT_SCALE} pixels per latent pixel, and this VAE has {scale}; accelerate() serves it"
        raise UnsupportedVAEError(type(source.vae).__name__, [reason])
    builder = Builder(config, source, device)
    results = builder.run(lambda wanted, result: report(len(builder.wanted), wanted, result))
    failed = [result for result in results if result.status == "failed"]
    if failed:
        raise BuildError("; ".join(f"{result.path}: {result.reason}" for result in failed))
    values = {**instructions.config, "backend": builder.backend.name}
    return Instructions(**{**json.loads(as_json(instructions)), "config": values}), results


def reload(instructions: Instructions) -> dict[str, Any]:
    """Run :mod:`qwen_vae_accel.demo.reload` in a new process and return its findings.

    Raises:
        DemoError: if it failed.
    """
    folder = Path(instructions.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        instructions.findings.unlink(missing_ok=True)
        path = folder / "request.json"
        write_atomically(path, as_json(instructions))
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}") from error
    command = [sys.executable, "-W", "ignore", "-m", "qwen_vae_accel.demo.reload", str(path)]
    # Nothing of the new process may end up in this one's standard output: to standard error with it.
    code = subprocess.run(command, stdout=2, check=False).returncode
    if not instructions.findings.is_file():
        raise DemoError(f"the new process ended with code {code} and left no result")
    try:
        findings: dict[str, Any] = read_json(instructions.findings)
    except (OSError, ValueError) as error:
        raise DemoError(f"the new process left a damaged result: {error}") from error
    if "error" in findings:
        raise DemoError(f"in the new process: {findings['error']['type']}: {findings['error']['message']}")
    return findings
