"""Attention of 768 and 1152 channels against its reference, under the interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qwen_vae_accel.kernels.layout import Grid, from_flat
from qwen_vae_accel.kernels.triton import wide_attention as module
from qwen_vae_accel.kernels.triton.attention import attention_reference, qkv, qkv_reference
from qwen_vae_accel.kernels.triton.wide_attention import TILE, chunk_of, tiles_of, wide_attention
from qwen_vae_accel.kernels.weights import Packer
from tests.kernels.cases import (
    CONFIG,
    DEVICES,
    NO_TMA,
    TMA,
    assert_close,
    poisoned,
    random_flat,
    random_layer,
    run_wide_attention,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter tests; the GPU has test_gpu_21.py")


def random_tokens(grid: Grid, channels: int, dtype: torch.dtype, scale: float = 2.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return (scale * torch.randn(grid.pixels, 3 * channels, generator=draw)).to(dtype)


@pytest.mark.parametrize(
    ("channels", "dtype", "gpu"),
    [(768, torch.bfloat16, TMA), (1152, torch.float16, TMA), (768, torch.bfloat16, NO_TMA)],
)
@pytest.mark.parametrize("grid", [Grid(1, 1, 1), Grid(2, 9, 15)], ids=str)
def test_wide_attention(grid, channels, dtype, gpu):
    """135 tokens of two images: the last keys of one lie beside the first of the next. The halo keeps what it held."""
    tokens = random_tokens(grid, channels, dtype)
    out = run_wide_attention(tokens, grid, gpu)
    assert_close(from_flat(out, grid), from_flat(attention_reference(tokens, grid), grid), dtype)


@pytest.mark.parametrize("gpu", DEVICES)
def test_chunks_of_queries(gpu, monkeypatch):
    """A tile of queries at a time, of which the last is not full; each has its own weights, in the same memory."""
    grid, dtype = Grid(1, 2, 136), torch.float16
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    assert (chunk_of(grid), tiles_of(grid)) == (TILE, 3)
    tokens = random_tokens(grid, 768, dtype)
    out = run_wide_attention(tokens, grid, gpu)
    assert_close(from_flat(out, grid), from_flat(attention_reference(tokens, grid), grid), dtype)


def test_large_scores():
    """Near 1000: without a maximum they overflow; of 16 bits only what lies between 0 and 1 is stored."""
    grid = Grid(1, 3, 50)
    tokens = random_tokens(grid, 768, torch.float16, 9.0)
    out = run_wide_attention(tokens, grid, TMA)
    assert_close(from_flat(out, grid), from_flat(attention_reference(tokens, grid), grid), torch.float16)


def test_chunks_keep_the_memory_small():
    for grid in (Grid(1, 64, 64), Grid(1, 128, 128), Grid(1, 168, 96), Grid(4, 128, 128), Grid(1, 1, 1), Grid(300, 8, 8)):
        chunk, tiles = chunk_of(grid), tiles_of(grid)
        assert chunk % TILE == 0 and TILE <= chunk <= tiles * TILE
        used = 2 * grid.batch * chunk * tiles * TILE
        assert used <= module._CHUNK_BYTES or chunk == TILE
    assert chunk_of(Grid(1, 64, 64)) == 64 * 64  # 1024x1024: all at once


def test_it_is_refused_where_something_does_not_fit():
    grid = Grid(1, 2, 3)
    tokens, out = random_tokens(grid, 768, torch.float16), poisoned(grid.rows, 768, dtype=torch.float16)
    rows, tiles = grid.batch * chunk_of(grid), tiles_of(grid)
    given = {
        "weights": poisoned(rows, tiles * TILE, dtype=torch.float16),
        "tops": poisoned(rows, tiles, dtype=torch.float32),
        "sums": poisoned(rows, tiles, dtype=torch.float32),
    }
    for name, matrix in given.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            wide_attention(tokens, grid, out, gpu=TMA, **given | {name: matrix[:-1]})
    with pytest.raises(ValueError, match="tokens: expected"):
        wide_attention(tokens[:-1], grid, out, gpu=TMA, **given)


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("channels", [768, 1152])
def test_qkv_of_many_channels(channels, gpu):
    grid, dtype = Grid(2, 2, 3), torch.float16
    weights = Packer(random_layer("to_qkv", 3 * channels, channels, 1), dtype, torch.device("cpu")).conv("to_qkv")
    a, tokens = random_flat(grid, channels, dtype), poisoned(grid.pixels, 3 * channels, dtype=dtype)
    qkv(a, grid, weights, tokens, config=dataclasses.replace(CONFIG, block_k=64), gpu=gpu)
    assert_close(tokens, qkv_reference(a, grid, weights), dtype)
