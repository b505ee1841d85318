"""Measure the kernels' configurations on this GPU and keep the fastest.

Kernels are timed where they run: the plan of a network says which kernels it launches at which sizes, and what each is
tuned by (``network.Tuned``). In round i every kernel has its i-th candidate. All candidates compile first, in parallel.
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
from qwen_vae_accel.kernels.fused import FusedConfig, FusedDecoder, FusedEncoder, describe_device
from qwen_vae_accel.kernels.memory import Memory, Program, Step
from qwen_vae_accel.kernels.network import FLOAT8_CAPABILITY, LATENT_CHANNELS, decoder_shapes, encoder_shapes
from qwen_vae_accel.kernels.timing import first_ms, launch_ms
from qwen_vae_accel.kernels.tuning.candidates import candidates
from qwen_vae_accel.kernels.tuning.choice import WORTH, Case, Times, choose
from qwen_vae_accel.kernels.tuning.selection import Config, Device, Key, Tuning
from qwen_vae_accel.kernels.tuning.stored import Measured

logger = logging.getLogger(__name__)

Network = FusedDecoder | FusedEncoder
Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all

_HOPELESS = 3.0  # times the fastest so far; then one launch is enough
_LARGEST_DIFFERENCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative L2: those of the engines' self-check
_FLOAT8_DIFFERENCE = 2e-1


@dataclass(frozen=True, slots=True)
class Trial:
    """One launch of one kernel, planned with ``tuning``."""

    key: Key
    tuning: Tuning
    case: Case
    step: Step
    memory: Memory

    def launch(self) -> None:
        self.step.launch(self.memory)


class Clock:
    """Times trials on the GPU."""

    def prepare(self, program: Program, memory: Memory) -> None:
        """Run a whole network, so that its memory holds numbers such as it meets in use."""
        program.run(memory)

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


def random_networks(dtype: torch.dtype, device: torch.device) -> list[Network]:
    """Decoder, encoder and, where the GPU has it, float8 decoder of the published topology, with random weights.

    They are made without sm90/, so that weights stay on the GPU, where packing takes least.
    """
    config = FusedConfig(graphs=0, tuning=Tuning(hopper_convs=False))

    def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
        return {
            name: 1 + 0.1 * draw(shape) if name.endswith("gamma") else draw(shape) * math.prod(shape[1:]) ** -0.5
            for name, shape in shapes.items()
        }

    decoder = state(decoder_shapes(3))
    networks: list[Network] = [
        FusedDecoder(decoder, dtype=dtype, device=device, config=config),
        FusedEncoder(state(encoder_shapes(3)), dtype=dtype, device=device, config=config),
    ]
    if torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY:
        scales = input_scales(decoder, dict.fromkeys(calibrated_layers().values(), 16.0))
        networks.append(FusedDecoder(decoder, dtype=dtype, device=device, config=config, float8=scales))
    return networks


def input_shape(network: Network, height: int, width: int) -> tuple[int, int, int, int]:
    """Of one image of ``height`` x ``width`` pixels."""
    scale = 8 if network.channels == LATENT_CHANNELS else 1
    return 1, network.channels, height // scale, width // scale


class Tuner:
    """Tunes the kernels that ``networks`` launch for images of ``sizes``.

    Args:
        networks: of one device and dtype, made with ``hopper_convs=False`` (:func:`random_networks`).
        sizes: heights and widths in pixels.
        device: what to know of the GPU.
        base: what the choices are compared with.
        only: leaves out kernels for whose key it is false.
        clock: times trials.
        progress: told of every step.
    """

    def __init__(
        self, networks: Sequence[Network], sizes: Sequence[tuple[int, int]], device: Device, *, base: Tuning | None = None,
        only: Callable[[Key], bool] = lambda key: True, clock: Clock | None = None, progress: Progress = lambda *_: None,
    ) -> None:  # fmt: skip
        self._inputs = [(network, input_shape(network, *size)) for network in networks for size in sizes]
        self._device, self._base, self._clock, self._progress = device, base or Tuning(), clock or Clock(), progress
        self._only = only
        keys = {trial.key for trial in self._trials(self._base, "meta")}
        self.candidates = {key: candidates(key, device) for key in sorted(keys, key=str)}
        self._failed: set[tuple[Key, Config]] = set()

    def _trials(self, tuning: Tuning, where: torch.device | str | None = None, *, prepare: bool = False) -> Iterator[Trial]:
        """Every case once, planned with ``tuning``."""
        seen: set[tuple[Key, Case]] = set()
        for network, shape in self._inputs:
            program, tuned = network.tuned_program(shape, tuning)
            device = network.device if where is None else where
            memory = program.memory(torch.randn(shape, device=device).to(network.dtype))
            if prepare:
                self._clock.prepare(program, memory)
            for step, by in zip(program.steps, tuned, strict=True):
                if by is None or not self._only(by.key):
                    continue
                case = Case(step.kernel, step.shape, by.grid)
                if (by.key, case) not in seen:
                    seen.add((by.key, case))
                    yield Trial(by.key, tuning, case, step, memory)

    def _rounds(self) -> Iterator[tuple[Tuning, dict[Key, Config]]]:
        for index in range(max(map(len, self.candidates.values()), default=0)):
            configs = {key: found[index] for key, found in self.candidates.items() if index < len(found)}
            yield self._base.with_measured({key: (config,) for key, config in configs.items()}), configs

    def compile(self, device: torch.device) -> None:
        """Compile every candidate, in parallel; those that do not compile are not measured."""
        tasks: compiling.Tasks = {}
        users: dict[object, set[tuple[Key, Config]]] = {}
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
            program, _ = network.tuned_program(shape, self._base)
            with compiling.collecting() as beside:
                program.run(program.memory(torch.empty(shape, dtype=network.dtype, device="meta")))
            attempts = {**beside, **attempts}
        compiling.run(attempts, device, lambda done, total: self._progress("compile candidates", done, total))

    def measure(self) -> dict[Key, Times]:
        """Milliseconds of every candidate in every case."""
        times: dict[Key, Times] = {key: {config: {} for config in found} for key, found in self.candidates.items()}
        fastest: dict[tuple[Key, Case], float] = {}
        total = sum(map(len, self.candidates.values()))
        done = 0
        collections.deque(self._trials(self._base, prepare=True), maxlen=0)  # a warm GPU, and numbers in its memory
        for tuning, configs in self._rounds():
            for trial in self._trials(tuning):
                place, config = (trial.key, trial.case), configs.get(trial.key)
                if config is None or (trial.key, config) in self._failed:
                    continue
                spent = self._clock(trial, fastest.get(place, math.inf))
                times[trial.key][config][trial.case] = spent
                fastest[place] = min(spent, fastest.get(place, math.inf))
                if spent == math.inf:
                    self._failed.add((trial.key, config))
            done += len(configs)
            self._progress("measure candidates", done, total)
        return times

    def compare(self, choices: Mapping[Key, tuple[Config, ...]], rounds: int = 2) -> list[Measured]:
        """The choices against ``base``, in turns; those that are not faster are dropped."""
        tunings = (self._base, self._base.with_measured(choices))
        best: list[dict[tuple[Key, Case], float]] = [{}, {}]
        for index in range(rounds):
            for which, tuning in enumerate(tunings):
                for trial in self._trials(tuning, prepare=True):
                    place = (trial.key, trial.case)
                    spent = self._clock(trial)
                    best[which][place] = min(spent, best[which].get(place, math.inf))
                self._progress("compare with what ships", 2 * index + which + 1, 2 * rounds)
        result = []
        for key in self.candidates:
            shipped, chosen = (sum(spent for (k, _), spent in found.items() if k == key) for found in best)
            faster = key in choices and chosen < WORTH * shipped
            result.append(Measured(key, choices[key] if faster else (), chosen if faster else shipped, shipped))
        return result

    def run(self) -> list[Measured]:
        """Measure, choose, compare."""
        choices = {key: choose(key, times, self._device) for key, times in self.measure().items()}
        return self.compare({key: found for key, found in choices.items() if found})

    def check(self, measured: Sequence[Measured]) -> None:
        """Whether the networks still compute the same, up to the order of sums.

        Raises:
            TuningError: they do not.
        """
        tuning = self._base.with_measured({kernel.key: kernel.choices for kernel in measured if kernel.choices})
        for network, shape in self._inputs:
            image = torch.randn(shape, device=network.device).to(network.dtype)
            outputs = []
            for which in (self._base, tuning):
                program, _ = network.tuned_program(shape, which)
                memory = program.memory(image)
                program.run(memory)
                outputs.append(memory.output.float())
            difference = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
            limit = _FLOAT8_DIFFERENCE if network.float8 else _LARGEST_DIFFERENCE[network.dtype]
            if not difference <= limit:
                raise TuningError(
                    f"{type(network).__name__} at {list(shape)}: with the configurations chosen the result differs by "
                    f"{difference:.1e} (relative L2; allowed {limit:.0e}): nothing was stored"
                )


def tune(
    dtype: torch.dtype, device: torch.device, sizes: Sequence[tuple[int, int]], progress: Progress = lambda *_: None
) -> list[Measured]:
    """Tune every kernel of the published topology on ``device``: about a minute on an H200 with 32 cores, at three sizes.

    Most of it is compiling. Where all convolutions are Triton's there is more to compile.

    Args:
        dtype: bfloat16 or float16; the choices serve both, and float8 beside them.
        device: a CUDA device.
        sizes: heights and widths of images in pixels.
        progress: told of every step.

    Raises:
        TuningError: the choices do not compute the same as what ships.
    """
    with torch.cuda.device(device), torch.no_grad():
        networks = random_networks(dtype, device)
        tuner = Tuner(networks, sizes, describe_device(device), progress=progress)
        tuner.compile(device)
        measured = tuner.run()
        tuner.check(measured)
    return measured
