"""Bands of rows: which rows they take, and that their result is that of one piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder, bands
from qwen_vae_accel.kernels.bands import Bands, decoder_rows, encoder_rows, rows_of_levels
from tests.kernels.cases import SMALL_TUNING, TMA, image_state, random_vae
from tests.kernels.test_network import NARROW_21, StandInLayers, describe, interpreted, random_state

# ---- rows, against networks of one column and one channel -------------------------------------------------------------


def blurred(x: torch.Tensor, times: int) -> torch.Tensor:
    """3-row convolutions with zeros around."""
    for _ in range(times):
        x = F.conv1d(x[None, None], torch.ones(1, 1, 3, dtype=x.dtype), padding=1)[0, 0]
    return x


def decoded(x: torch.Tensor, level: int, blocks: list[int]) -> torch.Tensor:
    """Everything behind the blocks of ``level``, whose rows are ``x``."""
    for count in blocks[level + 1 :]:
        x = blurred(blurred(x.repeat_interleave(2), 1), 2 * count)
    return blurred(x, 1)


def encoded(x: torch.Tensor, level: int, blocks: list[int]) -> torch.Tensor:
    """Everything up to the downsampling of ``level``."""
    x = blurred(x, 1)
    for count in blocks[: level + 1]:
        x = blurred(x, 2 * count)
        x = F.conv1d(F.pad(x, (0, 1))[None, None], torch.ones(1, 1, 3, dtype=x.dtype), stride=2)[0, 0]
    return x


def reached(network, height: int, level: int, blocks: list[int]) -> list[set[int]]:
    """By row of the input: the rows of the output that turn NaN with it."""
    found = []
    for row in range(height):
        x = torch.zeros(height)
        x[row] = torch.nan
        found.append(set(network(x, level, blocks).isnan().nonzero().flatten().tolist()))
    return found


@pytest.mark.parametrize("blocks", [[3, 3, 3, 3], [1, 2, 3], [2, 2, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("height", [2, 5, 9])
def test_a_band_of_a_decoder_takes_the_rows_that_it_sees_and_hardly_more(height, blocks):
    heights = rows_of_levels(height, len(blocks), decodes=True)
    for level in range(len(blocks) - 1):
        reach = [reached(decoded, heights[index], index, blocks) for index in range(level, len(blocks) - 1)]
        for count in (2, 3, 4, 7):
            for rows in Bands(level, count).of(range(heights[-1])):
                taken = decoder_rows(rows, level, heights, blocks)
                assert len(taken) == len(reach)
                for part, by_row in zip(taken, reach, strict=True):
                    seen = {row for row, outputs in enumerate(by_row) if not outputs.isdisjoint(rows)}
                    assert seen <= set(part) and len(part) <= len(seen) + 2, (level, rows)


@pytest.mark.parametrize("blocks", [[2, 2, 2, 2], [1, 2, 3], [2, 2, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("height", [32, 40, 47, 61])
def test_a_band_of_an_encoder_takes_the_rows_that_it_sees_and_begins_where_all_halvings_agree(height, blocks):
    heights = rows_of_levels(height, len(blocks), decodes=False)
    for level in range(len(blocks) - 1):
        by_row = reached(encoded, height, level, blocks)
        step = 2 ** (level + 1)
        for count in (2, 3, 4):
            for rows in Bands(level, count).of(range(heights[level + 1])):
                taken = encoder_rows(rows, level, heights, blocks)
                seen = {row for row, outputs in enumerate(by_row) if not outputs.isdisjoint(rows)}
                assert seen <= set(taken) and taken.start % step == 0 and (taken.stop % step == 0 or taken.stop == height)
                assert len(taken) <= len(seen) + 2 * step, (level, rows)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("rows", [1, 5, 64, 1040])
def test_bands_are_all_rows_once(count, rows):
    parts = list(Bands(0, count).of(range(rows)))
    assert [row for part in parts for row in part] == list(range(rows)) and all(parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ---- the same numbers, on the CPU ---------------------------------------------------------------------------------------

DIVISIONS = [Bands(0, 2), Bands(1, 3), Bands(2, 4)]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products summed in float64: libraries for CPUs sum a row in another order where it lies elsewhere, kernels do not."""
    conv2d, dot = F.conv2d, interpreter.InterpreterBuilder.create_dot

    def double_conv2d(x, weight, bias=None, *rest, **named):
        return conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *rest, **named).to(x.dtype)

    def double_dot(self, a, b, d, precision, max_imprecise):
        if a.dtype != tl.float16:
            return dot(self, a, b, d, precision, max_imprecise)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(product.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(F, "conv2d", double_conv2d)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", double_dot)


def run_poisoned(network, image: torch.Tensor, part: Bands | None) -> torch.Tensor:
    """Scratch full of NaN: a row that nobody writes shows in the result."""
    launches = network._as_configured(tuple(image.shape), part, False).launches
    memory = launches.memory(image, torch.full((launches.scratch_bytes,), 255, dtype=torch.uint8))
    memory.output.fill_(float("nan"))
    launches.run(memory)
    return memory.output


def small(method: str) -> FusedDecoder | FusedEncoder:
    """Qwen-Image's network; its convolutions are the references of those of sm90/."""
    config = FusedConfig(tuning=SMALL_TUNING, gpu=TMA)
    cls, part = (FusedDecoder, "decoder") if method == "decode" else (FusedEncoder, "encoder")
    network = cls(image_state(random_vae(), part), dtype=torch.float16, device=torch.device("cpu"), config=config)
    network._sm90 = StandInLayers(torch.device("cpu"), SMALL_TUNING, every=True)
    return network


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()


@interpreted
@pytest.mark.slow
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("method", "shape"), [("decode", (2, 16, 3, 2)), ("encode", (2, 3, 43, 9))])
def test_bands_give_the_bits_of_one_piece(method, shape, monkeypatch):
    """A batch, odd sizes, bands at every level; the last by a limit."""
    network, image = small(method), draw(*shape)
    whole = run_poisoned(network, image, None)
    assert whole.isfinite().all()
    for part in DIVISIONS[:2]:
        assert torch.equal(run_poisoned(network, image, part), whole), part
    monkeypatch.setattr(bands, "_FEWEST_ROWS", 4)
    network.limit_memory(network._as_configured(shape, DIVISIONS[2], False).launches.scratch_bytes)
    assert network.plan(shape).fits and network.plan(shape).bands > 1
    assert torch.equal(network(image), whole)


@interpreted
@pytest.mark.slow
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("method", "shape"), [("decode", (2, 64, 2, 3)), ("encode", (1, 4, 32, 16))])
def test_bands_give_the_bits_of_one_piece_around_shortcuts(method, shape, monkeypatch):
    """Qwen-Image 2.1, whose levels are copied and averaged around, in bands too."""
    described = describe(NARROW_21, method)
    monkeypatch.setattr("qwen_vae_accel.kernels.fused.network_of", lambda state: described)
    monkeypatch.setattr("qwen_vae_accel.kernels.fused.state_reasons", lambda state, sm90: [])
    network = (FusedDecoder if method == "decode" else FusedEncoder)(
        random_state(described),
        dtype=torch.float16,
        device=torch.device("cpu"),
        config=FusedConfig(tuning=SMALL_TUNING, gpu=TMA),
    )
    network._sm90 = StandInLayers(torch.device("cpu"), SMALL_TUNING, every=True)
    image = draw(*shape)
    whole = run_poisoned(network, image, None)
    assert whole.isfinite().all()
    for part in (Bands(0, 2), Bands(2, 2)):
        assert torch.equal(run_poisoned(network, image, part), whole), part
