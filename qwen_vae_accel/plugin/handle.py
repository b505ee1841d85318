"""Into a diffusers pipeline and out of it again: the handle that ``accelerate`` returns."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.errors import HandleError, InvalidInputError
from qwen_vae_accel.journal import ORIGINAL, Banded, Journal, Report
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.custom import custom_method
from qwen_vae_accel.model.offload import Placement, run_pre_forward
from qwen_vae_accel.model.topology import METHODS
from qwen_vae_accel.plugin.compiled import Traced
from qwen_vae_accel.plugin.dispatch import Dispatcher, Request
from qwen_vae_accel.plugin.hosts import held_vae
from qwen_vae_accel.plugin.methods import PATCHED, VAE, OwnMethods, pack
from qwen_vae_accel.plugin.parking import Parking
from qwen_vae_accel.plugin.patch import Patch
from qwen_vae_accel.plugin.plain import not_image, not_plain
from qwen_vae_accel.plugin.processing import PostProcessing, PreProcessing, Replacement, processors_of
from qwen_vae_accel.progress import progress_bar
from qwen_vae_accel.share import ProcessGroup, Share
from qwen_vae_accel.sizes import MIN_SIDE, Size
from qwen_vae_accel.visits import Visits, fork_safe_lock

_REQUESTS = 256  # kinds of calls remembered
_TRIES = 2  # to compute over weights that do not change meanwhile


class Handle:
    """An accelerated VAE. Made by ``accelerate()``; as a context manager it restores the VAE at exit.

    Attributes:
        vae: the VAE.
        config: how it is accelerated.
        process_group: the processes that compute every image together; None: this one alone.
    """

    _patch: ClassVar[Patch] = VAE
    _theirs: ClassVar[str] = ORIGINAL  # who serves a call that is not served here

    def __init__(
        self, vae: nn.Module, config: AccelConfig, pipeline: Any | None, process_group: ProcessGroup | None = None
    ) -> None:
        self.vae = vae
        self.config = config
        self.process_group = process_group
        self._pipelines: list[Callable[[], Any]] = []
        self._replacements: list[Replacement] = []
        self._journal = Journal()
        self._source = ModelSource(vae, config.engine_dir)
        share = None if process_group is None else Share.of_group(process_group)
        if share is not None:
            share.check_alike({"config": str(config), "VAE": str(self._source.topology)})
        self._dispatcher = Dispatcher(config, self._source, self._journal, share)
        self._active = True
        self._restored = False
        self._callers = Visits()
        self._requests: dict[tuple[Any, ...], Request] = {}
        self._one_original = fork_safe_lock()
        self._traced = Traced.of(self, self._source.topology)
        self._patch.remove(self.accelerated, PATCHED, {})  # what a copy of an accelerated VAE may carry
        self._custom = {method: custom_method(self.accelerated, method) for method in METHODS}
        self._before: Mapping[str, Any]
        self._patch.install(self.accelerated, self, PATCHED)
        self._original = OwnMethods(self.accelerated, self._before)
        self._parking = Parking(vae)
        self._park()
        if pipeline is not None:
            try:
                self._adopt(pipeline)
            except BaseException:
                self.restore()
                raise

    @property
    def accelerated(self) -> nn.Module:
        """The object whose methods are served."""
        return self.vae

    def _adopt(self, pipeline: Any) -> None:
        """Take a pipeline that holds this VAE under the handle: its pre- and post-processing, and the watch over its VAE."""
        if not any(reference() is pipeline for reference in self._pipelines):
            try:
                self._pipelines.append(weakref.ref(pipeline))
            except TypeError:  # a namespace, an object with slots: no weak reference, so it is kept
                self._pipelines.append(lambda: pipeline)
        for processor in processors_of(pipeline) if self.config.postprocess else ():
            self._keep(PostProcessing.install(processor, self._journal))
        if self.config.preprocess:
            self._keep(PreProcessing.install_in(pipeline, self._journal, self.vae))

    def _keep(self, replacement: Replacement | None) -> None:
        if replacement is not None:
            self._replacements.append(replacement)

    def _is_of(self, vae: Any) -> bool:
        """Whether it serves ``vae``, and not a VAE that ``vae`` was copied from."""
        return vae is self.accelerated

    # A copy or a pickle of an accelerated VAE is a plain VAE: its patched methods find no handle of their own.

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._restored:
            self.restore()

    def restore(self) -> None:
        """Give the VAE back its own methods and release every engine; calls under way in other threads finish first.

        Where an interrupt ends it, or another error, it can be called again and does what is left.

        Raises:
            HandleError: if that was done before, if something else patched the VAE since, or inside a call of the VAE.
        """
        if self._restored:
            raise HandleError("this VAE was restored already; accelerate() makes a new handle")
        if self._callers.mine():
            raise HandleError(
                "restore() inside a call of the VAE (from a hook or a signal handler) would wait for itself; call it later"
            )
        if self._active:
            patched = self._patch.patched_since(self.accelerated, PATCHED)
            if patched:
                raise HandleError(f"{patched}; undo that first, or the other patch would be lost")
            for replacement in self._replacements:
                replacement.check_removable()
        self._active = False  # calls that begin from now on go diffusers' way; each step below can be repeated
        while self._replacements:
            self._replacements[0].remove()
            del self._replacements[0]
        self._patch.remove(self.accelerated, PATCHED, self._before)
        self._callers.wait()
        self.release()  # before the weights come back: networks over views of them would keep their memory
        with self._one_original:
            self._unpark()
        self._restored = True

    def release(self) -> None:
        """Give back the memory of networks and engines; the next call makes or loads them again."""
        self._dispatcher.forget()
        if self._dispatcher.runtime is not None:
            self._dispatcher.runtime.release()

    def report(self) -> Report:
        """Tell what happened since :func:`accelerate`: a table when printed with rich, values through ``.as_dict()``."""
        runtime = self._dispatcher.runtime
        resident = runtime.resident() if runtime is not None else []
        return self._journal.report(self.config.backend, resident, self._note(), self._parking.nbytes)

    def warmup(self, progress: bool = True) -> Report:
        """Load the engines of the plan, building those that are missing where ``on_miss`` says so.

        Args:
            progress: show a progress bar.

        Raises:
            HandleError: if the VAE was restored, or the pipeline has another VAE by now.
            EngineError: if an engine cannot be had.
        """
        note = self._note()
        if note:
            raise HandleError(note)
        run_pre_forward(self.vae)
        steps = self._dispatcher.prepare()
        with progress_bar(disable=not progress) as update:
            for index, (name, step) in enumerate(steps):
                update(name, index, len(steps))
                step()
        return self.report()

    def _note(self) -> str:
        if not self._active:
            return "this VAE was restored; accelerate() makes a new handle"
        pipelines = [pipeline for reference in self._pipelines if (pipeline := reference()) is not None]
        if any(held_vae(pipeline) is not self.accelerated for pipeline in pipelines):
            return "the pipeline's VAE was replaced after accelerate(); the new one is not accelerated: call accelerate() again"
        return ""

    # What the patched methods do.

    def _call(self, method: str, x: Tensor, return_dict: bool) -> Any:
        visit = threading.Lock()
        with visit:
            self._callers.enter(visit)
            try:
                if self._active:
                    return self._serve(method, x, return_dict)
            finally:
                self._callers.leave(visit)
        return self._run_original(method, x, return_dict)  # restored since this thread looked the method up

    def _serve(self, method: str, x: Tensor, return_dict: bool) -> Any:
        reason = not_plain(x) or self._custom[method]
        if not reason:
            run_pre_forward(self.vae)
            output = self._serve_ahead(method, x)
            for _ in range(_TRIES):
                if output is None and not reason:
                    request = self._look(method, x)
                    if isinstance(request, str):
                        reason = request
                    else:
                        output = self._compute(request, x)
            if output is not None:
                return self._packed(method, output, return_dict)
            reason = reason or "its weights were written while it computed"
        self._journal.served(method, self._theirs, reason)
        return self._run_original(method, x, return_dict)

    def _packed(self, method: str, output: Tensor, return_dict: bool) -> Any:
        return pack(method, output.unsqueeze(2), return_dict)

    def _serve_ahead(self, method: str, x: Tensor) -> Tensor | None:
        """The output of a network on a GPU, begun before the look at the VAE, which the GPU's work then hides.

        None where that may not be, or the look found something new: the output is worth nothing then.
        """
        known = self._source.last(method)
        if known is None or not isinstance(x, Tensor):
            return None
        generation, placement = known
        request = self._requests.get(self._key(method, x, placement))
        if request is None or request.generation != generation or request.reason or self._original_reason(request, x):
            return None
        try:
            return self._compute(request, x, looked=False)
        except Exception:
            if self._source.generation(method) == generation:
                raise
            return None

    def _compute(self, request: Request, x: Tensor, looked: bool = True) -> Tensor | None:
        """The output ``[B, C, H, W]``; None if the weights turn out to be others than those of ``request``."""
        job = request.job
        same = self._source.compare(job.method, request.generation)
        image = x[:, :, 0].to(job.device, job.dtype).resolve_neg()
        parts = image.split(1) if self.vae.use_slicing and len(image) > 1 else (image,)
        served = [self._dispatcher.run(request, part) for part in parts]
        outputs = [part.output.to(request.dtype) for part in served]
        if not (looked or self._source.generation(job.method) == request.generation) or not same():
            return None
        for part in served:
            self._journal.served(job.method, part.backend, "; ".join(part.reasons))
            if part.bands > 1:
                self._journal.banded(Banded(job.method, str(request.size), part.backend, part.bands, part.banded))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _run_original(self, method: str, x: Tensor, return_dict: bool) -> Any:
        with self._one_original:  # diffusers keeps the state of a call in the VAE itself
            self._unpark()
            return self._original[method](x, return_dict=return_dict)

    def _look(self, method: str, x: Tensor) -> Request | str:
        """The request of a call, after a look at the VAE as it is now; or why the call is diffusers' own to serve."""
        generation, placement = self._source.glance(method)
        reason = self._source.custom(method)
        if reason:
            return reason
        request = self._request(method, x, generation, placement)
        return request.reason or self._original_reason(request, x) or request

    def _key(self, method: str, x: Tensor, placement: Placement) -> tuple[Any, ...]:
        """All that a request depends on beside the weights."""
        vae: Any = self.vae
        limits = (vae.tile_sample_min_height, vae.tile_sample_min_width) if vae.use_tiling else None
        return (method, x.shape, x.dtype, x.device, placement, limits)

    def _request(self, method: str, x: Tensor, generation: int, placement: Placement) -> Request:
        """The request of a call that is like one seen before, or a new one after a look at the input."""
        if not isinstance(x, Tensor):
            self._check_input(method, x)
        key = self._key(method, x, placement)
        request = self._requests.get(key)
        if request is None or request.generation != generation:
            self._check_input(method, x)
            job = self._dispatcher.job(method, placement)
            scale = 1 if method == "encode" else job.topology.scale
            size = Size(x.shape[4] * scale, x.shape[3] * scale)
            limits = key[-1]
            large = limits is not None and (size.height > limits[0] or size.width > limits[1])
            elsewhere = self._elsewhere(method, x, placement)
            request = Request(job, size, placement.dtype, generation, limits[0] if limits and large else 0, elsewhere)
            if len(self._requests) >= _REQUESTS:
                self._requests.clear()
            self._requests[key] = request
        return request

    def _elsewhere(self, method: str, x: Tensor, placement: Placement) -> str:
        """Why hooks must have a say about an input that is not where the network is; empty if we know what they do."""
        if x.device == placement.device or placement.moves_input:
            return ""
        if not placement.hooked:
            raise InvalidInputError(f"{method} was given a tensor on {x.device}, but the VAE is on {placement.device}")
        return f"its input is on {x.device} and the network on {placement.device}, with hooks that may move either"

    def _check_input(self, method: str, x: Tensor) -> None:
        topology = self._source.topology
        channels, smallest = (topology.image_channels, MIN_SIDE) if method == "encode" else (topology.z_dim, 1)
        what = "images [B, C, T, H, W]" if method == "encode" else "latents [B, C, T, h, w]"
        if not isinstance(x, Tensor) or x.dim() != 5:
            given = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInputError(f"{method} takes {what}, was given {given}")
        shape = tuple(x.shape)
        if shape[1] != channels:
            raise InvalidInputError(f"{method} takes {what} of {channels} channels, was given {shape}")
        if not x.dtype.is_floating_point:
            raise InvalidInputError(f"{method} takes floating point values, was given {x.dtype}")
        if 0 in shape or min(shape[3:]) < smallest:
            raise InvalidInputError(f"{method} takes {what} with at least {smallest} pixels a side, was given {shape}")
        multiple = topology.multiple if method == "encode" else 1
        if shape[3] % multiple or shape[4] % multiple:
            raise InvalidInputError(
                f"encode takes {what} with sides that are multiples of {multiple} pixels, was given {shape}"
            )

    def _original_reason(self, request: Request, x: Tensor) -> str:
        """Why this call of a request is diffusers' own, by what is no part of the request; empty if it is not."""
        return not_image(x, request.job.device, partial(self._source.requires_grad, request.job.method))

    def _moved(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._dispatcher.forget()
        self._unpark()
        with self._source.moving():
            result = original(*args, **kwargs)
        self._park()
        return result

    # The VAE's own weights, in GPU memory or out of it.

    def _park(self) -> None:
        if self.config.offload_reference:
            self._source.release()  # networks over views of the weights would keep their memory
            with self._source.moving():
                self._parking.park()
                self._source.parked_from = self._parking.home

    def _unpark(self) -> None:
        if self._parking.nbytes:
            with self._source.moving():
                self._parking.unpark()
                self._source.parked_from = None
