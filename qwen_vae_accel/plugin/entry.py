"""The way in: ``accelerate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.errors import HandleError
from qwen_vae_accel.plugin.handle import Handle
from qwen_vae_accel.plugin.hosted import HostedHandle
from qwen_vae_accel.plugin.hosts import find_vae, is_hosted
from qwen_vae_accel.plugin.methods import handle_of
from qwen_vae_accel.share import ProcessGroup


def accelerate(
    target: Any,
    config: AccelConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    process_group: ProcessGroup | None = None,
    **overrides: Any,
) -> Handle:
    """Make ``encode`` and ``decode`` of a Qwen-Image VAE fast, in place.

    Args:
        target: a diffusers pipeline with a ``vae``, or the VAE itself; another program's object that holds one, or its module
            with the weights of one (``docs/hosts.md``).
        config: an :class:`AccelConfig`, a dict or JSON file of one, or the TensorRT guide's JSON, with whatever else its host
            has in there. None: the defaults.
        process_group: processes of ``torch.distributed`` that compute every image together, with a device each. All of them
            call ``accelerate`` alike, and ``encode`` and ``decode`` with the same input; each gets the whole result.
        overrides: fields of :class:`AccelConfig` that replace those of ``config``.

    Returns:
        The handle: a report, a warm-up, and the way back. Calling again with an equal config returns the same handle.

    Raises:
        ConfigError: if ``config`` or ``overrides`` are invalid.
        UnsupportedVAEError: if ``target`` holds no VAE of Qwen-Image, Qwen-Image 2.1 or Wan 2.1.
        BackendUnavailableError: if a backend asked for by name cannot run here.
        EngineError: if the engine directory cannot be one.
        HandleError: if the VAE is accelerated already with another config.
    """
    wanted = AccelConfig.resolve(config, **overrides)
    vae = find_vae(target)
    existing: Handle | None = handle_of(vae)
    if existing is not None and not existing._active:  # an interrupt ended its restore()
        existing.restore()
        existing = None
    if existing is not None:
        if existing.config == wanted and existing.process_group is process_group:
            if target is not vae:
                existing._adopt(target)
            return existing
        raise HandleError(
            "this VAE is accelerated already with another config or process group; call restore() on its handle first.\n"
            f"  there: {existing.config}\n  asked: {wanted}"
        )
    kind = HostedHandle if is_hosted(vae) else Handle
    return kind(vae, wanted, None if target is vae else target, process_group)
