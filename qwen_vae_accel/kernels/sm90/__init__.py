"""Hopper (compute capability 9.0) kernels in CUDA C++, compiled on the user's machine by NVRTC at first use.

conv3x3.py     Conv3x3: the layer others call; ``unsupported`` says why it cannot run here
schedules.py   compile-time choices and the choice among them; packing.py: weights as the kernel wants them
conv.cu        tiles, rings of buffers, the feeding warps; mainloop.cuh, epilogue.cuh: the computing ones
attention.py   attention of head dim 384; attention.cu: its kernel
ptx.cuh        wrappers of the instructions; source.py puts one translation unit together
nvrtc.py       compiling, with a cache on disk; driver.py: loading and launching
"""
