"""Qwen-Image VAE, many times faster, with the same images: ``accelerate(pipe)``."""

from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.plugin.entry import accelerate
from qwen_vae_accel.plugin.handle import Handle

__version__ = "0.1.0"

__all__ = ["AccelConfig", "Handle", "__version__", "accelerate"]
