"""The CUDA source of one kernel: the PTX wrappers, the matrix instruction for its tile width, and the kernel file."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def wgmma_wrapper(columns: int, kind: str) -> str:
    """CUDA source of ``wgmma(acc, a, b, accumulate)``: 64 x ``columns`` += 64 x K times K x ``columns``.

    K is 32 bytes: 16 numbers of ``kind`` bf16 or f16, 32 of e4m3. Both operands come from shared memory, K-major.
    Generated because the instruction names each of its ``columns / 2`` accumulator registers.
    """
    count = columns // 2
    depth, order = (32, "") if kind == "e4m3" else (16, ", 0, 0")
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
DEVICE void wgmma(float (&d)[{count}], u64 a, u64 b, int accumulate) {{
  asm volatile(
      "{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0; "
      "wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind} "
      "{{{registers}}}, %{count}, %{count + 1}, p, 1, 1{order}; }}"
      : {outputs} : "l"(a), "l"(b), "r"(accumulate));
}}
"""


def kernel_source(columns: int, kind: str) -> str:
    """One self-contained translation unit (no includes) for a kernel computing ``columns`` channels per block.

    ``kind``: PTX type of the operands, ``bf16``, ``f16`` or ``e4m3``.
    """
    parts = [(_FOLDER / name).read_text() for name in ("ptx.cuh", "conv.cu", "epilogue.cuh", "mainloop.cuh")]
    parts.insert(1, wgmma_wrapper(columns, kind))
    return "\n".join(parts).replace("#pragma once\n", "")
