"""The CUDA source of one kernel: the PTX wrappers, the matrix instruction for its tile width, and the kernel file."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def wgmma_wrapper(columns: int, bf16: bool) -> str:
    """CUDA source of ``wgmma(acc, a, b, accumulate)``: 64 x ``columns`` += 64 x 16 times 16 x ``columns``.

    Both operands come from shared memory, K-major. Generated because the instruction names each of its
    ``columns / 2`` accumulator registers.
    """
    count = columns // 2
    kind = "bf16" if bf16 else "f16"
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
DEVICE void wgmma(float (&d)[{count}], u64 a, u64 b, int accumulate) {{
  asm volatile(
      "{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0; "
      "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
      "{{{registers}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0; }}"
      : {outputs} : "l"(a), "l"(b), "r"(accumulate));
}}
"""


def kernel_source(columns: int, bf16: bool) -> str:
    """One self-contained translation unit (no includes) for a kernel computing ``columns`` channels per block."""
    parts = [(_FOLDER / name).read_text() for name in ("ptx.cuh", "conv.cu", "epilogue.cuh", "mainloop.cuh")]
    parts.insert(1, wgmma_wrapper(columns, bf16))
    return "\n".join(parts).replace("#pragma once\n", "")
