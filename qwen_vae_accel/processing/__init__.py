"""What pipelines do with an image after the VAE: from a decoded tensor to PIL images or arrays, on the device."""

from qwen_vae_accel.processing.postprocess import PostProcessing, processors_of

__all__ = ["PostProcessing", "processors_of"]
