"""Attention and its 1x1 convolution against their references, under the interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid, from_flat
from qwen_vae_accel.kernels.triton.attention import attention, attention_reference, qkv, qkv_reference
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.tuning.tables import ATTENTION_KEY
from qwen_vae_accel.kernels.weights import Packer
from tests.kernels.cases import CONFIG, DEVICES, DTYPES, assert_close, poisoned, random_flat, random_layer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter tests; the GPU has test_gpu.py")


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv(dtype, gpu):
    grid = Grid(2, 5, 6)
    weights = Packer(random_layer("to_qkv", 1152, 384, 1), dtype, torch.device("cpu")).conv("to_qkv")
    a = random_flat(grid, 384, dtype)
    tokens = poisoned(grid.pixels, 1152, dtype=dtype)
    qkv(a, grid, weights, tokens, config=CONFIG, gpu=gpu)
    assert_close(tokens, qkv_reference(a, grid, weights), dtype)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype, gpu, splits):
    """117 tokens of two images: no tile is full at the end, and the last keys lie beside the next image's."""
    grid = Grid(2, 9, 13)
    tokens = (2 * torch.randn(grid.pixels, 1152, generator=torch.Generator().manual_seed(0))).to(dtype)
    out = poisoned(grid.rows, 384, dtype=dtype)
    partial = poisoned(splits * grid.pixels, 384, dtype=torch.float32)
    tops = poisoned(splits * grid.pixels, 1, dtype=torch.float32)
    config = AttentionConfig(block_queries=32, block_keys=16, warps=4, stages=1)
    attention(tokens, grid, out, config=config, gpu=gpu, splits=splits, partial=partial, tops=tops)
    assert_close(from_flat(out, grid), from_flat(attention_reference(tokens, grid), grid), dtype)


def test_attention_with_large_scores():
    """Scores near 1000 overflow without the running maximum."""
    grid = Grid(1, 4, 9)
    tokens = (12 * torch.randn(grid.pixels, 1152, generator=torch.Generator().manual_seed(0))).to(torch.float16)
    out = poisoned(grid.rows, 384, dtype=torch.float16)
    config = AttentionConfig(block_queries=32, block_keys=16, warps=4, stages=1)
    attention(tokens, grid, out, config=config, gpu=Gpu(2, 1 << 17, True))
    assert_close(from_flat(out, grid), from_flat(attention_reference(tokens, grid), grid), torch.float16)


def test_splits_fill_the_gpu():
    h200 = Gpu(132, 232448, True, True)
    choose = partial(Tuning().attention_splits, ATTENTION_KEY)
    assert choose(Grid(1, 128, 128), h200) == 1  # 128 tiles: one wave as it is
    assert choose(Grid(1, 64, 64), h200) > 1  # 32 tiles
    assert choose(Grid(1, 116, 208), h200) > 1  # 189 tiles: a second wave half empty
    assert choose(Grid(4, 64, 64), h200) == 1
    assert choose(Grid(1, 2, 3), h200) == 1
