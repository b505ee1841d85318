"""A network for one input shape, as a list of kernel launches over one scratch allocation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.memory import Memory, Slot, aligned
from qwen_vae_accel.kernels.tuning.keys import KernelKey


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel launch.

    Attributes:
        kernel: such as ``"conv3x3 96->96 residual x norm"``.
        shape: pixels that it writes, such as ``"1x1024x1024"``.
        flops: operations of the layer, without the halo's.
        launch: makes it, given a :class:`Memory` or a :class:`Traffic`.
        key: what it is tuned by; None where there is nothing to choose.
        tiled: the pixels that its tiles divide, if it has a key.
    """

    kernel: str
    shape: str
    flops: int
    launch: Callable[[Any], None]
    key: KernelKey | None = None
    tiled: Grid | None = None


@dataclass(frozen=True, slots=True)
class LaunchList:
    """The launches of a network for one input shape, in their order, and where their matrices lie in the scratch memory.

    Attributes:
        offsets: of every slot, in bytes.
        scratch_bytes: of the one allocation that a call makes.
        output_shape: ``[B, C, H, W]``.
        counters: of finished tiles (overlap.py), which must be zero when a run begins; None where nothing is counted.
        exchanged: bytes of every exchange with the other processes of an image (share.py).
    """

    steps: tuple[Step, ...]
    offsets: tuple[int, ...]
    scratch_bytes: int
    output_shape: tuple[int, ...]
    counters: Slot | None = None
    exchanged: tuple[int, ...] = ()

    def counting(self, slots: Sequence[Slot]) -> LaunchList:
        """Return the same list with counters, numbered after all other slots and in a row at the end of the scratch memory."""
        if not slots:
            return self
        ends = tuple(itertools.accumulate((slot.nbytes for slot in slots), initial=self.scratch_bytes))
        counters = Slot(len(self.offsets) + len(slots), 1, (ends[-1] - ends[0]) // slots[0].dtype.itemsize, slots[0].dtype)
        offsets = (*self.offsets, *ends[:-1], ends[0])
        return replace(self, offsets=offsets, scratch_bytes=aligned(ends[-1]), counters=counters)

    @property
    def flops(self) -> int:
        """Operations of all launches."""
        return sum(step.flops for step in self.steps)

    def memory(self, image: Tensor, scratch: Tensor | None = None) -> Memory:
        """Allocate the output and, unless it is given, the scratch memory of one call, on the current stream."""
        if scratch is None:
            scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=image.device)
        return Memory(scratch, self.offsets, image, image.new_empty(self.output_shape))

    def run(self, memory: Memory, *, overlapped: bool = True) -> None:
        """Make all launches on the current stream; with ``overlapped=False`` each waits for the one before, to compare."""
        if self.counters is not None and overlapped:
            memory[self.counters].zero_()
            memory = replace(memory, overlapped=True)
        for step in self.steps:
            step.launch(memory)


class Traffic:
    """A stand-in for a :class:`Memory` that counts the bytes of what a launch asks for, each matrix as often as it does.

    Matrices, input and output; not weights, which are small beside them and stay in the cache.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.overlapped = False
        self.nbytes = 0

    def __getitem__(self, slot: Slot | None) -> Tensor:
        return self._count(self._memory[slot])

    def get(self, slot: Slot | None) -> Tensor | None:
        """Count and return the matrix, or None of None."""
        return None if slot is None else self[slot]

    @property
    def image(self) -> Tensor:
        """Count and return the input."""
        return self._count(self._memory.image)

    @property
    def output(self) -> Tensor:
        """Count and return the output."""
        return self._count(self._memory.output)

    def _count(self, tensor: Tensor) -> Tensor:
        self.nbytes += tensor.nbytes
        return tensor
