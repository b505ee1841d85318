"""Measure the kernels' configurations on this GPU and keep the fastest.

Kernels are timed where they run: a network's list of launches says which kernels run at which sizes, and what each is tuned
by (``launches.Step``). In round i every kernel has its i-th candidate. All candidates compile first, in parallel.
"""

from __future__ import annotations

import collections
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen_vae_accel.errors import TuningError
from qwen_vae_accel.kernels import compiling
from qwen_vae_accel.kernels.float8 import calibrated_layers, input_scales
from qwen_vae_accel.kernels.fused import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.gpu import Gpu, describe_gpu
from qwen_vae_accel.kernels.launches import LaunchList, Step
from qwen_vae_accel.kernels.memory import Memory
from qwen_vae_accel.kernels.network import QWEN_IMAGE, Network, describe
from qwen_vae_accel.kernels.reasons import FLOAT8_CAPABILITY, network_reasons
from qwen_vae_accel.kernels.timing import first_ms, launch_ms
from qwen_vae_accel.kernels.tuning.candidates import candidates
from qwen_vae_accel.kernels.tuning.choice import WORTH, Problem, Times, choose
from qwen_vae_accel.kernels.tuning.configs import Config
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.tuning.stored import Measured
from qwen_vae_accel.model.topology import Topology

logger = logging.getLogger(__name__)

FusedNetwork = FusedDecoder | FusedEncoder
Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all

_HOPELESS = 3.0  # times the fastest so far; then one launch is enough
_LARGEST_DIFFERENCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative L2 of random weights, in another order of sums
_FLOAT8_DIFFERENCE = 2e-1


@dataclass(frozen=True, slots=True)
class Trial:
    """One launch of one kernel, as ``tuning`` has it."""

    key: KernelKey
    tuning: Tuning
    problem: Problem
    step: Step
    memory: Memory

    def launch(self) -> None:
        """Launch the kernel on the current stream."""
        self.step.launch(self.memory)


class Clock:
    """Times trials on the GPU."""

    def prepare(self, launches: LaunchList, memory: Memory) -> None:
        """Run a whole network, so that its memory holds numbers such as it meets in use."""
        launches.run(memory)

    def __call__(self, trial: Trial, fastest: float = math.inf) -> float:
        """Milliseconds of a trial; infinity for one that cannot run, or is much slower than ``fastest``.

        What needs more than the GPU has fails before it runs; what spills its registers is given up after two launches.
        """
        try:
            once = first_ms(trial.launch)
            if once > _HOPELESS * fastest + 1.0:  # a single launch shows the host's part, too
                return math.inf
            return launch_ms(trial.launch)
        except Exception as error:
            torch.cuda.synchronize()  # raises where the GPU itself failed, which nothing here may hide
            logger.info("%s: %s cannot run: %s", trial.key, trial.tuning.measured.get(trial.key), error)
            return math.inf


def random_networks(dtype: torch.dtype, device: torch.device, topology: Topology = QWEN_IMAGE) -> list[FusedNetwork]:
    """Decoder, encoder and, where the GPU has it, float8 decoder of a published VAE, with random weights.

    They are made without sm90/ where Triton has all of their kernels, so that weights stay on the GPU, where packing takes
    least.

    Raises:
        ValueError: there are no kernels for them here.
    """

    def state(network: Network) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
        return {
            name: 1 + 0.1 * draw(shape) if name.endswith("gamma") else draw(shape) * math.prod(shape[1:]) ** -0.5
            for name, shape in network.parameters().items()
        }

    decoding, encoding = describe(topology, "decode"), describe(topology, "encode")
    only_sm90 = any(network_reasons(network, sm90=False) for network in (decoding, encoding))
    config = FusedConfig(graphs=0, tuning=Tuning(sm90=only_sm90))
    decoder = state(decoding)
    networks: list[FusedNetwork] = [
        FusedDecoder(decoder, dtype=dtype, device=device, config=config),
        FusedEncoder(state(encoding), dtype=dtype, device=device, config=config),
    ]
    if torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY:
        scales = input_scales(decoder, dict.fromkeys(calibrated_layers(decoding).values(), 16.0))
        networks.append(FusedDecoder(decoder, dtype=dtype, device=device, config=config, float8=scales))
    return networks


