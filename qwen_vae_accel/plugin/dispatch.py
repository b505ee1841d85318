"""Who serves a request: an engine of the plan where one can, else the first backend that needs none and can."""

from __future__ import annotations

import logging
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_vae_accel.backends.base import Backend, DirectBackend, EngineBackend, Environment, Job, Program
from qwen_vae_accel.backends.registry import direct_backends, engine_backends, get_backend
from qwen_vae_accel.config import ENGINE_BACKENDS, AccelConfig
from qwen_vae_accel.engines.manifest import Manifest
from qwen_vae_accel.engines.runtime import EngineRuntime
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import BackendUnavailableError, ConfigError, EngineError, EngineMissingError
from qwen_vae_accel.journal import Journal
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.offload import Placement
from qwen_vae_accel.plan import EngineKey, Miss, Plan
from qwen_vae_accel.share import Share
from qwen_vae_accel.sizes import Profile, Size
from qwen_vae_accel.visits import fork_safe_lock

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = object()
# Image rows of a band of the last resort.
_LAST_RESORT_ROWS = 128


@dataclass(frozen=True, slots=True)
class Request:
    """One call, as far as it decides who serves it.

    ``dtype`` is that of the output, which the job may compute in another; ``generation`` is that of the weights at the call;
    ``tile_pixels`` is the height of diffusers' tiles, 0 where they are not asked for. With a ``reason`` it is diffusers' own
    to serve.
    """

    job: Job
    size: Size
    dtype: torch.dtype
    generation: int
    tile_pixels: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """The output of one request, who computed it, and why nobody did who was to come before.

    ``bands``: of rows in which it was computed, 1 for one piece; ``banded`` says why.
    """

    output: Tensor
    backend: str
    reasons: tuple[str, ...] = ()
    bands: int = 1
    banded: str = ""


@dataclass(frozen=True, slots=True)
class _Route:
    """The direct backend that serves a job over one generation of the weights, and who refused before it, and why."""

    generation: int
    backend: DirectBackend
    program: Program
    refused: tuple[str, ...]
    is_last: bool

    def run(self, x: Tensor, tile_pixels: int) -> Tensor:
        """The program's output, in bands unless ``tile_pixels`` is 0: see :attr:`DirectBackend.can_tile`."""
        program: Any = self.program
        output: Tensor = program.tiled(x, tile_pixels) if tile_pixels else program(x)
        return output


class _NoRoomError(RuntimeError):
    """Not even the weights of this backend's program fit."""


def _is_out_of_memory(error: BaseException) -> bool:
    # Compiled packages pass the allocator's error on as text.
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _unless_out_of_memory(call: Callable[[], Any], device: torch.device) -> Any:
    """The result of ``call``, or ``OUT_OF_MEMORY`` with what it left behind given back."""
    try:
        return call()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        logger.warning("%s", str(error).partition("\n")[0])
    # Here the failed call's frames are gone, and with them their tensors.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return OUT_OF_MEMORY


