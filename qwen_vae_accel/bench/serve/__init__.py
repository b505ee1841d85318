"""Whole requests at the TensorRT guide's service conditions: plain pipeline and accelerated one, part by part."""
