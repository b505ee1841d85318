"""What pipelines do with an image before and after the VAE: from PIL images to a tensor and back, on the device."""

from qwen_vae_accel.plugin.processing.postprocess import PostProcessing, processors_of
from qwen_vae_accel.plugin.processing.preprocess import PreProcessing
from qwen_vae_accel.plugin.processing.replacement import Replacement

__all__ = ["PostProcessing", "PreProcessing", "Replacement", "processors_of"]
