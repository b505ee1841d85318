"""The node with a stand-in for ComfyUI's VAE, written after what its source does; ``test_engine.py`` has the real one."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen_vae_accel.errors import BackendUnavailableError, ConfigError, UnsupportedVAEError
from qwen_vae_accel.plugin.methods import handle_of
from tests.comfyui.conftest import FOLDER
from tests.helpers import ROOT, Reference, photo, randn
from tests.programs import ComfyVAE

pytestmark = pytest.mark.usefixtures("no_grad", "comfy_modules")
MIB = 2**20
# What ComfyUI itself takes for an image, in bytes; it says 7000 and 6000 in older releases.
THEIRS = {"decode": 2200, "encode": 1500}


class Patcher:
    """Loads and unloads a model; copies of it, for the same model, have the same callbacks and more."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.callbacks: dict[str, list[Callable[..., object]]] = {}

    def clone(self) -> Patcher:
        made = Patcher(self.model)
        made.callbacks = copy.copy(self.callbacks)
        return made

    def add_callback(self, kind: str, callback: Callable[..., object]) -> None:
        self.callbacks.setdefault(kind, []).append(callback)

    def detach(self, unpatch_all: bool = True) -> None:
        for callback in self.callbacks.get("on_detach_after", ()):
            callback(self, unpatch_all)


class VAE:
    def __init__(self, model: nn.Module) -> None:
        self.first_stage_model: Any = model
        self.patcher = Patcher(model)
        self.memory_used_decode = lambda shape, dtype: THEIRS["decode"] * shape[3] * shape[4] * 64 * dtype.itemsize
        self.memory_used_encode = lambda shape, dtype: THEIRS["encode"] * shape[3] * shape[4] * dtype.itemsize

    def decode(self, samples: Tensor) -> Tensor:
        self.patcher.detach(unpatch_all=False)  # as it is loaded, again
        return ((self.first_stage_model.decode(samples) + 1) / 2).clamp(0, 1).movedim(1, -1)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.first_stage_model.encode(pixels.movedim(-1, 1).unsqueeze(2) * 2 - 1)

    def decode_tiled(self, samples: Tensor) -> Tensor:
        return self.decode_tiled_3d(samples)

    def decode_tiled_3d(self, samples: Tensor) -> Tensor:
        return self.first_stage_model.decode(samples)


@pytest.fixture
def comfy_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the node imports of ComfyUI."""
    extension: Any = ModuleType("comfy.patcher_extension")
    extension.CallbacksMP = SimpleNamespace(ON_DETACH="on_detach_after")
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)


@pytest.fixture
def run(node: ModuleType) -> Callable[..., Any]:
    """The node's function on a VAE; its only output."""
    cls = node.NODE_CLASS_MAPPINGS["QwenVAEAccelerate"]

    def run(vae: Any, **options: Any) -> Any:
        outputs = getattr(cls(), cls.FUNCTION)(vae, **options)
        assert len(outputs) == len(cls.RETURN_TYPES) == 1
        return outputs[0]

    return run


def calls(vae: VAE) -> dict[str, dict[str, int]]:
    return handle_of(vae.first_stage_model).report().as_dict()["calls"]


def test_images_are_the_same_and_the_given_vae_stays(run, tiny):
    vae = VAE(ComfyVAE(tiny))
    kind, held = type(vae.first_stage_model), dict(vars(vae))
    fast = run(vae)
    x, z = photo(width=32, height=32), randn(2, 16, 1, 4, 6)
    decode, encode = Reference(tiny, "decode", z), Reference(tiny, "encode", x)
    encode.exact, encode.theirs = encode.exact.chunk(2, dim=1)[0], encode.theirs.chunk(2, dim=1)[0]
    decode.check(fast.decode(z).movedim(-1, 1) * 2 - 1)
    encode.check(fast.encode((x[:, :, 0].movedim(1, -1) + 1) / 2))
    assert calls(fast) == {"encode": {"eager": 1}, "decode": {"eager": 1}}
    vae.decode(z[:1])
    assert calls(fast)["decode"] == {"eager": 1}
    assert vars(vae) == held and type(vae.first_stage_model) is kind and not vae.patcher.callbacks
    assert fast.patcher.model is vae.first_stage_model, "ComfyUI moves the weights of both at once"


