"""How large a network's activations get: whether a dtype of narrow range can hold them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_vae_accel.model.layers import Attention, Conv, Downsample, ResidualBlock, Upsample


def activation_peaks(network: nn.Module, x: Tensor) -> dict[str, float]:
    """The largest ``|value|`` that every convolution, block and attention of ``network`` gives for ``x``.

    Args:
        network: an image encoder or decoder in float32.
        x: ``[B, C, H, W]`` float32, on its device.

    Returns:
        The peak by module name, in the order of execution; infinite or NaN values as they are.
    """
    peaks: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _module, _inputs, output: peaks.__setitem__(name, output.abs().max()))

    kinds = (Attention, Conv, Downsample, ResidualBlock, Upsample)
    hooks = [watch(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]
    try:
        with torch.no_grad():
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: peak.item() for name, peak in peaks.items()}
