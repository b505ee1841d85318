"""From a diffusers VAE to its image networks, kept true to the VAE's weights while they move or change.

The networks' weights are views of the VAE's own parameters wherever device and dtype allow; only the folded upsampling
kernels are new memory (2 % of the VAE). Before each use the parameters are compared with those that were seen last
(identity, address, version), which costs microseconds and catches ``.to()``, ``load_state_dict`` and assignment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwen_vae_accel.errors import UnsupportedVAEError
from qwen_vae_accel.model.custom import custom_module
from qwen_vae_accel.model.image_vae import ImageDecoder, ImageEncoder
from qwen_vae_accel.model.layers import State, under
from qwen_vae_accel.model.offload import Placement, is_plain, values
from qwen_vae_accel.model.topology import PARTS, Topology, inspect_vae
from qwen_vae_accel.visits import fork_safe_lock

_version = attrgetter("_version")
_requires_grad = attrgetter("requires_grad")


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


@dataclass(slots=True)
class _Seen:
    """The parameters of one network as they were at the last look; no versions where inference mode keeps none."""

    owners: list[dict[str, nn.Module | None]]
    names: list[str]
    modules: list[nn.Module]
    slots: list[dict[str, nn.Parameter | None]]
    slot_names: list[str]
    parameters: list[Tensor]
    plain: list[Tensor]  # those of them that have an address
    addresses: list[int]
    versions: list[int] | None
    dtypes: list[torch.dtype]
    spaces: list[dict[str, Any]]  # attributes of the VAE and its modules,
    forwards: list[Any]  # and their own forward, which every offloading hook replaces
    placement: Placement
    change: str = ""  # that made it another network
    custom: str = ""  # see custom_module,
    hooks: int = -1  # and how many hooks torch had made by then

    @classmethod
    def look(cls, vae: nn.Module, method: str, parked_from: torch.device | None = None) -> _Seen:
        children = [(vae._modules, part, child) for part in PARTS[method] if (child := getattr(vae, part, None)) is not None]
        for _, _, module in children:
            # The list grows while it is walked: children of children, to the leaves.
            children += [(module._modules, name, child) for name, child in module._modules.items() if child is not None]
        owners, names, modules = (list(column) for column in zip(*children, strict=True))
        slots = [
            (module._parameters, name)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        parameters: list[Tensor] = [slot[name] for slot, name in slots]
        plain = list(filter(is_plain, parameters))
        spaces = [vae.__dict__, *(module.__dict__ for module in modules)]
        return cls(
            owners=owners,
            names=names,
            modules=modules,
            slots=[slot for slot, _ in slots],
            slot_names=[name for _, name in slots],
            parameters=parameters,
            plain=plain,
            addresses=list(map(Tensor.data_ptr, plain)),
            versions=None if any(p.is_inference() for p in plain) else list(map(_version, plain)),
            dtypes=[p.dtype for p in parameters],
            spaces=spaces,
            forwards=_forwards(spaces),
            placement=Placement.of(vae, method, parked_from),
        )

    def structure(self) -> tuple[Any, ...]:
        """What parts and parameters there are."""
        return self.names, self.slot_names, [p.shape for p in self.parameters]

    def same_values(self, now: _Seen) -> bool:
        """Whether ``now`` differs from this in device and address only."""
        same_objects = len(self.parameters) == len(now.parameters) and all(map(is_, self.parameters, now.parameters))
        return same_objects and self.versions == now.versions and self.dtypes == now.dtypes

    def current(self) -> bool:
        """Whether nothing has changed since; a few microseconds."""
        plain = self.plain
        return (
            all(map(is_, map(dict.get, self.owners, self.names), self.modules))
            and all(map(is_, map(dict.get, self.slots, self.slot_names), self.parameters))
            and all(map(is_, _forwards(self.spaces), self.forwards))
            and list(map(Tensor.data_ptr, plain)) == self.addresses
            and (self.versions is None or list(map(_version, plain)) == self.versions)
        )


def _forwards(spaces: list[dict[str, Any]]) -> list[Any]:
    return list(map(dict.get, spaces, repeat("forward")))


class ModelSource:
    """Image networks of one VAE, made on demand and made again when the VAE's weights have changed.

    Args:
        vae: an ``AutoencoderKLQwenImage``, ``AutoencoderKLQwenImage21`` or Wan 2.1 ``AutoencoderKLWan``.
        folder: where facts measured of its weights are kept (``engines.calibration``); None: nowhere.

    Raises:
        UnsupportedVAEError: if ``vae`` has another topology.
    """

    def __init__(self, vae: nn.Module, folder: str | Path | None = None) -> None:
        self.vae = vae
        self.folder = None if folder is None else Path(folder).expanduser().absolute()
        self.topology: Topology = inspect_vae(vae)
        self.parked_from: torch.device | None = None  # see Placement.of
        self._lock = fork_safe_lock()
        self._seen: dict[str, _Seen] = {}
        self._structures = {method: _Seen.look(vae, method).structure() for method in PARTS}
        self._generation = {"encode": 0, "decode": 0}
        self._models: dict[tuple[str, torch.dtype, torch.device], ImageEncoder | ImageDecoder] = {}
        self._fingerprints: dict[tuple[str, torch.dtype], str] = {}

    @property
    def config(self) -> dict[str, Any]:
        """The VAE's configuration; empty where it has none."""
        return dict(getattr(self.vae, "config", {}) or {})

    def placement(self, method: str) -> Placement:
        """Where and in which dtype the network of ``method`` computes; looks at its weights now."""
        return self.glance(method)[1]

    def generation(self, method: str) -> int:
        """A number that grows whenever the weights behind ``method`` have changed; looks at them now."""
        seen = self._seen.get(method)
        if seen is None or not seen.current():
            with self._lock:
                self._look(method)
                self._forget(method)
        return self._generation[method]

    def glance(self, method: str) -> tuple[int, Placement]:
        """:meth:`generation`, and where and in which dtype the network computes."""
        return self.generation(method), self._seen[method].placement

    def requires_grad(self, method: str) -> bool:
        """Whether a gradient of the network's weights can be asked for, as :meth:`generation` saw them last."""
        return any(map(_requires_grad, self._seen[method].parameters))

    def custom(self, method: str) -> str:
        """Why the network of ``method`` is no longer the one that is known, or does more than that; empty if it is.

        Weights are as :meth:`generation` saw them last. Every hook that torch makes moves a counter, so hooks cost nothing to
        look for. A ``forward`` that is patched later is found when either changes.
        """
        seen = self._seen[method]
        if seen.custom or seen.hooks != RemovableHandle.next_id:
            seen.hooks = RemovableHandle.next_id
            seen.custom = custom_module(self.vae, seen.modules)
        return seen.change or seen.custom or seen.placement.reason

    def moved(self) -> None:
        """Tell that the VAE's parameters were replaced by ``.to()``; a change of device alone is no new generation."""
        with self._lock:
            self._models.clear()
            for method, before in list(self._seen.items()):
                if not before.same_values(self._look(method)):
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
            UnsupportedVAEError: if the VAE was changed into another network since.
        """
        self.generation(method)
        change = self._seen[method].change
        if change:
            raise UnsupportedVAEError(type(self.vae).__name__, [change])
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

    def _look(self, method: str) -> _Seen:
        seen = _Seen.look(self.vae, method, self.parked_from)
        if seen.structure() != self._structures[method]:
            try:
                topology = inspect_vae(self.vae)
            except UnsupportedVAEError as error:
                seen.change = f"the VAE was changed after accelerate(): {'; '.join(error.reasons)}"
            else:
                if topology != self.topology:
                    seen.change = f"the VAE was changed after accelerate(): from {self.topology} to {topology}"
        self._seen[method] = seen
        return seen

    def _forget(self, method: str) -> None:
        self._generation[method] += 1
        self._models = {key: model for key, model in self._models.items() if key[0] != method}
        self._fingerprints = {key: value for key, value in self._fingerprints.items() if key[0] != method}
