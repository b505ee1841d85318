"""Attention for compute capability 9.0: the same function as ``attention.attention``, with warps given roles.

One program handles 128 queries, which stay in shared memory (96 kB). A producer warp streams keys and values, 32 at a
time, through a ring; two consumer warpgroups of 64 queries hold their 64 x 384 result in registers. The second one
starts half a step late, so that one multiplies while the other does its softmax. 64 keys at a time would load the
tensor cores better but need more registers than a thread has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qwen_vae_accel.kernels.compiling import Kernel
from qwen_vae_accel.kernels.layout import Grid

QUERIES = 128
KEYS = gl.constexpr(32)
CHUNK = gl.constexpr(128)  # columns of one bulk copy
PARTS = gl.constexpr(3)  # chunks of the head dim
SLOTS = gl.constexpr(5)  # of the ring; one holds KEYS keys or values


@gluon.jit
def _produce(tokens, query_tokens, queries, ring, barriers, first, key_begin, key_end):
    query_bar, full, empty, late = barriers
    mbarrier.expect(query_bar, 2 * PARTS * 64 * CHUNK * 2)
    for wg in gl.static_range(2):
        for c in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(
                query_tokens, [first + wg * 64, c * CHUNK], query_bar, queries.index(wg * PARTS + c)
            )
    i = 0
    for n in range(key_begin, key_end, KEYS):
        for kind in gl.static_range(2):  # keys, then values
            slot = i % SLOTS
            mbarrier.wait(empty.index(slot), (i // SLOTS) & 1 ^ 1)
            mbarrier.expect(full.index(slot), PARTS * KEYS * CHUNK * 2)
            for c in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    tokens, [n, ((kind + 1) * PARTS + c) * CHUNK], full.index(slot), ring.index(slot * PARTS + c)
                )
            i += 1


@gluon.jit
def _weigh(s, top, total, acc0, acc1, acc2, scale, end, n, p_layout: gl.constexpr, dtype: gl.constexpr):
    """One step of the online softmax: probabilities as an MMA operand, and everything so far rescaled."""
    inside = n + gl.arange(0, KEYS, gl.SliceLayout(0, s.type.layout)) < end
    s = gl.where(inside[None, :], s, -float("inf"))
    new_top = gl.maximum(top, gl.max(s, 1))
    shift = new_top * scale
    p = gl.exp2(s * scale - shift[:, None])
    shrink = gl.exp2(top * scale - shift)
    total = total * shrink + gl.sum(p, 1)
    p = gl.convert_layout(p.to(dtype), p_layout)
    factor = gl.convert_layout(shrink, gl.SliceLayout(1, acc0.type.layout))[:, None]
    return p, new_top, total, acc0 * factor, acc1 * factor, acc2 * factor


@gluon.jit
def _consume(
    queries, ring, barriers, out, partial, tops, scale, first, count, base, key_begin, key_end, width, row_base,
    split_row, wg: gl.constexpr, C: gl.constexpr, SPLIT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    query_bar, full, empty, late = barriers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, CHUNK, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)

    acc0 = gl.zeros([64, CHUNK], gl.float32, o_layout)
    acc1 = gl.zeros([64, CHUNK], gl.float32, o_layout)
    acc2 = gl.zeros([64, CHUNK], gl.float32, o_layout)
    top = gl.full([64], -float("inf"), gl.float32, row)
    total = gl.zeros([64], gl.float32, row)
    end = base + count
    mbarrier.wait(query_bar, 0)
    if wg == 1:
        mbarrier.wait(late, 0)

    i = 0
    for n in range(key_begin, key_end, KEYS):
        slot = i % SLOTS
        mbarrier.wait(full.index(slot), (i // SLOTS) & 1)
        s = gl.zeros([64, KEYS], gl.float32, s_layout)
        for c in gl.static_range(PARTS):
            keys = ring.index(slot * PARTS + c).permute((1, 0))
            s = warpgroup_mma(queries.index(wg * PARTS + c), keys, s, use_acc=c > 0, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()  # the arrival below speaks for all four warps
        mbarrier.arrive(empty.index(slot), count=1)
        if wg == 0:
            mbarrier.arrive(late, count=1, pred=n == key_begin)

        p, top, total, acc0, acc1, acc2 = _weigh(s, top, total, acc0, acc1, acc2, scale, end, n, p_layout, dtype)

        slot = (i + 1) % SLOTS
        mbarrier.wait(full.index(slot), ((i + 1) // SLOTS) & 1)
        acc0 = warpgroup_mma(p, ring.index(slot * PARTS), acc0, is_async=True)
        acc1 = warpgroup_mma(p, ring.index(slot * PARTS + 1), acc1, is_async=True)
        acc2 = warpgroup_mma(p, ring.index(slot * PARTS + 2), acc2, is_async=True)
        acc0, acc1, acc2, p = warpgroup_mma_wait(0, deps=[acc0, acc1, acc2, p])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        i += 2

    token = first - base + wg * 64 + gl.arange(0, 64, o_row)
    if SPLIT:
        to = (split_row + token).to(gl.int64)[:, None] * C
        target = partial
    else:
        to = (row_base + token // width * (width + 1) + token % width).to(gl.int64)[:, None] * C
        target = out
    to += gl.arange(0, CHUNK, gl.SliceLayout(0, o_layout))[None, :]
    mask = (token < count)[:, None]
    inverse = (1.0 / gl.convert_layout(total, o_row))[:, None]
    gl.store(target + to, (acc0 * inverse).to(target.dtype.element_ty), mask=mask)
    gl.store(target + to + CHUNK, (acc1 * inverse).to(target.dtype.element_ty), mask=mask)
    gl.store(target + to + 2 * CHUNK, (acc2 * inverse).to(target.dtype.element_ty), mask=mask)
    if SPLIT:
        token = first - base + wg * 64 + gl.arange(0, 64, row)
        gl.store(tops + split_row + token, top * scale + gl.log2(total), mask=token < count)


@Kernel
@gluon.jit(do_not_specialize=["count", "width", "all_tokens", "splits", "scale"])
def _hopper_attention_kernel(
    tokens,  # [B * T, 3 * C], blocks of [KEYS, CHUNK]
    query_tokens,  # the same, blocks of [64, CHUNK]
    out,  # [rows, C]
    partial,  # [splits * B * T, C] fp32
    tops,  # [splits * B * T] fp32, log2 of the softmax denominators
    count, width, all_tokens, splits, scale, C: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    split = gl.program_id(1)
    b = gl.program_id(2)
    base = b * count
    first = base + gl.program_id(0) * 128
    blocks = (count + KEYS - 1) // KEYS
    key_begin = base + blocks * split // splits * KEYS
    key_end = base + blocks * (split + 1) // splits * KEYS
    row_base = (b * (count // width + 1) + 1) * (width + 1) + 1  # of this image's first pixel
    split_row = split * all_tokens + base

    dtype: gl.constexpr = tokens.dtype
    queries = gl.allocate_shared_memory(dtype, [2 * PARTS, 64, CHUNK], query_tokens.layout)
    ring = gl.allocate_shared_memory(dtype, [SLOTS * PARTS, KEYS, CHUNK], tokens.layout)
    query_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    late = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query_bar, count=1)
    mbarrier.init(late, count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    barriers = (query_bar, full, empty, late)
    gl.warp_specialize(
        [
            (_consume, (queries, ring, barriers, out, partial, tops, scale, first, count, base, key_begin, key_end,
                        width, row_base, split_row, gl.constexpr(0), C, SPLIT, dtype)),
            (_consume, (queries, ring, barriers, out, partial, tops, scale, first, count, base, key_begin, key_end,
                        width, row_base, split_row, gl.constexpr(1), C, SPLIT, dtype)),
            (_produce, (tokens, query_tokens, queries, ring, barriers, first, key_begin, key_end)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def attention_hopper(tokens: Tensor, grid: Grid, out: Tensor, partial: Tensor | None, tops: Tensor | None, splits: int) -> None:
    """See ``attention.attention``, which checks the arguments. Head dim 384 only."""
    name = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[tokens.dtype]
    count, channels = grid.height * grid.width, tokens.shape[1] // 3
    blocks = [
        TensorDescriptor.from_tensor(tokens, [rows, CHUNK.value],
                                     gl.NVMMASharedLayout.get_default_for([rows, CHUNK.value], name))
        for rows in (KEYS.value, 64)
    ]  # fmt: skip
    _hopper_attention_kernel[(-(-count // QUERIES), splits, grid.batch)](
        *blocks, out, out if partial is None else partial, out if tops is None else tops,
        count, grid.width, grid.pixels, splits,
        channels**-0.5 * math.log2(math.e), C=channels, SPLIT=splits > 1, num_warps=4,
    )  # fmt: skip
