"""CUDA C++ kernels of compute capability 9.0 (Hopper), compiled on the user's machine by NVRTC at first use.

layers.py      the layers of a network that run here; conv3x3.py: one of them, ``unsupported`` says why it cannot run
schedules.py   compile-time choices and the choice among them; packing.py: weights as the kernel wants them
conv.cu        the convolution; conv_tile.cuh, conv_feed.cuh, mainloop.cuh, epilogue.cuh: its parts
attention.py   attention of head dim 384; attention.cu: its kernel
wgmma.cuh      the matrix instruction; ptx.cuh: wrappers of the others
source.py      the texts; nvrtc.py: compiling, with a cache on disk; driver.py: loading and launching
"""
