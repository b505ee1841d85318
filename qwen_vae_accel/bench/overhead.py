"""What the plugin itself adds to a call, whatever the network costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.eager import EagerBackend
from qwen_vae_accel.backends.registry import get_backend
from qwen_vae_accel.loading import random_vae
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.plugin.entry import accelerate

_BATCH = 100


# Of a GPU's clock: about a millisecond.
_CYCLES = 1_500_000


class _Instant:
    """Stands for a network: its result was there before."""

    nbytes = 0

    def __init__(self, output: Tensor) -> None:
        self._output = output

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
        return self._output


class _Busy(_Instant):
    """Stands for a network that takes one launch of the host and a millisecond of the GPU."""

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
        torch.cuda._sleep(_CYCLES)
        return self._output


def _thread_us(call: Callable[[], object], times: int = 1) -> float:
    start = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - start) * 1e6 / times


def overhead(device: torch.device, calls: int = 300) -> dict[str, float | int]:
    """The plugin's part of one decode, in microseconds of the calling thread, which other work does not inflate.

    The VAE has the depth and the number of parameters of the published one, two channels wide.

    Returns:
        ``overhead_us``: a call in a loop with nothing in the network's place; the median over batches of calls.
        ``overhead_cold_us``: what an accelerated call takes longer than the network alone, where each turn first runs the
        network, so that what the plugin looks at has left the processor's caches: the median of ``calls`` turns.
        ``overhead_latency_us``: by how much later its output is there, by the clock. On a GPU, with a stand-in for the network
        that keeps the GPU busy for a millisecond: most of the plugin's work is done meanwhile.
    """
    vae: Any = random_vae(base_dim=2, dim_mult=[1, 1, 1, 1]).to(device)
    source = ModelSource(vae)
    z = torch.zeros(1, source.topology.z_dim, 1, 2, 2, device=device)
    network = EagerBackend().program(source, Job("decode", source.topology, torch.float32, device))
    threads = torch.get_num_threads()
    # Waking a second thread for so little work would cost more, and vary more, than what is measured.
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            output = network(z[:, :, 0])
            cold, latency = _between(vae, z, network, calls)
            if device.type == "cuda":
                busy = _Busy(output)
                with _in_place_of_eager(busy):
                    _, latency = _between(vae, z, busy, calls)
            return {
                "overhead_us": _in_a_loop(vae, z, output),
                "overhead_cold_us": cold,
                "overhead_latency_us": latency,
            }
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _in_place_of_eager(program: _Instant) -> Iterator[None]:
    backend: Any = get_backend("eager")
    backend.program = lambda source, job: program
    try:
        yield
    finally:
        del backend.program


def _in_a_loop(vae: Any, z: Tensor, output: Tensor) -> float:
    with _in_place_of_eager(_Instant(output)), accelerate(vae, backend="eager"):
        batches = [_thread_us(lambda: vae.decode(z, return_dict=False), _BATCH) for _ in range(21)]
    return statistics.median(batches[1:])


def _between(vae: Any, z: Tensor, network: Callable[[Tensor], Tensor], calls: int) -> tuple[float, float]:
    image = z[:, :, 0]
    both: list[Callable[[], object]] = [lambda: network(image), lambda: vae.decode(z, return_dict=False)]
    thread, clock = [], []
    with accelerate(vae, backend="eager"):
        for turn in range(calls + 20):
            spans, waits = [0.0, 0.0], [0.0, 0.0]
            for index in (0, 1) if turn % 2 else (1, 0):
                _wait(z.device)
                start = time.perf_counter()
                spans[index] = _thread_us(both[index])
                _wait(z.device)
                waits[index] = (time.perf_counter() - start) * 1e6
            thread.append(spans[1] - spans[0])
            clock.append(waits[1] - waits[0])
    return statistics.median(thread[20:]), statistics.median(clock[20:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
