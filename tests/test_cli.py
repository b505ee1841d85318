"""The command line: what it does, what it prints, how it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from filelock import FileLock

from qwen_vae_accel import AccelConfig, __version__
from qwen_vae_accel.backends.base import Environment
from qwen_vae_accel.engines.manifest import NAME
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.errors import UnsupportedVAEError
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.loading import load_vae, random_vae, stored_dtype, vae_folder
from tests.conftest import MICRO, SIZES
from tests.helpers import CPU, ROOT, TINY_VAE, FakeBackend
from tests.processes import dead_signature

if TYPE_CHECKING:
    from tests.fixtures_cli import Cli

pytest_plugins = ["tests.fixtures_cli"]

ENGINES = {f"{size}/vae_{network}.fake" for size in SIZES for network in ("encoder", "decoder")}
DECODER, ENCODER = "32x32/vae_decoder.fake", "32x32/vae_encoder.fake"


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def keep(engines: Path, *names: str) -> None:
    """Remove all other engines: self-checks of eight take seconds."""
    for name in ENGINES - set(names):
        EngineStore(engines).remove(name)


def by_path(document: dict) -> dict[str, dict]:
    return {entry["path"]: entry for entry in document["engines"]}


# build


def test_build_keeps_what_is_current(cli: Cli, fake: FakeBackend, micro_folder: Path, tmp_path: Path) -> None:
    arguments = ("build", "--vae", micro_folder, "--backend", "tensorrt", "--engine-dir", tmp_path, "--json")
    first = cli(*arguments, "--sizes", "32x32")
    assert first.code == 0
    assert {path: entry["status"] for path, entry in by_path(first.document).items()} == {ENCODER: "built", DECODER: "built"}
    assert (tmp_path / DECODER).stat().st_size == by_path(first.document)[DECODER]["bytes"]
    second = cli(*arguments, "--sizes", "32x32,48x32", "--method", "decode")
    assert {path: entry["status"] for path, entry in by_path(second.document).items()} == {
        DECODER: "current",
        "48x32/vae_decoder.fake": "built",
    }
    assert fake.count("build") == 3


def test_build_goes_on_after_a_failure(cli: Cli, fake: FakeBackend, micro_folder: Path, tmp_path: Path) -> None:
    def fail_once() -> None:
        fake.on_build = None
        raise RuntimeError("no workspace")

    fake.on_build = fail_once
    arguments = ("build", "--vae", micro_folder, "--backend", "tensorrt", "--engine-dir", tmp_path, "--sizes", "32x32,48x32")
    result = cli(*arguments, "--method", "decode", "--json")
    assert result.code == 1
    engines = by_path(result.document)
    assert engines[DECODER]["status"] == "failed"
    assert "no workspace" in engines[DECODER]["reason"]
    assert engines["48x32/vae_decoder.fake"]["status"] == "built"
    assert cli(*arguments).code == 0


def test_build_reads_a_config_file_and_options_override_it(
    cli: Cli, fake: FakeBackend, micro_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(AccelConfig(backend="tensorrt", engine_dir=tmp_path / "a", sizes=["32x32"], on_miss="error").to_json())
    result = cli("build", "--vae", micro_folder, "--config", file, "--engine-dir", tmp_path / "b", "--json")
    assert result.document["engine_dir"] == str(tmp_path / "b")
    assert set(by_path(result.document)) == {ENCODER, DECODER}


def test_auto_builds_with_the_first_backend_that_can(cli: Cli, fake: FakeBackend, micro_folder: Path, tmp_path: Path) -> None:
    arguments = ("build", "--vae", micro_folder, "--engine-dir", tmp_path, "--sizes", "32x32", "--json")
    assert cli(*arguments).document["backend"] == "tensorrt"
    fake.unavailable = ["no such GPU"]
    result = cli(*arguments)
    assert result.code == 1
    assert result.document["error"]["reasons"] == ["tensorrt: no such GPU"]


# list


def test_list_tells_what_is_there(cli: Cli, engines: Path, micro_folder: Path) -> None:
    result = cli("list", "--engine-dir", engines, "--vae", micro_folder, "--json")
    assert result.code == 0
    found = by_path(result.document)
    assert set(found) == ENGINES
    assert found[DECODER]["current"]
    assert found[DECODER]["checks"]["32x32"]["passed"]
    assert found[DECODER]["profiles"] == [{"name": "32x32", "min": "32x32", "opt": "32x32", "max": "32x32"}]
    assert DECODER in cli("list", "--engine-dir", engines).stdout


def test_list_tells_why_an_engine_would_not_run(cli: Cli, engines: Path, fake: FakeBackend, other_folder: Path) -> None:
    flip(engines / DECODER)
    (engines / ENCODER).unlink()
    shutil.copytree(engines / "48x32", engines / "16x16")
    result = cli("list", "--engine-dir", engines, "--json")
    assert result.code == 1
    found = by_path(result.document)
    assert found[DECODER]["reasons"][0].startswith("damaged")
    assert found[ENCODER]["reasons"] == ["the file is gone"]
    assert "adopt --trust" in found["16x16/vae_decoder.fake"]["reasons"][0]
    assert found["48x32/vae_decoder.fake"]["current"]
    fake.facts = {**fake.facts, "device_name": "another"}
    found = by_path(cli("list", "--engine-dir", engines, "--vae", other_folder, "--json").document)
    reasons = found["48x32/vae_decoder.fake"]["reasons"]
    assert [text.split(":")[0] for text in reasons] == ["weights", "device_name"]


# verify


def test_verify_runs_the_engines_against_the_exact_model(
    cli: Cli, engines: Path, fake: FakeBackend, micro_folder: Path
) -> None:
    keep(engines, DECODER, ENCODER)
    arguments = ("verify", "--engine-dir", engines, "--vae", micro_folder)
    result = cli(*arguments, "--json")
    assert result.code == 0
    assert len(fake.calls) == 2
    assert float(by_path(result.document)[DECODER]["checks"]["32x32"]["psnr_db"]) > 120
    fake.error = 0.5
    result = cli(*arguments, "--json")
    assert result.code == 1
    assert not any(entry["good"] for entry in result.document["engines"])
    # The result is kept: the engine would not be run now.
    assert "self-check" in by_path(cli("list", "--engine-dir", engines, "--json").document)[DECODER]["reasons"][0]
    fake.error = 0.0
    assert cli(*arguments).code == 0


def test_verify_never_loads_a_damaged_engine(cli: Cli, engines: Path, fake: FakeBackend, micro_folder: Path) -> None:
    keep(engines, DECODER, ENCODER)
    flip(engines / DECODER)
    result = cli("verify", "--engine-dir", engines, "--vae", micro_folder, "--json")
    assert result.code == 1
    assert [entry["path"] for entry in result.document["engines"] if not entry["good"]] == [DECODER]
    assert ("load", "32x32/vae_decoder") not in fake.events


# prune


def test_prune_removes_only_when_told(cli: Cli, engines: Path, fake: FakeBackend) -> None:
    flip(engines / DECODER)
    folder = engines / ".tmp"
    folder.mkdir(exist_ok=True)
    left = folder / f"16_9.vae_decoder.fake.{dead_signature()}.fake"
    busy = folder / f"64x32.vae_decoder.fake.{dead_signature()}.fake"
    unknown = engines / "16x16" / "vae_decoder.fake"
    unknown.parent.mkdir()
    for file in (left, busy, unknown):
        file.write_bytes(b"x" * 10)
    with FileLock(engines / ".locks" / "64x32.vae_decoder.fake.lock"):
        dry = cli("prune", "--engine-dir", engines, "--json")
        assert dry.code == 0
        expected = {str(left), str(engines / DECODER)}
        assert {entry["path"] for entry in dry.document["files"]} == expected
        assert left.exists()
        assert (engines / DECODER).exists()
        done = cli("prune", "--engine-dir", engines, "--yes", "--json")
    assert {entry["path"] for entry in done.document["files"]} == expected
    assert not left.exists()
    assert not (engines / DECODER).exists()
    assert busy.exists()
    assert unknown.exists()
    assert set(EngineStore(engines).manifest().engines) == ENGINES - {DECODER}


def test_prune_removes_what_is_not_planned(cli: Cli, engines: Path, fake: FakeBackend) -> None:
    cli("prune", "--engine-dir", engines, "--sizes", "32x32,48x32", "--method", "decode", "--yes")
    assert set(EngineStore(engines).manifest().engines) == {DECODER, "48x32/vae_decoder.fake"}


def test_prune_touches_nothing_outside(cli: Cli, engines: Path, fake: FakeBackend) -> None:
    victim = engines.parent / "victim.txt"
    victim.write_text("mine")
    document = json.loads((engines / NAME).read_text())
    document["engines"] |= {"../victim.txt": document["engines"][DECODER], str(victim): document["engines"][DECODER]}
    (engines / NAME).write_text(json.dumps(document))
    result = cli("prune", "--engine-dir", engines, "--yes")
    assert result.code == 1
    assert "adopt --trust --engine-dir" in result.stderr
    assert victim.exists()
    assert (engines / DECODER).exists()


# adopt


def test_adopt_needs_trust_and_a_self_check(
    cli: Cli, engines: Path, fake: FakeBackend, micro_folder: Path, other_folder: Path
) -> None:
    keep(engines, DECODER, ENCODER)
    (engines / "manifest.json").unlink()
    arguments = ("adopt", "--engine-dir", engines, "--json")
    refused = cli(*arguments, "--vae", micro_folder)
    assert refused.code == 1
    assert "--trust" in refused.document["error"]["message"]
    assert fake.count("load") == 0
    wrong = cli(*arguments, "--vae", other_folder, "--trust")
    assert wrong.code == 1
    assert not any(entry["adopted"] for entry in wrong.document["engines"])
    assert EngineStore(engines).manifest().engines == {}
    taken = cli(*arguments, "--vae", micro_folder, "--trust")
    assert taken.code == 0
    assert {entry["path"] for entry in taken.document["engines"]} == {DECODER, ENCODER}
    listed = cli("list", "--engine-dir", engines, "--vae", micro_folder, "--json")
    assert listed.code == 0
    assert by_path(listed.document)[DECODER]["origin"] == "adopted"


def test_adopt_refuses_what_cannot_be_loaded(cli: Cli, engines: Path, fake: FakeBackend, micro_folder: Path) -> None:
    keep(engines, DECODER, ENCODER)
    (engines / "manifest.json").unlink()
    (engines / DECODER).write_bytes(b"not an engine")
    (engines / "nowhere").mkdir()
    shutil.copy(engines / ENCODER, engines / "nowhere" / "vae_encoder.fake")
    result = cli("adopt", "--engine-dir", engines, "--vae", micro_folder, "--trust", "--json")
    assert result.code == 1
    refused = {entry["path"] for entry in result.document["engines"] if not entry["adopted"]}
    assert refused == {DECODER, "nowhere/vae_encoder.fake"}


# config


def test_config_prints_the_plan(cli: Cli, fake: FakeBackend) -> None:
    document = cli("config", "--task", "i2i", "--sizes", "16_9,512x512", "--dtype", "fp16", "--json").document
    assert AccelConfig.from_dict(document["config"]) == AccelConfig(task="i2i", sizes=["16_9", "512x512"], dtype="float16")
    stems = [engine["stem"] for engine in document["plan"]["engines"]]
    assert stems == ["16_9/vae_encoder", "512x512/vae_encoder", "16_9/vae_decoder", "512x512/vae_decoder"]
    computed = str(Environment.detect(CPU).arithmetic(torch.float16)).removeprefix("torch.")
    assert document["dtypes"] == {"encode": computed, "decode": computed}
    assert [backend["name"] for backend in document["backends"]] == ["tensorrt", "eager"]
    assert "1664x928" in cli("config").stdout


def test_config_plans_a_size(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the published network on a GPU that this machine need not have."""
    reasons = "qwen_vae_accel.backends.fused.backend.device_reasons"
    monkeypatch.setattr(reasons, lambda *facts, float8: [])
    monkeypatch.setattr("qwen_vae_accel.backends.fused.backend.runs_sm90", lambda capability: False)
    monkeypatch.setattr("qwen_vae_accel.backends.fused.backend.describe_gpu", lambda device: Gpu(132, 232448, True))
    limit = ("--memory-limit", "700MiB", "--dtype", "float16")
    document = cli("config", "--task", "i2i", "--size", "2052x2048", *limit, "--json").document
    assert document["config"]["memory_limit"] == 700 * 2**20 and document["size"]["size"] == "2048x2048"
    calls = {call["method"]: call for call in document["size"]["calls"]}
    itemsize = Environment.detect(CPU).arithmetic(torch.float16).itemsize
    for method, values in (("decode", 3 * 2048 * 2048), ("encode", 32 * 256 * 256)):
        assert calls[method]["backend"] == "fused" and calls[method]["engine"] is None
        memory = calls[method]["memory"]
        assert memory["bands"] > 1 and memory["fits"] and memory["scratch_bytes"] <= memory["limit_bytes"] == 700 * 2**20
        assert memory["output_bytes"] == values * itemsize and 1 < memory["cost"] < 2
        assert memory["peak_bytes"] == memory["scratch_bytes"] + memory["output_bytes"] + memory["held_bytes"]
        assert memory["held_bytes"] > memory["output_bytes"]
    text = cli("config", "--size", "2048x2048", "--memory-limit", "1MiB").stdout
    assert "one image of 2048x2048" in text and "decode takes more than the limit, 1 MiB" in text and "x one piece" in text
    monkeypatch.setattr(reasons, lambda *facts, float8: ["no GPU"])
    (call,) = cli("config", "--size", "1_1", "--json").document["size"]["calls"]
    assert (call["backend"], call["memory"], call["refused"]) == ("eager", None, {"fused": ["no GPU"]})
    assert "not planned" in cli("config", "--size", "1_1").stdout
    assert cli("config", "--size", "large").code == 2


