"""Which convolutions run their first tiles beside the last ones of the convolution in front of them.

A kernel of sm90/ starts where a multiprocessor falls free while the kernel before it still runs. Usually it then waits for
all of that. Of two convolutions in a row the first may count its finished tiles instead, line of tiles by line of tiles, and
a tile of the second wait for the lines that it reads: so the last wave of tiles of a layer, which rarely fills the GPU, is
filled by the next layer. That is right for a pair (*first*, *second*) if

- *second* reads nothing that *first* writes but its own input, of which a tile waits for every row it reads, and
- what *second* writes does not overlap what *first* reads or writes; or is exactly the same matrix over the same grid. Then
  a row is overwritten by a tile that has waited for all tiles of *first* that write it or read it as a neighbour.

No more than two kernels ever overlap: a kernel lets the next one start only when the one before itself has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.memory import Memory, Slot
from qwen_vae_accel.kernels.sm90.schedules import Lines

if TYPE_CHECKING:
    from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix in the arena and the pixels it is of."""

    slot: Slot
    grid: Grid


@dataclass(slots=True, eq=False)
class Overlap:
    """What one convolution touches and, once :func:`link` has seen its neighbours, how it overlaps with them."""

    layer: Conv3x3
    input: Matrix
    others: tuple[Matrix, ...]  # it reads
    outputs: tuple[Matrix, ...]
    done: Slot | None = None  # its own counters, if the next kernel asks for them
    ready: tuple[Slot, Lines] | None = None  # the counters of the kernel before, which it asks for

    def arguments(self, memory: Memory) -> dict[str, Any]:
        """Keyword arguments of the launch that concern the overlap: the counters it fills, and those it waits for."""
        if not memory.overlapped:
            return {}
        ready = None if self.ready is None else (memory[self.ready[0]], self.ready[1])
        return {"done": memory.get(self.done), "ready": ready}


def link(steps: Sequence[Overlap | None], offsets: Sequence[int]) -> list[Slot]:
    """Decide for every two neighbours among ``steps`` (None: another kind of kernel) whether they overlap.

    ``offsets``: of every slot in the arena. Returns the counters of those that report, numbered after these.
    """
    slots: list[Slot] = []
    for first, second in zip(steps[:-1], steps[1:], strict=True):
        if first is not None and second is not None and overlaps(first, second, offsets):
            grid = first.input.grid
            lines = first.layer.lines(grid)
            slot = Slot(len(offsets) + len(slots), 1, grid.batch * lines.per_image, torch.int32)
            first.done, second.ready = slot, (slot, lines)
            slots.append(slot)
    return slots


def overlaps(first: Overlap, second: Overlap, offsets: Sequence[int]) -> bool:
    """Whether a tile of ``second`` may run once the tiles of ``first`` around it have."""
    written = {matrix.slot.index for matrix in first.outputs}
    if second.input not in first.outputs or any(matrix.slot.index in written for matrix in second.others):
        return False
    if not all(matrix.grid.pixels for matrix in second.outputs):  # too small an image, which is refused later
        return False
    if not first.layer.ends_early(first.input.grid):
        return False
    touched = (first.input, *first.others, *first.outputs)
    return all(_apart(a, b, offsets) or _same(a, b, offsets) for a in second.outputs for b in touched)


def _apart(a: Matrix, b: Matrix, offsets: Sequence[int]) -> bool:
    start, other = _start(a, offsets), _start(b, offsets)
    return start + a.slot.nbytes <= other or other + b.slot.nbytes <= start


def _start(matrix: Matrix, offsets: Sequence[int]) -> int:
    return offsets[matrix.slot.index] + matrix.slot.start


def _same(a: Matrix, b: Matrix, offsets: Sequence[int]) -> bool:
    def shape(m: Matrix) -> tuple[Any, ...]:
        return _start(m, offsets), m.slot.rows, m.slot.columns, m.slot.dtype, m.grid

    return shape(a) == shape(b)
