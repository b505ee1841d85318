"""From a diffusers VAE to its image networks, kept true to the VAE's weights while they move or change.

The networks' weights are views of the VAE's own parameters wherever device and dtype allow; only the folded upsampling
kernels are new memory (2 % of the VAE). Before each use the VAE is compared with what was seen last: its layers and their
code, and its parameters by identity, address, version and a sample of their values. That costs microseconds. Weights that
changed are read anew; a VAE that computes something else is left to diffusers, with the reason, until it is itself again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.errors import UnsupportedVAEError
from qwen_vae_accel.model.image_vae import ImageDecoder, ImageEncoder
from qwen_vae_accel.model.layers import State, under
from qwen_vae_accel.model.offload import Placement, values
from qwen_vae_accel.model.published import published_twin
from qwen_vae_accel.model.seen import Published, Seen
from qwen_vae_accel.model.topology import PARTS, Topology, topology_of
from qwen_vae_accel.visits import fork_safe_lock


def image_state(parameters: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """The 2-D weights of one network, as views: newest temporal slices, 1-D gammas, no temporal resampling.

    In the residual topology the temporal resampling leaves a mark, an empty tensor ``time_conv``: there the shortcut counts
    a second frame.

    Args:
        parameters: the VAE's parameters in diffusers' names.
        method: ``"encode"`` or ``"decode"``.

    Returns:
        Weights named from inside the encoder or decoder, plus ``quant_conv.*`` or ``post_quant_conv.*``.
    """
    network, quant = PARTS[method]
    state = under(parameters, network)
    state.update({f"{quant}.{name}": value for name, value in under(parameters, quant).items()})
    found = {}
    for name, value in ((name, value.detach()) for name, value in state.items()):
        owner, _, rest = name.partition(".time_conv.")
        if rest == "bias" and owner.endswith(("downsampler", "upsampler")):
            found[f"{owner}.time_conv"] = value[:0]
        elif not rest:
            found[name] = value[:, :, -1] if value.dim() == 5 else value.reshape(-1) if name.endswith("gamma") else value
    return found


def build_model(state: State, method: str) -> ImageEncoder | ImageDecoder:
    """The network of ``method`` over ``state`` as it is: device, dtype and memory shared where possible."""
    model = ImageEncoder(state) if method == "encode" else ImageDecoder(state)
    return model.eval()


def fingerprint(state: State, dtype: torch.dtype) -> str:
    """sha256 over names, shapes and values of ``state`` rounded to ``dtype``: equal for equal engines' weights."""
    digest = hashlib.sha256(str(dtype).encode())
    for name in sorted(state):
        value = state[name].to(dtype).contiguous().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ModelSource:
    """Image networks of one VAE, made on demand and made again when the VAE's weights have changed.

    Args:
        vae: an ``AutoencoderKLQwenImage``, ``AutoencoderKLQwenImage21`` or Wan 2.1 ``AutoencoderKLWan`` of diffusers, in
            whatever state.
        folder: where facts measured of its weights are kept (``engines.calibration``); None: nowhere.

    Raises:
        UnsupportedVAEError: if ``vae`` is of another class, or its configuration is another network's.
    """

    def __init__(self, vae: nn.Module, folder: str | Path | None = None) -> None:
        self.vae = vae
        self.folder = None if folder is None else Path(folder).expanduser().absolute()
        self._twin = published_twin(vae)
        self.topology: Topology = topology_of(self._twin.vae)
        self.parked_from: torch.device | None = None  # see Placement.of
        self._lock = fork_safe_lock()
        self._published: dict[str, Published] = {}
        self._seen: dict[str, Seen] = {}
        self._generation = {"encode": 0, "decode": 0}
        self._models: dict[tuple[str, torch.dtype, torch.device], ImageEncoder | ImageDecoder] = {}
        self._fingerprints: dict[tuple[str, torch.dtype], str] = {}

    @property
    def config(self) -> dict[str, Any]:
        """The VAE's configuration; empty where it has none."""
        return dict(getattr(self.vae, "config", {}) or {})

    def placement(self, method: str) -> Placement:
        """Look at the weights of ``method`` now: where its network computes, and in which dtype."""
        return self.glance(method)[1]

    def generation(self, method: str) -> int:
        """A number that grows whenever the weights behind ``method`` have changed; looks at them now.

        Values on a GPU that were changed without a mark are left to :meth:`compare` and :meth:`moving`.
        """
        seen = self._seen.get(method)
        if seen is None or seen.reason or not seen.same():
            with self._lock:
                self._look(method)
        return self._generation[method]

    def glance(self, method: str) -> tuple[int, Placement]:
        """:meth:`generation`, and where and in which dtype the network computes."""
        return self.generation(method), self._seen[method].placement

    def last(self, method: str) -> tuple[int, Placement] | None:
        """:meth:`glance` as it was at the last look, where the network may begin before the next one: on a GPU, without hooks.

        None if not, or there was no look, or the VAE was not the published one then, or the memory of its weights is another by
        now.
        """
        seen = self._seen.get(method)
        if seen is None or seen.reason or seen.placement.reason:
            return None
        if seen.placement.device.type != "cuda" or seen.placement.hooked or not seen.in_place():
            return None
        return self._generation[method], seen.placement

    def requires_grad(self, method: str) -> bool:
        """Whether a gradient of the network's weights can be asked for, as :meth:`generation` saw them last."""
        return any(parameter.requires_grad for parameter in self._seen[method].parameters)

    def custom(self, method: str) -> str:
        """Why the network of ``method`` is not known to be the published one, at the last look; empty if it is."""
        seen = self._seen[method]
        return seen.reason or seen.placement.reason

    def compare(self, method: str, generation: int) -> Callable[[], bool]:
        """Begin to compare values on a GPU with those at the last look; the result says whether they are of ``generation``.

        The result waits for what the current stream had to do before, so call it last. While a stream is captured, nothing is
        compared.
        """
        seen = self._seen[method]
        result = seen.compare()

        def same() -> bool:
            if result is not None and not result():
                with self._lock:
                    if self._seen[method] is seen:  # else another thread has noticed
                        self._seen[method] = self._seen_now(method)
                        self._forget(method)
            return self._generation[method] == generation

        return same

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around what moves the VAE's parameters: where nothing but their device changes inside, the generation stays."""
        with self._lock:
            for method, seen in list(self._seen.items()):
                if not seen.settled():
                    self._look(method)
            before = dict(self._seen)
        yield
        with self._lock:
            self._models.clear()
            for method, seen in before.items():
                now = self._seen[method] = self._seen_now(method)
                if not seen.holds_the_same(now):
                    self._forget(method)

    def model(self, method: str, dtype: torch.dtype, device: torch.device) -> ImageEncoder | ImageDecoder:
        """The network of ``method`` computing in ``dtype`` on ``device``; shares the VAE's memory where it can."""
        with self._lock:
            self.generation(method)
            key = (method, dtype, device)
            if key not in self._models:
                # Made in inference mode, the folded kernels could never be used outside it.
                with torch.inference_mode(False), torch.no_grad():
                    state = {name: value.to(device, dtype) for name, value in self.state(method).items()}
                    self._models[key] = build_model(state, method)
            return self._models[key]

    def state(self, method: str) -> dict[str, Tensor]:
        """The current 2-D weights of ``method``, as views where the VAE's parameters are present.

        Raises:
            UnsupportedVAEError: if the VAE computes something else than the published one.
        """
        self.generation(method)
        reason = self._seen[method].reason
        if reason:
            raise UnsupportedVAEError(type(self.vae).__name__, [reason])
        return image_state(values(self.vae, method), method)

    def fingerprint(self, method: str, dtype: torch.dtype) -> str:
        """See :func:`fingerprint`; computed once per generation."""
        with self._lock:
            self.generation(method)
            key = (method, dtype)
            if key not in self._fingerprints:
                self._fingerprints[key] = fingerprint(self.state(method), dtype)
            return self._fingerprints[key]

    def release(self) -> None:
        """Drop the networks, which pin the VAE's memory; the next use makes them again."""
        with self._lock:
            self._models.clear()

    def _look(self, method: str) -> None:
        before = self._seen.get(method)
        now = self._seen[method] = self._seen_now(method)
        if before is None or before.addresses != now.addresses or not before.holds_the_same(now):
            self._forget(method)

    def _seen_now(self, method: str) -> Seen:
        return Seen.look(self.vae, self._publish(method), self.parked_from)

    def _publish(self, method: str) -> Published:
        """The network by its class, found anew where code was replaced since."""
        if self._twin.doubt:
            self._twin = published_twin(self.vae)
        known = self._published.get(method)
        if known is None or known.twin is not self._twin or known.code.reason or not known.code.unchanged():
            self._published[method] = known = Published.of(self._twin, method)
        return known

    def _forget(self, method: str) -> None:
        self._generation[method] += 1
        self._models = {key: model for key, model in self._models.items() if key[0] != method}
        self._fingerprints = {key: value for key, value in self._fingerprints.items() if key[0] != method}
