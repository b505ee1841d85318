"""What several test modules need: inputs, references, the fake engine backend."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from qwen_vae_accel import Handle, accelerate
from qwen_vae_accel.accuracy import FACTOR, ROUNDING, Error, measure
from qwen_vae_accel.backends.base import EngineBackend, EngineImage, Environment, Job
from qwen_vae_accel.plan import EngineKey
from qwen_vae_accel.plugin.patch import owner_of

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data"
TINY_VAE = DATA / "tiny_qwen_image_vae"
CPU = torch.device("cpu")
# What the ready-made fake engines serve.
SIZES = ["32x32", "48x32", "64x32", "32x64"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def picture(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers in [-1, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def photo(name: str = "coffee", width: int = 256, height: int = 256) -> Tensor:
    """The middle of a photo as ``[1, 3, 1, height, width]`` in [-1, 1]."""
    image = Image.open(DATA / "photos" / f"{name}.png").convert("RGB")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1


def as_if_on(monkeypatch: pytest.MonkeyPatch, *half: str) -> None:
    """Have the CPU pass for one with instructions for the dtypes named ``half``, and for no other 16-bit dtype."""
    here = dataclasses.replace(Environment.detect(CPU), half_dtypes=half)
    monkeypatch.setattr(Environment, "detect", lambda device: here)


def moments(vae: nn.Module, x: Tensor) -> Tensor:
    """Mean and log-variance of ``vae.encode``."""
    return vae.encode(x).latent_dist.parameters


def decoded(vae: nn.Module, z: Tensor) -> Tensor:
    """The image of ``vae.decode``."""
    return vae.decode(z, return_dict=False)[0]


def distance(output: Tensor, reference: Tensor, method: str) -> float:
    """Largest difference, to show that two outputs are not the same: decoded in absolute terms, moments beside the largest."""
    scale = 1.0 if method == "decode" else reference.abs().max().item()
    return (output.float() - reference.float()).abs().max().item() / scale


def exact_vae(vae: nn.Module) -> nn.Module:
    """A copy of ``vae`` that computes everything in float64, as diffusers would but for its upsampling.

    That goes through float32 whatever its input; it copies pixels and computes nothing.
    """
    double = copy.deepcopy(vae).double()
    for module in double.modules():
        if isinstance(module, nn.Upsample):
            module.forward = functools.partial(nn.Upsample.forward, module)
    return double


def replaced_methods(processor: object) -> set[str]:
    """The methods of an image processor that are served by the plugin now."""
    return {name for name in ("preprocess", "postprocess") if owner_of(processor, name) is not None}


def state(processor: object) -> tuple[type, dict[str, object]]:
    """All that a trace could be left in: the class of an object, and what it holds."""
    return type(processor), dict(vars(processor))


class Reference:
    """What one network of diffusers computes for one input: in float64, and as the VAE is, whose error is the yardstick.

    Args:
        vae: a VAE, accelerated or not; it is copied.
        method: ``"encode"`` or ``"decode"``.
        x: the input as the VAE takes it, with or without the frame axis.
        dtype: compute dtype of the yardstick, if not the VAE's own.
        double: the float64 network ``[B, C, H, W] -> [B, C', H', W']``; None: a copy of the VAE.
    """

    def __init__(
        self,
        vae: nn.Module,
        method: str,
        x: Tensor,
        dtype: torch.dtype | None = None,
        double: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        run = moments if method == "encode" else decoded
        x = x.detach() if x.dim() == 5 else x.detach().unsqueeze(2)
        with torch.no_grad():
            plain = vae if double is not None and dtype is None else copy.deepcopy(vae)
            plain = plain if dtype is None else plain.to(dtype)
            rounded = x.to(plain.dtype)
            self.theirs = run(plain, rounded)[:, :, 0]
            if double is not None:
                self.exact = double(rounded[:, :, 0].double())
            else:
                self.exact = run(exact_vae(vae), rounded.double())[:, :, 0]
        self.yardstick = measure(self.theirs, self.exact)
        assert self.yardstick.relative <= ROUNDING[plain.dtype], "diffusers in float64 computes something else"

    def error(self, output: Tensor) -> Error:
        """How far ``output``, with or without the frame axis, is from float64."""
        return measure(output if output.dim() == 4 else output[:, :, 0], self.exact)

    def holds(self, output: Tensor) -> bool:
        """Whether ``output`` meets the criterion of :mod:`qwen_vae_accel.accuracy`."""
        return self.error(output).within(self.yardstick.allowed())

    def check(self, output: Tensor) -> None:
        """Assert it."""
        error = self.error(output)
        allowed = f"{error.times(self.yardstick):.2f} times diffusers' own error of {self.yardstick}"
        assert error.within(self.yardstick.allowed()), f"{error} is {allowed}; {FACTOR} is allowed"


def spread_gammas(vae: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the norms' gains around 1, so that one that is dropped or misplaced shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return vae


def latents(size: str, batch: int = 1, seed: int = 0) -> Tensor:
    """Latents of the ``micro`` VAE for an image of ``size``, WIDTHxHEIGHT."""
    width, height = map(int, size.split("x"))
    return randn(batch, 4, 1, height // 8, width // 8, seed=seed)


def image(size: str) -> Tensor:
    """An image of ``size``, WIDTHxHEIGHT."""
    width, height = map(int, size.split("x"))
    return picture(1, 3, 1, height, width)


def open_engines(vae: nn.Module, folder: Path, **config: object) -> Handle:
    """``accelerate`` with the engines of the ``engines`` fixture; what is missing there is an error."""
    config = {"backend": "tensorrt", "sizes": SIZES, "task": "i2i", "on_miss": "error", **config}
    return accelerate(vae, engine_dir=folder, **config)


class FakeProgram:
    """The exact network out of a fake engine file."""

    def __init__(self, backend: FakeBackend, size: int, network: nn.Module) -> None:
        self._backend = backend
        self._network = network
        self.nbytes = backend.nbytes or size

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
        with self._backend.lock:
            self._backend.running += 1
            self._backend.calls.append((tuple(x.shape), profile))
        try:
            if self._backend.on_run is not None:
                self._backend.on_run()
            return self._network(x) + self._backend.error
        finally:
            with self._backend.lock:
                self._backend.running -= 1


class FakeBackend(EngineBackend):
    """An engine backend that "compiles" in milliseconds: its file is the pickled network.

    It goes by the name of a backend that the configuration knows. Set the attributes to have it misbehave.

    Attributes:
        error: added to every output.
        nbytes: what a loaded program says it takes; 0: the size of its file.
        unavailable: what :meth:`reasons` answers.
        facts: what :meth:`identity` answers.
        fail_build, fail_load: raised there.
        on_build, on_load, on_run: called there, to wait or to look around.
        events: ``("build" | "load" | "free", path below the engine directory)`` in the order they happened.
        calls: shape of the input and profile of every run.
    """

    name: ClassVar[str] = "tensorrt"
    suffix: ClassVar[str] = ".fake"

    def __init__(self) -> None:
        self.error = 0.0
        self.nbytes = 0
        self.unavailable: list[str] = []
        self.facts = {"device_name": "fake", "package:fake": "1"}
        self.fail_build: Exception | None = None
        self.fail_load: Exception | None = None
        self.on_build: Callable[[], object] | None = None
        self.on_load: Callable[[], object] | None = None
        self.on_run: Callable[[], object] | None = None
        self.events: list[tuple[str, str]] = []
        self.calls: list[tuple[tuple[int, ...], int]] = []
        self.running = 0
        self.lock = threading.Lock()

    def engines(self, event: str) -> list[str]:
        """The engines that ``event`` happened to, in order."""
        return [name for kind, name in self.events if kind == event]

    def count(self, event: str) -> int:
        """How often ``event`` happened."""
        return len(self.engines(event))

    def reasons(self, environment: Environment, job: Job) -> list[str]:
        return list(self.unavailable)

    def identity(self, environment: Environment) -> dict[str, str]:
        return dict(self.facts)

    def build(self, model: nn.Module, job: Job, key: EngineKey, path: Path) -> None:
        self.events.append(("build", key.stem))
        if self.on_build is not None:
            self.on_build()
        if self.fail_build is not None:
            raise self.fail_build
        torch.save(model, path)

    def load(self, image: EngineImage, job: Job, key: EngineKey) -> FakeProgram:
        self.events.append(("load", key.stem))
        if self.on_load is not None:
            self.on_load()
        if self.fail_load is not None:
            raise self.fail_load
        program = FakeProgram(self, len(image.data), torch.load(io.BytesIO(image.data), weights_only=False))
        weakref.finalize(program, self.events.append, ("free", key.stem))
        return program