class Dispatcher:
    """Backends and engines of one accelerated VAE.

    Args:
        config: what the user wants.
        source: the VAE's networks.
        journal: told of everything that happens.
        share: of several processes that compute every image together; None: alone. Engines compute on one device, so none runs.

    A backend named in ``config`` must be able to run where the networks compute now.

    Raises:
        BackendUnavailableError: if ``config`` names a backend that cannot run here.
        ConfigError, EngineError: if the named backend lacks an engine directory, or the directory cannot be one; or if it runs
            engines, and there is a ``share``.
    """

    def __init__(self, config: AccelConfig, source: ModelSource, journal: Journal, share: Share | None = None) -> None:
        self._config = config
        self._share = share
        self._source = source
        self._journal = journal
        self.plan = config.plan(source.topology.scale, source.topology.multiple)
        self._environments: dict[torch.device, Environment] = {}
        self._routes: dict[tuple[Job, bool, tuple[str, ...]], _Route] = {}
        self._misses: dict[tuple[str, Job, Size, str], tuple[object, str]] = {}  # with the directory's state at the time
        self._plans: dict[tuple[str, str], tuple[object, Plan]] = {}  # by backend and method, with the directory's state
        self._told: set[str] = set()
        self._lock = fork_safe_lock()
        self._engines = self._engine_candidates()
        self._direct = self._direct_candidates()
        self.runtime: EngineRuntime | None = None
        if config.engine_dir is not None and self._engines:
            store = EngineStore(config.engine_dir)
            if not store.root.exists() and config.miss_policy != "build":
                raise EngineError(
                    f"engine_dir {store.root} does not exist. Build it with: qwen-vae-accel build --vae PATH "
                    f"--engine-dir {shlex.quote(str(store.root))} (or set on_miss='build')"
                )
            self.runtime = EngineRuntime(store, source, journal, config.max_resident, config.vram_budget, config.verify)

    def environment(self, device: torch.device) -> Environment:
        """The facts of ``device``; read once."""
        if device not in self._environments:
            self._environments[device] = Environment.detect(device)
        return self._environments[device]

    def job(self, method: str, placement: Placement) -> Job:
        """The job of ``method`` where it computes, under the configured dtypes."""
        environment = self.environment(placement.device)
        job = Job.of(self._config, method, self._source.topology, placement.device, placement.dtype, environment, self._share)
        asked = self._config.compute_dtype(method, placement.dtype)
        if job.dtype != asked:
            self._journal.compute(method, asked, job.dtype, "this CPU has no instructions for it")
        return job

    def _jobs(self) -> list[Job]:
        """The jobs of the task, but for those that only diffusers can do now."""
        placements = {method: self._source.placement(method) for method in self._config.methods}
        return [self.job(method, placement) for method, placement in placements.items() if not placement.reason]

    def _engine_candidates(self) -> tuple[EngineBackend, ...]:
        name = self._config.backend
        if self._share is not None:
            if name in ENGINE_BACKENDS:
                raise ConfigError(
                    f"backend {name!r} runs engines, which compute an image on one device; with a process group set backend to "
                    "'auto', 'fused' or 'eager'"
                )
            return ()
        if name == "auto":
            return engine_backends() if self._config.engine_dir is not None else ()
        backend = get_backend(name)
        if not isinstance(backend, EngineBackend):
            if self._config.engine_dir is not None:
                logger.info("backend %r needs no engines; engine_dir is not searched for any", name)
            return ()
        if self._config.engine_dir is None:
            raise ConfigError(f"backend {name!r} runs engines from a folder: give engine_dir")
        self._require(backend)
        return (backend,)

    def _direct_candidates(self) -> tuple[DirectBackend, ...]:
        name = self._config.backend
        backend = None if name == "auto" else get_backend(name)
        if isinstance(backend, DirectBackend):
            self._require(backend)
            return (backend,)
        candidates = direct_backends()
        if name == "auto" and self._config.float8("decode"):
            # A precision asked for by name, so nothing else takes its place; encoding may still go elsewhere.
            self._require(get_backend("fused"), ("decode",))
        for candidate in candidates if name == "auto" else ():
            reasons = [text for job in self._jobs() for text in candidate.reasons(self.environment(job.device), job)]
            if not reasons:
                logger.info("backend 'auto' takes %r where no engine serves", candidate.name)
                break
            logger.info("backend 'auto' leaves out %r: %s", candidate.name, "; ".join(dict.fromkeys(reasons)))
        return candidates

    def _require(self, backend: Backend, methods: tuple[str, ...] = ("encode", "decode")) -> None:
        jobs = [job for job in self._jobs() if job.method in methods]
        reasons = [text for job in jobs for text in backend.reasons(self.environment(job.device), job)]
        if reasons:
            hint = "backend='auto' takes one that can run."
            if self._config.float8("decode"):
                hint = "Without decode_dtype='float8_e4m3fn', backend='auto' takes one that can run."
            raise BackendUnavailableError(backend.name, dict.fromkeys(reasons), hint)

    # Serving.

    def run(self, request: Request, x: Tensor) -> Served:
        """Run the network of ``request`` over ``x [B, C, H, W]`` in the compute dtype.

        Raises:
            EngineError: if no engine serves it and ``on_miss`` is ``"error"``.
        """
        reasons: list[str] = []
        spent: list[str] = []
        for backend in () if request.job.float8 else self._engines:  # no engine computes in float8
            served = _unless_out_of_memory(partial(self._run_engine, backend, request, x, reasons), x.device)
            if isinstance(served, Tensor):
                return Served(served, backend.name)
            if served is OUT_OF_MEMORY:
                spent.append(backend.name)
        if reasons and self._config.miss_policy == "error":
            raise EngineMissingError(f"no engine serves {request.job.method} at {request.size}: {'; '.join(reasons)}")
        while True:
            try:
                route = self._route(request, tuple(spent))
            except _NoRoomError as error:
                spent.append(str(error))
                continue
            call = partial(route.run, x, request.tile_pixels)
            if self._share is not None:  # the other processes would wait for this one's rows for ever
                output = call()
                break
            # What eager cannot hold in bands, nothing here can.
            output = call() if request.tile_pixels and route.is_last else _unless_out_of_memory(call, x.device)
            if output is not OUT_OF_MEMORY:
                break
            if route.is_last:
                request = replace(request, tile_pixels=_LAST_RESORT_ROWS)
                spent.append(f"{route.backend.name} in one piece")
            else:
                spent.append(route.backend.name)
        reasons += [*route.refused, *(f"{name}: out of memory at {request.size}" for name in spent)]
        bands, banded = route.backend.bands(route.program, x.shape, request.tile_pixels)
        return Served(output, route.backend.name, tuple(dict.fromkeys(reasons)), bands, banded)

    def _run_engine(self, backend: EngineBackend, request: Request, x: Tensor, reasons: list[str]) -> Tensor | None:
        """The engine's output; None, with the reason added to ``reasons``, where no engine of ``backend`` serves."""
        if request.tile_pixels:
            reasons.append(f"{backend.name}: use_tiling is on, and engines run the image in one piece")
            return None
        choice = self._plan(backend, request.job.method).select(request.job.method, request.size)
        if isinstance(choice, Miss):
            reasons.append(f"{backend.name}: {choice.reason}")
            return None
        wanted = self.wanted(backend, request.job, choice.key)
        memory = (backend.name, request.job, choice.profile.optimum, wanted.weights)
        assert self.runtime is not None
        store = self.runtime.store
        known = self._misses.get(memory)
        if known is not None and known[0] == store.stamp():
            reasons.append(known[1])
            return None
        try:
            output = self._with_engine(wanted, request.job, choice.profile, x)
        except EngineError as error:
            text = f"{backend.name}: {error}"
            if not _is_out_of_memory(error):  # there may be room at the next request
                self._misses[memory] = store.stamp(), text
            reasons.append(text)
            return None
        return output

    def _plan(self, backend: EngineBackend, method: str) -> Plan:
        """The plan as the directory has it now: the sizes of an engine that is there are what the engine says."""
        if self.runtime is None:
            return self.plan
        store, key = self.runtime.store, (backend.name, method)
        stamp = store.stamp()
        known = self._plans.get(key)
        if known is None or known[0] != stamp:
            self._plans[key] = known = stamp, self._plan_with(store.known(), backend, method)
        return known[1]

    def _plan_with(self, manifest: Manifest, backend: EngineBackend, method: str) -> Plan:
        if self.plan.multi_profile:
            path = self.plan.engines(method)[0].stem + backend.suffix
            record = manifest.newest(path)
            if self._config.sizes is not None or record is None or record.profiles == self.plan.profiles:
                return self.plan
            self._tell(f"{path} has {len(record.profiles)} optimization profiles of its own: {record.key.ranges()}")
            return replace(self.plan, profiles=record.profiles)
        held = manifest.held(method, backend.suffix)
        for text in self.plan.surprises(held):
            self._tell(text)
        return self._config.plan(self._source.topology.scale, self._source.topology.multiple, held)

    def _tell(self, surprise: str) -> None:
        if surprise not in self._told:
            self._told.add(surprise)
            logger.warning("%s", surprise)

    def wanted(self, backend: EngineBackend, job: Job, key: EngineKey) -> Wanted:
        """The engine of ``key`` over the VAE's current weights."""
        weights = self._source.fingerprint(job.method, job.dtype)
        return Wanted(backend, key, job.dtype, job.device, weights, self.environment(job.device))

    def _with_engine(self, wanted: Wanted, job: Job, profile: Profile, x: Tensor) -> Tensor:
        assert self.runtime is not None
        index = wanted.key.profiles.index(profile)

        def run() -> Tensor:
            assert self.runtime is not None
            visit = threading.Lock()
            with visit, self.runtime.use(wanted, profile, visit) as program:
                # Engines hold batch one, unless they say otherwise; more images go one after another.
                parts = x.split(getattr(program, "max_batch", {}).get(index, 1))
                outputs = [program(part, index) for part in parts]
                del program  # after the block it may be released, to make room for another
            return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

        unavailable = wanted.backend.reasons(wanted.environment, job)
        if unavailable:
            raise EngineError("; ".join(unavailable))
        try:
            return run()
        except EngineError as error:
            if self._config.miss_policy != "build":
                raise
            logger.info("building: %s", error)
            self.runtime.build(wanted)
            return run()

    def _route(self, request: Request, spent: tuple[str, ...] = ()) -> _Route:
        key = (request.job, bool(request.tile_pixels), spent)
        known = self._routes.get(key)
        if known is None or known.generation != request.generation:
            with self._lock:
                known = self._routes.get(key)
                if known is None or known.generation != request.generation:
                    self._routes[key] = known = self._find_route(request, spent)
        return known

    def _find_route(self, request: Request, spent: tuple[str, ...]) -> _Route:
        refused: list[str] = []
        # Only a backend asked for by name can be the whole list and refuse; eager takes everything.
        last = direct_backends()[-1]
        for backend in (*(backend for backend in self._direct if backend.name not in spent), last):
            why = backend.reasons(self.environment(request.job.device), request.job)
            if request.tile_pixels and not backend.can_tile:
                why = [*why, "use_tiling is on, and it does not tile"]
            if not why:
                try:
                    program = backend.program(self._source, request.job)
                except BackendUnavailableError as error:
                    why = list(error.reasons)
                except RuntimeError as error:
                    if backend is last or not _is_out_of_memory(error):
                        raise
                    raise _NoRoomError(backend.name) from None
                else:
                    # Under "auto" the next backend is what was asked for, and no fallback.
                    told = refused if self._config.backend == backend.name or backend not in self._direct else []
                    return _Route(request.generation, backend, program, tuple(told), backend is last)
            refused += [f"{backend.name}: {text}" for text in why]
        raise BackendUnavailableError("auto", refused)

    def forget(self) -> None:
        """Drop what pins the VAE's memory: its weights are about to move."""
        with self._lock:
            self._routes.clear()
        self._source.release()

    # Ahead of time.

    def prepare(self) -> list[tuple[str, Callable[[], object]]]:
        """The steps of a warm-up, each with its name: engines of the plan to load or build, or a direct program to make."""
        steps: list[tuple[str, Callable[[], object]]] = []
        for job in self._jobs():
            method = job.method
            for backend in self._engines:
                if backend.reasons(self.environment(job.device), job):
                    continue
                for key in self._plan(backend, method).engines(method):
                    wanted = self.wanted(backend, job, key)
                    steps.append((wanted.path, partial(self._warm, wanted)))
                break
            else:
                request = Request(job, Size(0, 0), job.dtype, self._source.generation(method))
                steps.append((f"{method} network", partial(self._route, request)))
        return steps

    def _warm(self, wanted: Wanted) -> None:
        assert self.runtime is not None
        profile = wanted.key.profiles[0]
        self._misses.clear()
        visit = threading.Lock()
        try:
            with visit, self.runtime.use(wanted, profile, visit):
                return
        except EngineError:
            if self._config.miss_policy != "build":
                raise
        self.runtime.build(wanted)
        with visit, self.runtime.use(wanted, profile, visit):
            return