# Errors


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("build", "--vae", "nowhere", "--engine-dir", "e"), 1, "no such folder"),
        (("build", "--vae", ROOT, "--engine-dir", "e"), 1, "neither config.json"),
        (("build", "--vae", "VAE"), 2, "--engine-dir"),
        (("build", "--vae", "VAE", "--engine-dir", "e", "--backend", "eager"), 2, "nothing to build"),
        (("build", "--vae", "VAE", "--engine-dir", "e", "--backend", "inductr"), 2, "did you mean 'inductor'"),
        (("build", "--vae", "VAE", "--engine-dir", "e", "--sizes", "16_8"), 2, "Did you mean"),
        (("build", "--vae", "VAE", "--engine-dir", "e", "--dtype", "int8"), 2, "int8"),
        (("build", "--vae", "VAE", "--engine-dir", "e", "--device", "cuda:99"), 2, "CUDA devices"),
        (("build", "--vae", "VAE", "--engine-dir", "e", "--device", "tpu"), 2, "cpu, cuda"),
        (("build", "--vae", "VAE", "--engine-dir", __file__, "--sizes", "32x32"), 1, "is a file"),
        (("list", "--engine-dir", "nowhere"), 1, "no engine directory"),
        (("config", "--config", "nowhere.json"), 2, "cannot read the config"),
        (("demo", "--image", "nowhere.png"), 2, "cannot read the image"),
        (("demo", "--model", "nowhere"), 1, "no such folder"),
        (("bench", "--methods", "egger"), 2, "did you mean 'eager'"),
    ],
)
def test_errors_are_told_without_a_traceback(
    cli: Cli, fake: FakeBackend, micro_folder: Path, arguments: tuple, code: int, said: str
) -> None:
    arguments = tuple(micro_folder if argument == "VAE" else argument for argument in arguments)
    result = cli(*arguments)
    assert result.code == code
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    result = cli(*arguments, "--json")
    assert result.code == code
    assert said in result.document["error"]["message"]


