"""Backend ``fused``: hand-written kernels, and the calibration of their float16 and float8 ranges."""