def test_networks_go_when_the_model_is_unloaded_and_stay_when_it_is_loaded_again(run, tiny):
    fast = run(VAE(ComfyVAE(tiny)))
    z = randn(1, 16, 1, 2, 2)
    first = fast.decode(z)
    routes = handle_of(fast.first_stage_model)._dispatcher._routes
    fast.patcher.detach(unpatch_all=False)
    assert routes
    fast.patcher.detach()
    assert not routes
    assert torch.equal(fast.decode(z), first) and calls(fast)["decode"] == {"eager": 2}


def test_tiles_and_video_are_left_to_comfyui(run, tiny):
    vae = VAE(ComfyVAE(tiny))
    fast = run(vae)
    z = randn(1, 16, 2, 2, 2)
    assert torch.equal(fast.decode_tiled(z[:, :, :1]), vae.decode_tiled(z[:, :, :1])) and calls(fast)["decode"] == {}
    assert torch.equal(fast.decode(z), vae.decode(z)) and calls(fast)["decode"] == {"host": 1}
    shape = (1, 16, 2, 90, 160)
    assert fast.memory_used_decode(shape, torch.float16) == vae.memory_used_decode(shape, torch.float16)


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_the_estimates_hold_all_that_was_measured(node, card):
    module = sys.modules[f"{node.__name__}.accelerate_vae"]
    estimates = {
        "decode": module._estimate(lambda shape, dtype: float("inf"), module.DECODE, 8),
        "encode": module._estimate(lambda shape, dtype: float("inf"), module.ENCODE, 1),
    }
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{card}.json").read_text("utf-8"))["rows"]
    plain = {(row["task"], row["size"]): row["peak_mib"] for row in rows if row["method"] == "diffusers"}
    ours = [row for row in rows if row["method"] in ("eager", "fused", "inductor-mp") and not row["error"]]
    weights = 242  # MiB of the VAE, which ComfyUI counts as the model's
    assert len(ours) >= 60
    for row in ours:
        width, height = map(int, row["size"].split("x"))
        scale = 8 if row["task"] == "decode" else 1
        estimate = estimates[row["task"]]((1, 16, 1, height // scale, width // scale), torch.bfloat16) / MIB
        taken = row["peak_mib"] - weights
        assert taken <= estimate, row
        assert estimate < 0.7 * (plain[row["task"], row["size"]] - weights)


def test_an_estimate_of_comfyui_that_is_less_is_taken(run, tiny):
    vae = VAE(ComfyVAE(tiny))
    vae.memory_used_decode = lambda shape, dtype: 1.0
    fast = run(vae)
    assert fast.memory_used_decode((1, 16, 1, 128, 128), torch.float32) == 1.0
    large = (1, 3, 1, 2048, 2048)
    assert fast.memory_used_encode(large, torch.float32) < vae.memory_used_encode(large, torch.float32)


def test_what_cannot_be_done_is_said_at_once(run, tiny, tmp_path):
    class Other:
        first_stage_model = nn.Linear(1, 1)

    with pytest.raises(UnsupportedVAEError, match="cannot accelerate Linear"):
        run(Other())
    with pytest.raises(BackendUnavailableError, match="fused"):
        run(VAE(ComfyVAE(tiny)), backend="fused")
    with pytest.raises(ConfigError, match="give engine_dir"):
        run(VAE(ComfyVAE(tiny)), backend="inductor", engine_dir=" ")


def test_the_folder_is_laid_out_for_the_registry(node):
    tomllib = pytest.importorskip("tomllib")
    about = tomllib.loads((FOLDER / "pyproject.toml").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert about["project"]["name"] == project["name"] and about["project"]["license"] == {"text": project["license"]}
    assert {"PublisherId", "DisplayName"} <= about["tool"]["comfy"].keys()
    from qwen_vae_accel import __version__

    assert about["project"]["version"] == __version__
    assert about["project"]["dependencies"] == [f"{project['name']}>={__version__}"]
    assert node.NODE_CLASS_MAPPINGS.keys() == node.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert node.NODE_DISPLAY_NAME_MAPPINGS["QwenVAEAccelerate"] == about["tool"]["comfy"]["DisplayName"]
    assert (FOLDER / "README.md").is_file()


def test_its_inputs_are_those_of_its_function(node):
    cls = node.NODE_CLASS_MAPPINGS["QwenVAEAccelerate"]
    inputs = cls.INPUT_TYPES()
    assert list(inputs["required"]) == ["vae"] and set(inputs["optional"]) == {"backend", "engine_dir"}
    names, options = inputs["optional"]["backend"]
    assert options["default"] == names[0] == "auto"