def test_an_unknown_option_is_a_usage_error(cli: Cli) -> None:
    assert cli("list", "--engine-dr", "x").code == 2


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "qwen_vae_accel.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


def test_weights_are_read_in_the_dtype_they_are_stored_in(micro_folder: Path) -> None:
    assert stored_dtype(vae_folder(TINY_VAE)) is torch.bfloat16
    assert next(load_vae(TINY_VAE, CPU).parameters()).dtype is torch.bfloat16
    assert next(load_vae(micro_folder, CPU).parameters()).dtype is torch.float32
    assert next(load_vae(micro_folder, CPU, torch.float16).parameters()).dtype is torch.float16


def test_a_vae_with_random_weights_is_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        made = random_vae(**MICRO)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), random_vae(**MICRO).parameters(), strict=True))


@pytest.mark.parametrize("value", [{"base_dim": "x"}, {"dim_mult": []}, {"base_dim": 0}, {"num_res_blocks": None}])
def test_a_config_that_diffusers_cannot_use_is_refused(cli: Cli, value: dict, micro_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(micro_folder / "vae", tmp_path / "vae"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | value))
    result = cli("build", "--vae", folder, "--engine-dir", tmp_path / "e")
    assert result.code == 1
    assert "diffusers cannot load it" in result.stderr


@pytest.mark.parametrize("text", ["{}", "[1]", "not JSON", "[" * 100_000, '{"_class_name": "AutoencoderKL"}'])
def test_a_folder_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedVAEError, match="config.json"):
        load_vae(tmp_path, CPU)
