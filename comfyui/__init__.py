"""Custom node for ComfyUI: the Qwen-Image VAE, many times faster, with the same images."""

from .accelerate_vae import AccelerateVAE

NODE_CLASS_MAPPINGS = {"QwenVAEAccelerate": AccelerateVAE}
NODE_DISPLAY_NAME_MAPPINGS = {"QwenVAEAccelerate": "Accelerate VAE"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
