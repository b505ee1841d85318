"""Models, made once and copied for each test; the fake engine backend; one real engine directory."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn
from torch._inductor import config as inductor_config

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends import registry
from qwen_vae_accel.backends.eager import EagerBackend
from tests.helpers import ROOT, SIZES, TINY_VAE, FakeBackend, spread_gammas
from tests.numeric import THREADS

# Tests compute little at a time: more threads would cost several times what they save, most of all on a busy machine.
torch.set_num_threads(int(os.environ.get(THREADS, "1")))
# A package's host code only launches its kernels and takes twice as long to compile; the kernels stay as users get them.
inductor_config.aot_inductor.compile_wrapper_opt_level = "O0"

# Small, with every part of the real topology: three halvings, an attention, a shortcut where widths differ.
MICRO = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
# The same of Qwen-Image 2.1: four halvings, three of them of time too, shortcuts of averages and copies, RGBA.
MICRO_21 = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 6,
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 6,
    "latents_std": [1.0] * 6,
}
TOPOLOGIES = {
    "micro": ("AutoencoderKLQwenImage", MICRO),
    "rgba": ("AutoencoderKLQwenImage", {**MICRO, "input_channels": 4}),
    "two halvings": ("AutoencoderKLQwenImage", {**MICRO, "dim_mult": [1, 2, 4], "temperal_downsample": [False, True]}),
    "other widths": ("AutoencoderKLQwenImage", {**MICRO, "dim_mult": [1, 3, 2, 5], "num_res_blocks": 2, "z_dim": 6}),
    "wan 2.1": ("AutoencoderKLWan", {**MICRO}),
    "2.1": ("AutoencoderKLQwenImage21", MICRO_21),
    "2.1 other widths": (
        "AutoencoderKLQwenImage21",
        {**MICRO_21, "dim_mult": [1, 4, 2], "temperal_downsample": [True, False], "num_res_blocks": 2},
    ),
    "2.1 without shortcuts": (
        "AutoencoderKLQwenImage21",
        {**MICRO_21, "is_residual": False, "decoder_base_dim": 8, "dim_mult": [1, 2, 4], "temperal_downsample": [False, True]},
    ),
    "residual of 3-D convolutions": ("AutoencoderKLWan", {**MICRO, "is_residual": True}),
}


# Files that take a minute or more on two cores, the longest first: started last, one would run alone at the end.
LONGEST = (
    "tensorrt/test_build.py",
    "test_inductor.py",
    "kernels/test_float8.py",
    "test_qwen_image_21.py",
    "tensorrt/test_network.py",
    "kernels/test_network.py",
    "test_model.py",
    "test_bench.py",
    "test_demo.py",
    "test_examples.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with :data:`LONGEST`."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def random_vae(name: str = "micro") -> nn.Module:
    """A small VAE with random weights, always the same."""
    cls, config = TOPOLOGIES[name]
    if not hasattr(diffusers, cls):
        pytest.skip(f"diffusers {diffusers.__version__} has no {cls}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread_gammas(getattr(diffusers, cls)(**config)).eval()


@pytest.fixture
def no_grad() -> Iterator[None]:
    """As pipelines call the VAE; with gradients on, calls go the original way."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def _tiny() -> nn.Module:
    return AutoencoderKLQwenImage.from_pretrained(TINY_VAE, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def _micro() -> nn.Module:
    return random_vae()


@pytest.fixture
def tiny(_tiny: nn.Module) -> nn.Module:
    """The trained tiny VAE in float32, to do with what a test likes."""
    return copy.deepcopy(_tiny)


@pytest.fixture
def micro(_micro: nn.Module) -> nn.Module:
    """An even smaller random VAE, where only the machinery is tested."""
    return copy.deepcopy(_micro)


@pytest.fixture(scope="session")
def full() -> nn.Module:
    """A VAE of the published widths with random weights (508 MB): only to look at."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread_gammas(AutoencoderKLQwenImage()).eval().requires_grad_(False)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """An engine backend of milliseconds in place of the real ones; its name is ``tensorrt``."""
    backend = FakeBackend()
    monkeypatch.setattr(registry, "_BACKENDS", (backend, EagerBackend()))
    return backend


@pytest.fixture(scope="session")
def _engines(_micro: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fake") / "engines"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_BACKENDS", (FakeBackend(), EagerBackend()))
        with accelerate(_micro, backend="tensorrt", engine_dir=folder, sizes=SIZES, task="i2i") as handle:
            handle.warmup(progress=False)
    return folder


@pytest.fixture
def engines(_engines: Path, fake: FakeBackend, tmp_path: Path) -> Path:
    """Fake engines of ``micro``, encoders and decoders of :data:`SIZES`, as an earlier process would have left them."""
    return Path(shutil.copytree(_engines, tmp_path / "engines"))


@pytest.fixture(scope="session")
def inductor_dir(_tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real engines of the tiny VAE: a 64x64 decoder in ``static``, both networks for a range of sizes in ``dynamic``.

    The workers of a run share them: whoever comes second finds the first one's or waits for them, as services do.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "inductor"
    vae = copy.deepcopy(_tiny)
    for name, options in INDUCTOR.items():
        with accelerate(vae, engine_dir=root / name, **options) as handle:
            handle.warmup(progress=False)
    return root


INDUCTOR: dict[str, dict[str, object]] = {
    "static": {"backend": "inductor", "sizes": ["64x64"]},
    "dynamic": {"backend": "inductor", "task": "i2i", "sizes": ["48x48:64x64:96x128"], "multi_profile": True},
}
