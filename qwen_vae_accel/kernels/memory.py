"""Where the matrices between kernels lie in one scratch allocation.

That is decided before anything runs: a matrix lives from ``take`` to ``give``, and ``Arena.place`` gives matrices
whose lives overlap disjoint offsets, largest first. Where it fits under those placed so far, a matrix does not lie across
one that the step before read, so that kernels may overlap (overlap.py). The peak is the size of the one allocation a call
makes, so calls on different streams never share scratch unless they share the allocation (graphs.py, which orders them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGNMENT = 256


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to a multiple of ``ALIGNMENT``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Slot:
    """A matrix ``[rows, columns]`` in the arena, the ``index``-th that was taken, or rows of it from ``first`` on."""

    index: int
    rows: int
    columns: int
    dtype: torch.dtype
    first: int = 0

    def part(self, first: int, rows: int) -> Slot:
        """View ``rows`` rows from ``first`` on; only the whole is given back."""
        return Slot(self.index, rows, self.columns, self.dtype, self.first + first)

    @property
    def start(self) -> int:
        """Bytes of the whole in front of it."""
        return self.first * self.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.rows * self.columns * self.dtype.itemsize


@dataclass(slots=True)
class Arena:
    """The matrices of one list of launches and when they live, counted in events."""

    slots: list[Slot] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)  # of each slot: its first event,
    ends: list[float] = field(default_factory=list)  # its last,
    before: list[int] = field(default_factory=list)  # and one such that the step before may read what was given after it
    events: int = 0
    step_before: int = 0

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Slot:
        """Take a matrix that the next step may write."""
        slot = Slot(len(self.slots), rows, columns, dtype)
        self.slots.append(slot)
        self.begins.append(self.events)
        self.ends.append(math.inf)
        self.before.append(self.step_before)
        self.events += 1
        return slot

    def step(self) -> None:
        """Say that a step has been listed."""
        self.step_before = self.events - 1

    def give(self, *slots: Slot | None) -> None:
        """Say that no step after those listed so far reads these."""
        for slot in slots:
            if slot is not None:
                self.ends[slot.index] = self.events
        self.events += 1

    def place(self) -> tuple[tuple[int, ...], int]:
        """Find a place for every slot: byte offsets by slot index, and the bytes needed in all."""
        beside, nearly_beside = self._together(self.begins), self._together(self.before)
        offsets: dict[int, int] = {}
        total = 0
        for slot in sorted(self.slots, key=lambda s: (-s.nbytes, s.index)):
            size = aligned(slot.nbytes)
            offset = _gap(self._taken(offsets, beside[slot.index]), size)
            nearly = self._taken(offsets, nearly_beside[slot.index])
            if any(low < offset + size and offset < high and (low, high) != (offset, offset + size) for low, high in nearly):
                elsewhere = _gap(nearly, size)
                if elsewhere + size <= total:
                    offset = elsewhere
            offsets[slot.index] = offset
            total = max(total, offset + size)
        return tuple(offsets[i] for i in range(len(self.slots))), total

    def _together(self, begins: Sequence[int]) -> list[list[int]]:
        """For every slot the others that live at some time of its life, if lives begin at ``begins``, which ascend."""
        found: list[list[int]] = [[] for _ in self.slots]
        alive: list[int] = []
        for index, begin in enumerate(begins):
            alive = [other for other in alive if begin < self.ends[other]]
            for other in alive:
                found[index].append(other)
                found[other].append(index)
            alive.append(index)
        return found

    def _taken(self, offsets: dict[int, int], beside: Sequence[int]) -> list[tuple[int, int]]:
        """Where those of the slots ``beside`` lie that have a place."""
        return sorted((offsets[i], offsets[i] + aligned(self.slots[i].nbytes)) for i in beside if i in offsets)


def _gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The lowest offset at which ``size`` bytes are free, between sorted ranges that may overlap."""
    offset = 0
    for low, high in taken:
        if offset + size <= low:
            break
        offset = max(offset, high)
    return offset


@dataclass(frozen=True, slots=True)
class Memory:
    """What a launch reads and writes: the call's scratch, input and output."""

    scratch: Tensor  # uint8
    offsets: tuple[int, ...]
    image: Tensor
    output: Tensor
    overlapped: bool = False  # launched in order after zeroing the counters (overlap.py); else every kernel waits for the last
    _views: dict[Slot | torch.dtype, Tensor] = field(default_factory=dict)  # made once per call: launches share them

    def get(self, slot: Slot | None) -> Tensor | None:
        """The matrix, or None of None."""
        return None if slot is None else self[slot]

    def __getitem__(self, slot: Slot | None) -> Tensor:
        if slot is None:
            raise ValueError("a launch reads a matrix that nothing wrote")
        view = self._views.get(slot)
        if view is None:
            base = self._views.get(slot.dtype)
            if base is None:
                base = self._views[slot.dtype] = self.scratch.view(slot.dtype)
            start = (self.offsets[slot.index] + slot.start) // slot.dtype.itemsize
            view = self._views[slot] = base.as_strided((slot.rows, slot.columns), (slot.columns, 1), start)
        return view
