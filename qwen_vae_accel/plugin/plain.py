"""Why a call is diffusers' own to serve, as far as the call alone decides it.

Engines and kernels read memory. Whoever traces, transforms or counts PyTorch's operations would see nothing of them, and
the tensors that stand for values in such a trace have no memory to read: only a plain call, of a tensor of values, is theirs.
Nor is any call that wants more than the values of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from qwen_vae_accel.model.offload import is_plain


def not_plain(x: Any) -> str:
    """Why a call with input ``x`` is none for the image networks; empty if it may be. Takes a microsecond."""
    if not isinstance(x, Tensor):
        return "torch.fx traces the call" if isinstance(x, torch.fx.Proxy) else ""
    if not is_plain(x):
        kind = type(x).__name__ if type(x) is not Tensor else "nested" if x.is_nested else str(x.layout)
        return f"its input is not a plain tensor ({kind})"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces the call"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    if forward_ad._current_level >= 0:
        return "derivatives are asked for in forward mode"
    if torch._C._len_torch_dispatch_stack():
        return f"a dispatch mode is on ({_names(torch.utils._python_dispatch._get_current_dispatch_mode_stack())})"
    if torch._C._len_torch_function_stack():
        modes = torch.overrides._get_current_function_mode_stack()
        # A default device only says where new tensors are made.
        if any(type(mode) is not DeviceContext for mode in modes):
            return f"a function mode is on ({_names(modes)})"
    return ""


def not_image(x: Tensor, device: torch.device, requires_grad: Callable[[], bool]) -> str:
    """Why the image networks must not compute ``x [B, C, T, h, w]``; empty if they may. Dynamo can trace it.

    Args:
        x: the input of a plain call, or what stands for it in a trace.
        device: where the network computes.
        requires_grad: whether gradients of the network's weights are wanted.
    """
    if x.shape[2] != 1:
        return f"{int(x.shape[2])} frames: only single images are accelerated"
    if torch.is_grad_enabled() and (x.requires_grad or requires_grad()):
        return "gradients are asked for; call it under torch.no_grad() or torch.inference_mode() to have it fast"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on, which chooses dtypes itself"
    return ""


def _names(modes: list[Any]) -> str:
    return ", ".join(dict.fromkeys(type(mode).__name__ for mode in modes))
