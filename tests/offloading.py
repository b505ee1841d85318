"""Every way in which accelerate and diffusers keep a VAE's weights away from where it computes, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import attach_align_device_hook
from diffusers.hooks import apply_group_offloading
from torch import nn

from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mode:
    """One way to offload.

    Attributes:
        name: as in ``docs/pipelines.md``.
        apply: offloads ``vae`` to be computed on ``device``; files go to the folder.
        gpu: whether it needs a real GPU.
        between: where the parameters say they are between calls, when the VAE computes on a GPU.
        stays: whether the weights stay on the GPU until another model is called.
        loads: whether diffusers' own ``decode`` loads all its weights. Blocks of a VAE that names none are one group, which
            only ``forward`` loads.
    """

    name: str
    apply: Callable[[nn.Module, torch.device, Path], object]
    gpu: bool = False
    between: str = "cpu"
    stays: bool = False
    loads: bool = True


def _groups(**options: object) -> Callable[[nn.Module, torch.device, Path], object]:
    def apply(vae: nn.Module, device: torch.device, folder: Path) -> None:
        given = dict(options)
        if given.pop("disk", False):
            given["offload_to_disk_path"] = str(folder / "groups")
        apply_group_offloading(vae, onload_device=device, offload_device=CPU, **given)

    return apply


def _pipeline(method: str, **options: object) -> Callable[[nn.Module, torch.device, Path], object]:
    def apply(vae: nn.Module, device: torch.device, folder: Path) -> object:
        pipe = tiny_pipeline(vae)
        where = {"onload_device": device} if method == "enable_group_offload" else {"device": device}
        getattr(pipe, method)(**where, **options)
        return pipe

    return apply


def _device_map(vae: nn.Module, device: torch.device, folder: Path) -> None:
    """As diffusers does for ``device_map="balanced"``: every component as a whole."""
    dispatch_model(vae, {"": device}, main_device=device, force_hooks=True)


def _parts_on_disk(vae: nn.Module, device: torch.device, folder: Path) -> None:
    where = {"encoder": device, "quant_conv": device, "post_quant_conv": device, "decoder": "disk"}
    dispatch_model(vae, where, main_device=device, offload_dir=str(folder / "parts"))


def _parts_on_the_cpu(vae: nn.Module, device: torch.device, folder: Path) -> None:
    where = {"encoder": "cpu", "quant_conv": "cpu", "post_quant_conv": device, "decoder": device}
    dispatch_model(vae, where, main_device=device)


def _preloaded(vae: nn.Module, device: torch.device, folder: Path) -> None:
    """One hook for the whole decoder: it fills the parameters of all modules below."""
    names = [type(vae.encoder).__name__, type(vae.decoder).__name__]
    attach_align_device_hook(vae, execution_device=device, offload=True, preload_module_classes=names)


BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
LEAVES = {"offload_type": "leaf_level"}
STREAM = {"use_stream": True}
MODES = [
    Mode("model offload", lambda vae, device, folder: cpu_offload_with_hook(vae, device), stays=True),
    Mode("enable_model_cpu_offload", _pipeline("enable_model_cpu_offload"), stays=True),
    Mode("sequential offload", lambda vae, device, folder: cpu_offload(vae, device), between="meta"),
    Mode("sequential offload, decoder as a whole", _preloaded, between="meta"),
    Mode("disk offload", lambda vae, device, folder: disk_offload(vae, folder / "disk", device), between="meta"),
    Mode("device_map, the whole VAE", _device_map, between="cuda"),
    Mode("device_map, decoder on disk", _parts_on_disk, between="meta"),
    Mode("group offload, blocks", _groups(**BLOCKS), loads=False),
    Mode("group offload, leaves", _groups(**LEAVES)),
    Mode("group offload, blocks to disk", _groups(**BLOCKS, disk=True), loads=False),
    Mode("group offload, leaves to disk", _groups(**LEAVES, disk=True)),
    Mode("enable_sequential_cpu_offload", _pipeline("enable_sequential_cpu_offload"), gpu=True, between="meta"),
    Mode("enable_group_offload", _pipeline("enable_group_offload", **LEAVES, use_stream=True), gpu=True),
    Mode("device_map, encoder on the CPU", _parts_on_the_cpu, gpu=True, between="cuda"),
    Mode("group offload, blocks, stream", _groups(**BLOCKS, **STREAM), gpu=True, loads=False),
    Mode("group offload, leaves, stream", _groups(**LEAVES, **STREAM), gpu=True),
    Mode("group offload, leaves, record_stream", _groups(**LEAVES, **STREAM, record_stream=True), gpu=True),
    Mode("group offload, leaves, low_cpu_mem_usage", _groups(**LEAVES, **STREAM, low_cpu_mem_usage=True), gpu=True),
    Mode("group offload, leaves to disk, stream", _groups(**LEAVES, **STREAM, disk=True), gpu=True),
]
