"""The command ``qwen-vae-accel``."""

from qwen_vae_accel.cli.app import main

__all__ = ["main"]
