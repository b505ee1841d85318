"""The CUDA source of one kernel: the PTX wrappers, the matrix instruction for its tile width, and the kernel file."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def wgmma_wrapper(columns: int, kind: str, name: str = "wgmma", *, registers: bool = False) -> str:
    """CUDA source of ``name(acc, a, b, accumulate)``: 64 x ``columns`` += 64 x K times K x ``columns``.

    K is 32 bytes: 16 numbers of ``kind`` bf16 or f16, 32 of e4m3. Operands come from shared memory, K-major. With ``registers``
    (16-bit kinds) ``a`` is four registers, always accumulated, and ``b`` lies transposed.
    Generated because the instruction names each of its ``columns / 2`` accumulator registers.
    """
    count = columns // 2
    depth, order = (32, "") if kind == "e4m3" else (16, ", 1" if registers else ", 0, 0")
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    if registers:
        parameters = "u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int accumulate = 1"
        a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        inputs, after = '"r"(a0), "r"(a1), "r"(a2), "r"(a3)', count + 4
    else:
        parameters, a, inputs, after = "u64 a, u64 b, int accumulate", f"%{count}", '"l"(a)', count + 1
    return f"""
DEVICE void {name}(float (&d)[{count}], {parameters}) {{
  asm volatile(
      "{{ .reg .pred p; setp.ne.b32 p, %{after + 1}, 0; "
      "wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind} "
      "{{{sums}}}, {a}, %{after}, p, 1, 1{order}; }}"
      : {outputs} : {inputs}, "l"(b), "r"(accumulate));
}}
"""


def conv_source(columns: int, kind: str) -> str:
    """One self-contained translation unit (no includes) for a convolution computing ``columns`` channels per block.

    ``kind``: PTX type of the operands, ``bf16``, ``f16`` or ``e4m3``.
    """
    return _join("ptx.cuh", wgmma_wrapper(columns, kind), "conv.cu", "epilogue.cuh", "mainloop.cuh")


def attention_source(keys: int, kind: str) -> str:
    """The same for attention over ``keys`` keys at a time, in ``bf16`` or ``f16``."""
    scores = wgmma_wrapper(keys, kind, "wgmma_scores")
    return _join("ptx.cuh", scores, wgmma_wrapper(192, kind, "wgmma_sums", registers=True), "attention.cu")


def _join(*parts: str) -> str:
    """File names stand for their contents."""
    texts = [(_FOLDER / part).read_text() if part.endswith((".cu", ".cuh")) else part for part in parts]
    return "\n".join(texts).replace("#pragma once\n", "")