def input_shape(network: FusedNetwork, height: int, width: int) -> tuple[int, int, int, int]:
    """The shape ``[1, C, H, W]`` of a network's input for one image of ``height`` x ``width`` pixels."""
    return 1, network.description.in_channels, *network.description.input_size(height, width)


class Tuner:
    """Tunes the kernels that ``networks`` launch for images of ``sizes``.

    Args:
        networks: of one device and dtype (:func:`random_networks`).
        sizes: heights and widths in pixels.
        gpu: what to know of the GPU.
        base: what the choices are compared with.
        only: leaves out kernels for whose key it is false.
        clock: times trials.
        progress: told of every step.
    """

    def __init__(
        self, networks: Sequence[FusedNetwork], sizes: Sequence[tuple[int, int]], gpu: Gpu, *, base: Tuning | None = None,
        only: Callable[[KernelKey], bool] = lambda key: True, clock: Clock | None = None, progress: Progress = lambda *_: None,
    ) -> None:  # fmt: skip
        self._inputs = [(network, input_shape(network, *size)) for network in networks for size in sizes]
        self._gpu, self._base, self._clock, self._progress = gpu, base or Tuning(), clock or Clock(), progress
        self._only = only
        keys = {trial.key for trial in self._trials(self._base, "meta")}
        self.candidates = {key: candidates(key, gpu) for key in sorted(keys, key=str)}
        self._failed: set[tuple[KernelKey, Config]] = set()

    def _trials(self, tuning: Tuning, where: torch.device | str | None = None, *, prepare: bool = False) -> Iterator[Trial]:
        """Every problem once, as ``tuning`` has it."""
        seen: set[tuple[KernelKey, Problem]] = set()
        for network, shape in self._inputs:
            launches = network.tuned_launches(shape, tuning)
            device = network.device if where is None else where
            memory = launches.memory(torch.randn(shape, device=device).to(network.dtype))
            if prepare:
                self._clock.prepare(launches, memory)
            for step in launches.steps:
                if step.key is None or step.tiled is None or not self._only(step.key):
                    continue
                problem = Problem(step.kernel, step.shape, step.tiled)
                if (step.key, problem) not in seen:
                    seen.add((step.key, problem))
                    yield Trial(step.key, tuning, problem, step, memory)

    def _rounds(self) -> Iterator[tuple[Tuning, dict[KernelKey, Config]]]:
        for index in range(max(map(len, self.candidates.values()), default=0)):
            configs = {key: found[index] for key, found in self.candidates.items() if index < len(found)}
            yield self._base.with_measured({key: (config,) for key, config in configs.items()}), configs

    def compile(self, device: torch.device) -> None:
        """Compile every candidate, in parallel; those that do not compile are not measured."""
        tasks: compiling.Tasks = {}
        users: dict[object, set[tuple[KernelKey, Config]]] = {}
        for tuning, configs in self._rounds():
            for trial in self._trials(tuning, "meta"):
                if trial.key not in configs:
                    continue
                user = (trial.key, configs[trial.key])
                try:
                    with compiling.collecting() as found:
                        trial.launch()
                except ValueError as error:
                    logger.info("%s: %s is refused: %s", *user, error)
                    self._failed.add(user)
                    continue
                for name, task in found.items():
                    tasks[name] = task
                    users.setdefault(name, set()).add(user)

        def attempt(name: object, task: Callable[[], object]) -> None:
            try:
                task()
            except Exception as error:  # a compiler may fail in any way
                logger.info("does not compile: %s: %s", users[name], error)
                self._failed |= users[name]

        attempts: compiling.Tasks = {name: partial(attempt, name, task) for name, task in tasks.items()}
        for network, shape in self._inputs:  # and what the networks run beside
            launches = network.tuned_launches(shape, self._base)
            with compiling.collecting() as beside:
                launches.run(launches.memory(torch.empty(shape, dtype=network.dtype, device="meta")))
            attempts = {**beside, **attempts}
        compiling.run(attempts, device, lambda done, total: self._progress("compile candidates", done, total))

    def measure(self) -> dict[KernelKey, Times]:
        """Time every candidate in every problem, in milliseconds."""
        times: dict[KernelKey, Times] = {key: {config: {} for config in found} for key, found in self.candidates.items()}
        fastest: dict[tuple[KernelKey, Problem], float] = {}
        total = sum(map(len, self.candidates.values()))
        done = 0
        collections.deque(self._trials(self._base, prepare=True), maxlen=0)  # a warm GPU, and numbers in its memory
        for tuning, configs in self._rounds():
            for trial in self._trials(tuning):
                place, config = (trial.key, trial.problem), configs.get(trial.key)
                if config is None or (trial.key, config) in self._failed:
                    continue
                spent = self._clock(trial, fastest.get(place, math.inf))
                times[trial.key][config][trial.problem] = spent
                fastest[place] = min(spent, fastest.get(place, math.inf))
                if spent == math.inf:
                    self._failed.add((trial.key, config))
            done += len(configs)
            self._progress("measure candidates", done, total)
        return times

    def compare(self, choices: Mapping[KernelKey, tuple[Config, ...]], rounds: int = 2) -> list[Measured]:
        """Time the choices against ``base``, in turns; those that are not faster are dropped."""
        tunings = (self._base, self._base.with_measured(choices))
        best: list[dict[tuple[KernelKey, Problem], float]] = [{}, {}]
        for index in range(rounds):
            for which, tuning in enumerate(tunings):
                for trial in self._trials(tuning, prepare=True):
                    place = (trial.key, trial.problem)
                    spent = self._clock(trial)
                    best[which][place] = min(spent, best[which].get(place, math.inf))
                self._progress("compare with the shipped ones", 2 * index + which + 1, 2 * rounds)
        result = []
        for key in self.candidates:
            shipped, chosen = (sum(spent for (k, _), spent in found.items() if k == key) for found in best)
            faster = key in choices and chosen < WORTH * shipped
            result.append(Measured(key, choices[key] if faster else (), chosen if faster else shipped, shipped))
        return result

    def run(self) -> list[Measured]:
        """Measure, choose and compare."""
        choices = {key: choose(key, times, self._gpu) for key, times in self.measure().items()}
        return self.compare({key: found for key, found in choices.items() if found})

    def check(self, measured: Sequence[Measured]) -> None:
        """Check that the networks still compute the same, up to the order of sums.

        Raises:
            TuningError: they do not.
        """
        tuning = self._base.with_measured({kernel.key: kernel.choices for kernel in measured if kernel.choices})
        for network, shape in self._inputs:
            image = torch.randn(shape, device=network.device).to(network.dtype)
            outputs = []
            for which in (self._base, tuning):
                launches = network.tuned_launches(shape, which)
                memory = launches.memory(image)
                launches.run(memory)
                outputs.append(memory.output.float())
            difference = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
            limit = _FLOAT8_DIFFERENCE if network.float8 else _LARGEST_DIFFERENCE[network.dtype]
            if not difference <= limit:
                raise TuningError(
                    f"{type(network).__name__} at {list(shape)}: with the configurations chosen the result differs by "
                    f"{difference:.1e} (relative L2; allowed {limit:.0e}): nothing was stored"
                )


def tune(
    dtype: torch.dtype, device: torch.device, sizes: Sequence[tuple[int, int]], topology: Topology = QWEN_IMAGE,
    progress: Progress = lambda *_: None,
) -> list[Measured]:  # fmt: skip
    """Tune every kernel of a published VAE on ``device``: about a minute on an H200 with 32 cores, at three sizes.

    Most of it is compiling. Where all convolutions are Triton's there is more to compile.

    Args:
        dtype: bfloat16 or float16; the choices serve both, and float8 beside them.
        device: a CUDA device.
        sizes: heights and widths of images in pixels.
        topology: of the VAE, ``QWEN_IMAGE`` or ``QWEN_IMAGE_21`` of ``kernels.network``.
        progress: told of every step.

    Raises:
        TuningError: the choices do not compute the same as what ships.
        ValueError: there are no kernels for that VAE here.
    """
    with torch.cuda.device(device), torch.no_grad():
        networks = random_networks(dtype, device, topology)
        tuner = Tuner(networks, sizes, describe_gpu(device), progress=progress)
        tuner.compile(device)
        measured = tuner.run()
        tuner.check(measured)
    return measured
