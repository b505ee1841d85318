"""What TensorRT is handed, computed without it: both networks of both VAEs against the exact ones in float64.

The measure is an error to what diffusers' own VAE computes in float64. A network may have :data:`FACTOR` times the error of
diffusers' own computation in the network's dtype: that is the same demand on every machine.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.tensorrt import build
from qwen_vae_accel.backends.tensorrt.crossbuild import torch_tensorrt_for
from qwen_vae_accel.backends.tensorrt.flavour import Flavour
from qwen_vae_accel.backends.tensorrt.network import Network, NetworkError, NetworkProgram
from qwen_vae_accel.backends.tensorrt.settings import BuildSettings
from qwen_vae_accel.cli.app import app
from qwen_vae_accel.engines import networkcheck
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.errors import EngineRefusedError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.plan import MULTI_PROFILE, EngineKey
from qwen_vae_accel.sizes import GUIDE_PROFILES, Profile, Size
from tests.conftest import MICRO, MICRO_21
from tests.helpers import CPU, picture, randn, spread_gammas
from tests.tensorrt.conftest import job_of

FACTOR = 2.0
# One halving each: every kind of part, and a third of the time that three take to convert.
SMALL = {
    "Qwen-Image": ("AutoencoderKLQwenImage", {**MICRO, "dim_mult": [1, 2], "temperal_downsample": [False]}),
    "Qwen-Image 2.1": ("AutoencoderKLQwenImage21", {**MICRO_21, "dim_mult": [2, 1], "temperal_downsample": [True]}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def small_vae(name: str) -> nn.Module:
    cls, config = SMALL[name]
    if not hasattr(diffusers, cls):
        pytest.skip(f"diffusers {diffusers.__version__} has no {cls}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread_gammas(getattr(diffusers, cls)(**config)).eval().requires_grad_(False)


def nine_small_profiles() -> tuple[Profile, ...]:
    """The guide's nine at a 32nd of their sides, from half of the optimum to one and a half."""
    profiles = []
    for name, size in GUIDE_PROFILES.items():
        low, best, high = (Size(int(size.width * part) // 32, int(size.height * part) // 32).floor(4) for part in (0.5, 1, 1.5))
        profiles.append(Profile(name, low, best, high))
    return tuple(profiles)


@dataclass
class Handed:
    """A converted network, what it was converted from, and what is expected of it."""

    vae: nn.Module
    job: Job
    key: EngineKey
    interpreter: Any
    chunks: int
    trt: ModuleType

    def read(self) -> NetworkProgram:
        return NetworkProgram(Network(self.trt, self.interpreter.ctx.net))

    def input(self, size: Size) -> Tensor:
        shape = (1, self.job.in_channels, *self.job.input_hw(size))
        return (randn(*shape) if self.job.method == "decode" else picture(*shape)).to(self.job.dtype)

    def diffusers(self, dtype: torch.dtype, x: Tensor) -> Tensor:
        vae: Any = copy.deepcopy(self.vae).to(dtype)
        with torch.no_grad():
            video = x.to(dtype)[:, :, None]
            encode = self.job.method == "encode"
            y = vae.encode(video).latent_dist.parameters if encode else vae.decode(video, return_dict=False)[0]
        return y[:, :, 0].double()

    def ratio(self, network: NetworkProgram, size: Size) -> float:
        """Error of the network, in errors of diffusers in the same dtype."""
        x = self.input(size)
        exact = self.diffusers(torch.float64, x)
        output = network(x)
        assert output.dtype == self.job.dtype and output.shape == exact.shape
        allowed = (self.diffusers(self.job.dtype, x) - exact).norm().item()
        return (output.double() - exact).norm().item() / allowed


@pytest.fixture(scope="session")
def handed(rtx: Flavour) -> Callable[..., Handed]:
    """Convert as a build does, up to the point where TensorRT would take over."""
    made: dict[tuple[object, ...], Handed] = {}

    def convert(name: str, method: str, dtype: str, profiles: tuple[Profile, ...]) -> Handed:
        place = name, method, dtype, profiles
        if place not in made:
            vae, trt = small_vae(name), rtx.bindings()
            source = ModelSource(vae)
            job, key = job_of(source, method, DTYPES[dtype]), EngineKey(method, MULTI_PROFILE, profiles)
            pixels = max(p.maximum.width * p.maximum.height for p in profiles) // source.topology.scale**2
            settings = BuildSettings(query_limit=pixels // 2 - 1)  # runs of queries: three
            with torch_tensorrt_for((8, 9)) as torch_tensorrt:
                model = source.model(method, job.dtype, CPU)
                interpreter, _, chunks = build.convert(model, job, key, torch_tensorrt, trt, settings)
            made[place] = Handed(vae, job, key, interpreter, chunks, trt)
        return made[place]

    return convert


EVERY = list(itertools.product(SMALL, ("decode", "encode"), DTYPES))
# A fixed size is the easier of the two: one dtype each; a range, the others. float32 shows the most.
STATIC = [
    ("Qwen-Image", "decode", "float32"),
    ("Qwen-Image", "encode", "bfloat16"),
    ("Qwen-Image 2.1", "decode", "bfloat16"),
    ("Qwen-Image 2.1", "encode", "float16"),
]
RANGES = [case for case in EVERY if case not in STATIC or case[2] == "float32"]


@pytest.mark.parametrize(("name", "method", "dtype"), RANGES)
def test_nine_profiles_at_both_ends_and_the_middle(
    handed: Callable[..., Handed], name: str, method: str, dtype: str, record_property: Callable[[str, object], None]
) -> None:
    made = handed(name, method, dtype, nine_small_profiles())
    assert made.chunks == 3, "the attention runs in chunks"
    network = made.read()
    profiles = nine_small_profiles()
    assert len(profiles) == 9
    ratios = {}
    for profile in profiles:
        for size in (profile.minimum, profile.optimum, profile.maximum):
            ratios[str(size)] = made.ratio(network, size)
    record_property("worst ratio", max(ratios.values()))
    assert {size: ratio for size, ratio in ratios.items() if not ratio <= FACTOR} == {}


FIXED = (Profile.static("36x28", Size(36, 28)),)


@pytest.mark.parametrize(("name", "method", "dtype"), STATIC)
def test_a_fixed_size(handed: Callable[..., Handed], name: str, method: str, dtype: str) -> None:
    made = handed(name, method, dtype, FIXED)
    assert made.chunks == 3
    assert made.ratio(made.read(), FIXED[0].optimum) <= FACTOR


# Faults. Each leaves all shapes and types as they are, so only the values show it.


def _layers(made: Handed, kind: str) -> Iterator[Any]:
    trt, net = made.trt, made.interpreter.ctx.net
    for index in range(net.num_layers):
        layer = net.get_layer(index)
        if trt.ILayer.type.__get__(layer).name == kind.upper().replace(" ", "_"):
            layer.__class__ = getattr(trt, "I" + kind.replace(" ", "") + "Layer")
            yield layer


def _swap_axes(made: Handed) -> Callable[[], None]:
    """Rows for columns within the blocks of a pixel shuffle."""
    layer = next(layer for layer in _layers(made, "Shuffle") if tuple(layer.second_transpose)[:6] == (0, 1, 4, 2, 5, 3))
    layer.second_transpose = (0, 1, 4, 3, 5, 2)
    return lambda: setattr(layer, "second_transpose", (0, 1, 4, 2, 5, 3))


def _shift_padding(made: Handed) -> Callable[[], None]:
    """One zero too many above, one too few below."""
    layer = next(layer for layer in _layers(made, "Convolution") if tuple(layer.pre_padding) == (1, 1))
    layer.pre_padding, layer.post_padding = (2, 1), (0, 1)

    def undo() -> None:
        layer.pre_padding, layer.post_padding = (1, 1), (1, 1)

    return undo


def _halve_a_constant(made: Handed) -> Callable[[], None]:
    """A gain of a norm, or a scale of the attention."""
    layer = next(layer for layer in _layers(made, "Constant") if layer.weights.size == 8 and layer.weights.dtype == "float32")
    before = layer.weights
    after = before * 0.5
    layer.weights = after
    made.interpreter.kept = after  # TensorRT does not own it
    return lambda: setattr(layer, "weights", before)


def _forget_a_bias(made: Handed) -> Callable[[], None]:
    layer = next(layer for layer in _layers(made, "Convolution") if layer.bias.size)
    before = layer.bias
    made.interpreter.kept = before * 0
    layer.bias = made.interpreter.kept
    return lambda: setattr(layer, "bias", before)


def _maximum_for_mean(made: Handed) -> Callable[[], None]:
    layer = next(layer for layer in _layers(made, "Reduce") if layer.op == made.trt.ReduceOperation.AVG)
    layer.op = made.trt.ReduceOperation.MAX
    return lambda: setattr(layer, "op", made.trt.ReduceOperation.AVG)


def _softmax_over_queries(made: Handed) -> Callable[[], None]:
    layer = next(_layers(made, "SoftMax"))
    before = layer.axes
    layer.axes = before >> 1
    return lambda: setattr(layer, "axes", before)


FAULTS = [_swap_axes, _shift_padding, _halve_a_constant, _forget_a_bias, _maximum_for_mean, _softmax_over_queries]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__.strip("_"))
def test_a_planted_fault_is_found(handed: Callable[..., Handed], plant: Callable[[Handed], Callable[[], None]]) -> None:
    made = handed(*STATIC[0], FIXED)
    undo = plant(made)
    try:
        network = made.read()
    finally:
        undo()
    assert made.ratio(network, FIXED[0].optimum) > 100
    with pytest.raises(EngineRefusedError, match="its network is not the exact model's at 36x28: relative error"):
        networkcheck.check(ModelSource(made.vae), made.job, EngineKey("decode", "36x28", FIXED), network, Path("e.trt"))
    assert made.ratio(made.read(), FIXED[0].optimum) <= FACTOR, "the fault is gone again"


# The check of a build for another machine.


@pytest.fixture(scope="module")
def command(rtx: Flavour, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build one decoder of a small VAE for another machine, but for the engine directory."""
    folder = tmp_path_factory.mktemp("vae")
    vae: Any = small_vae("Qwen-Image")
    vae.save_pretrained(folder)
    place = ["--vae", str(folder), "--sizes", "64x64", "--method", "decode"]
    return ["build", *place, "--backend", "tensorrt", "--compute-capability", "8.9", "--dtype", "fp32", "--json"]


def test_a_build_for_another_machine_refuses_a_wrong_network(
    rtx: Flavour, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = build.convert

    def faulty(*arguments: Any) -> Any:
        interpreter, recorder, chunks = convert(*arguments)
        made = Handed(nn.Identity(), arguments[1], arguments[2], interpreter, chunks, rtx.bindings())
        _shift_padding(made)
        return interpreter, recorder, chunks

    monkeypatch.setattr(build, "convert", faulty)
    result = CliRunner().invoke(app, [*command, "--engine-dir", str(tmp_path / "e")])
    assert result.exit_code == 1 and "its network is not the exact model's at 64x64" in result.output
    assert EngineStore(tmp_path / "e").manifest().engines == {}
    assert not list((tmp_path / "e").glob("**/*.trt"))


def test_a_network_that_is_not_known_is_refused_unless_nothing_is_to_be_verified(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(trt: ModuleType, definition: object) -> Network:
        raise NetworkError("layer 'x' (EINSUM): layers of this kind are not known here")

    monkeypatch.setattr(build, "Network", unknown)
    folder = ["--engine-dir", str(tmp_path / "e")]
    result = CliRunner().invoke(app, [*command, *folder])
    assert result.exit_code == 1 and "layer 'x' (EINSUM)" in result.output
    assert EngineStore(tmp_path / "e").manifest().engines == {}
    config = tmp_path / "config.json"
    config.write_text('{"verify": false}')
    result = CliRunner().invoke(app, [*command, *folder, "--config", str(config)])
    assert result.exit_code == 0, result.output
    (records,) = EngineStore(tmp_path / "e").manifest().engines.values()
    assert records[0].verification == {}


@pytest.mark.parametrize(
    ("profile", "size", "says"),
    [
        (Profile.static("1_1", Size(1328, 1328)), Size(1328, 1328), "network checked at 1328x1328"),
        (Profile("p", Size(256, 256), Size(512, 512), Size(768, 768)), Size(512, 512), "network checked at 512x512"),
        (
            Profile("p", Size(512, 512), Size(1024, 1024), Size(1536, 1536)),
            Size(512, 512),
            "network checked at 512x512, not at the optimum 1024x1024",
        ),
    ],
)
def test_a_large_range_is_checked_at_its_minimum_and_says_so(profile: Profile, size: Size, says: str) -> None:
    assert networkcheck.size_checked(profile) == size
    assert networkcheck._where(profile) == says


def test_shapes_are_checked_at_every_end(handed: Callable[..., Handed]) -> None:
    made = handed(*RANGES[0], nine_small_profiles())
    network, key = made.read(), made.key
    seen: list[tuple[int, ...]] = []

    class Watching:
        nbytes = 0

        def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
            if x.is_meta:
                seen.append(tuple(x.shape[2:]))
                if len(seen) == 27:
                    return network(x)[:, :, 1:]
            return network(x, profile)

    with pytest.raises(EngineRefusedError, match="its network does not run at .*: it gives .*, expected"):
        networkcheck.check(ModelSource(made.vae), made.job, key, Watching(), Path("e.trt"))
    ends = [size for p in key.profiles for size in (p.minimum, p.optimum, p.maximum)]
    assert seen == [made.job.input_hw(size) for size in ends]
