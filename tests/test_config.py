"""The configuration: JSON there and back, the guide's documents, and errors for invalid ones."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_vae_accel import AccelConfig
from qwen_vae_accel.config import BACKENDS, ON_MISS, TASKS, parse_bytes
from qwen_vae_accel.errors import AccelError, ConfigError
from qwen_vae_accel.files import is_path
from qwen_vae_accel.plan import GUIDE_PROFILES, GUIDE_STATIC

GUIDE_T2I = (
    '{"task": "t2i", "vae_type": "tensorrt", '
    '"trt_vae_config": {"trt_engine_path": "path/to/vae_trt_t2i_static", "multi_profile": false}}'
)
GUIDE_I2I = (
    '{"task": "i2i", "vae_type": "tensorrt", '
    '"trt_vae_config": {"trt_engine_path": "path/to/vae_trt_extended_mp", "multi_profile": true}}'
)

# JSON there and back.

dtypes = st.none() | st.sampled_from(["float32", "bfloat16", "float16", "fp32", "bf16", "fp16", torch.float32, torch.bfloat16])
wxh = st.builds("{}x{}".format, st.integers(16, 8192), st.integers(16, 8192))


@st.composite
def configs(draw) -> AccelConfig:
    multi_profile = draw(st.booleans())
    names = st.sampled_from([*GUIDE_STATIC, *GUIDE_PROFILES])
    sizes = st.none() | st.lists(wxh | names, min_size=1, max_size=4, unique=True)
    engine_dir = draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(is_path))
    on_miss = draw(st.none() | st.sampled_from(ON_MISS if engine_dir else ON_MISS[1:]))
    fields = {
        "task": draw(st.sampled_from(TASKS)),
        "backend": draw(st.sampled_from(BACKENDS)),
        "engine_dir": engine_dir,
        "multi_profile": multi_profile,
        "sizes": draw(sizes),
        "dtype": draw(dtypes),
        "encode_dtype": draw(dtypes),
        "decode_dtype": draw(dtypes),
        "max_resident": draw(st.none() | st.integers(1, 1024)),
        "vram_budget": draw(st.integers(1, 2**60) | st.sampled_from(["4GiB", "1.5 GB", "300 MB"])),
        "on_miss": on_miss,
        "verify": draw(st.booleans()),
        "preprocess": draw(st.booleans()),
        "postprocess": draw(st.booleans()),
        "offload_reference": draw(st.booleans()),
    }
    assert set(fields) == {f.name for f in dataclasses.fields(AccelConfig)}, "a new field: draw it too"
    return AccelConfig(**fields)


@given(configs())
def test_json_round_trip(config):
    assert AccelConfig.from_json(config.to_json()) == config
    assert AccelConfig.resolve(config.as_dict()) == config
    assert json.loads(config.to_json())["version"] == 1


def test_json_round_trip_through_a_file(tmp_path):
    config = AccelConfig(engine_dir="engines", sizes=("16_9", "512x640"), task="i2i", encode_dtype="fp32")
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert AccelConfig.from_json(path) == AccelConfig.from_json(str(path)) == config


def test_configs_are_frozen_and_comparable():
    config = AccelConfig(sizes=["16_9"], dtype=torch.bfloat16)
    assert config == AccelConfig(sizes=("16_9",), dtype="bf16")
    assert hash(config) == hash(AccelConfig(sizes=("16_9",), dtype="bfloat16"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.task = "i2i"


def test_sizes_may_be_any_iterable():
    assert AccelConfig(sizes=(f"{side}x{side}" for side in (64, 128))).sizes == ("64x64", "128x128")


# The guide's documents.


def test_the_guides_text_to_image_document():
    config = AccelConfig.from_json(GUIDE_T2I)
    assert config == AccelConfig(task="t2i", backend="tensorrt", engine_dir="path/to/vae_trt_t2i_static")
    assert [p.name for p in config.plan().profiles] == list(GUIDE_STATIC)
    assert config.methods == ("decode",)


def test_the_guides_editing_document():
    config = AccelConfig.from_json(GUIDE_I2I)
    assert config == AccelConfig(task="i2i", backend="tensorrt", engine_dir="path/to/vae_trt_extended_mp", multi_profile=True)
    assert [p.name for p in config.plan().profiles] == list(GUIDE_PROFILES)
    assert config.methods == ("encode", "decode")


def test_keys_of_the_guides_pipelines_are_ignored_in_its_schema_only(caplog):
    document = {**json.loads(GUIDE_T2I), "infer_steps": 8, "guidance_scale": 1.0, "target_height": 928}
    with caplog.at_level("INFO", "qwen_vae_accel"):
        assert AccelConfig.from_dict(document) == AccelConfig.from_json(GUIDE_T2I)
    assert "infer_steps" in caplog.text
    with pytest.raises(ConfigError, match="infer_steps"):
        AccelConfig.from_dict({"task": "t2i", "infer_steps": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae_type": "baseline"}, "vae_type"),
        ({"trt_vae_config": None}, "trt_vae_config"),
        ({"trt_vae_config": "engines"}, "trt_vae_config"),
        ({"trt_vae_config": {}}, "trt_engine_path"),
        ({"trt_vae_config": {"trt_engine_path": ""}}, "engine_dir"),
        ({"trt_vae_config": {"trt_engine_path": 3}}, "engine_dir"),
        ({"trt_vae_config": {"trt_engine_path": "e", "multi_profil": True}}, "did you mean 'multi_profile'"),
        ({"trt_vae_config": {"trt_engine_path": "e", "multi_profile": "yes"}}, "multi_profile"),
        ({"task": "t2v"}, "task"),
    ],
)
def test_the_guides_document_with_mistakes(change, message):
    with pytest.raises(ConfigError, match=message):
        AccelConfig.from_dict({**json.loads(GUIDE_T2I), **change})


# Mistakes.


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("engin_dir", "engine_dir"),
        ("Task", "task"),
        ("max_residents", "max_resident"),
        ("onmiss", "on_miss"),
        ("multiprofile", "multi_profile"),
        ("size", "sizes"),
        ("encoder_dtype", "encode_dtype"),
        ("verfy", "verify"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_name(key, meant):
    with pytest.raises(ConfigError, match=f"unknown key '{key}'; did you mean '{meant}'"):
        AccelConfig.from_dict({key: "x"})
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        AccelConfig.resolve(None, **{key: "x"})


def test_a_key_like_no_other_is_answered_with_all_names():
    with pytest.raises(ConfigError, match="task.*verify"):
        AccelConfig.from_dict({"zzz": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "t2v"}, "did you mean 't2i'|one of t2i, i2i"),
        ({"task": None}, "task"),
        ({"task": ["t2i"]}, "task"),
        ({"backend": "tensorRT"}, "did you mean 'tensorrt'"),
        ({"backend": 1}, "backend"),
        ({"engine_dir": 1}, "engine_dir"),
        ({"engine_dir": "  "}, "engine_dir"),
        ({"engine_dir": ["e"]}, "engine_dir"),
        ({"engine_dir": "a\0b"}, "engine_dir"),
        ({"engine_dir": "\ud800"}, "engine_dir"),
        ({"multi_profile": 1}, "multi_profile"),
        ({"multi_profile": "true"}, "multi_profile"),
        ({"verify": None}, "verify"),
        ({"preprocess": "yes"}, "preprocess"),
        ({"postprocess": 1}, "postprocess"),
        ({"sizes": "16_9"}, "list"),
        ({"sizes": 5}, "list"),
        ({"sizes": [1664, 928]}, "list"),
        ({"sizes": []}, "empty"),
        ({"sizes": ["1664x-928"]}, "between"),
        ({"sizes": ["99999x928"]}, "between"),
        ({"sizes": (1664 for _ in "a")}, "list"),
        ({"sizes": (size for size in ())}, "empty"),
        ({"sizes": ["256x256:512x512:1024x1024"]}, "multi_profile"),
        ({"dtype": "float8"}, "float8"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": 16}, "dtype"),
        ({"encode_dtype": "fp64"}, "fp64"),
        ({"decode_dtype": True}, "decode_dtype"),
        ({"max_resident": 0}, "max_resident"),
        ({"max_resident": -1}, "max_resident"),
        ({"max_resident": 1.0}, "max_resident"),
        ({"max_resident": True}, "max_resident"),
        ({"max_resident": 10**9}, "max_resident"),
        ({"max_resident": "1"}, "max_resident"),
        ({"vram_budget": 0}, "vram_budget"),
        ({"vram_budget": -4}, "vram_budget"),
        ({"vram_budget": None}, "vram_budget"),
        ({"vram_budget": 1.5}, "vram_budget"),
        ({"vram_budget": "4 apples"}, "vram_budget"),
        ({"vram_budget": "-4GiB"}, "vram_budget"),
        ({"vram_budget": "0GiB"}, "vram_budget"),
        ({"vram_budget": "9" * 400 + "GiB"}, "vram_budget"),
        ({"on_miss": "ignore"}, "on_miss"),
        ({"on_miss": "Build"}, "did you mean 'build'"),
        ({"on_miss": "build"}, "engine_dir"),
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({1: 2}, "unknown key 1; known are task"),
        ({"vae_type": "tensorrt", "trt_vae_config": {1: 2}}, "unknown key 1; known are trt_engine_path"),
    ],
)
def test_values_that_cannot_be_meant(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        AccelConfig.from_dict(fields)
    assert isinstance(caught.value, AccelError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "{",
        '{"task": "t2i",}',
        '"t2i"',
        "no/such/file.json",
        "{}{}",
        "bad\0path",
        '{"a": ' + "[" * 100_000,
        '{"a": ' + "1" * 5000,
    ],
)
def test_texts_that_are_no_config(text):
    with pytest.raises(ConfigError):
        AccelConfig.from_json(text)


def test_files_that_are_no_config(tmp_path):
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    array = tmp_path / "array.json"
    array.write_text("[]")
    for path in (binary, array, tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ConfigError):
            AccelConfig.from_json(path)


@pytest.mark.parametrize("config", [3, [1], ("t2i",), object()])
def test_objects_that_are_no_config(config):
    with pytest.raises(ConfigError, match="must be an AccelConfig"):
        AccelConfig.resolve(config)


# What follows from the fields.


def test_overrides():
    base = AccelConfig(task="i2i", max_resident=2, dtype="bf16")
    assert AccelConfig.resolve(base, max_resident=1) == AccelConfig(task="i2i", max_resident=1, dtype="bf16")
    assert AccelConfig.resolve(base) is base
    assert AccelConfig.resolve({"task": "i2i"}, task="t2i") == AccelConfig()
    assert AccelConfig.resolve(GUIDE_T2I, backend="inductor").backend == "inductor"
    assert AccelConfig.resolve(None, engine_dir="e").engine_dir == "e"
    with pytest.raises(ConfigError, match="max_resident"):
        AccelConfig.resolve(base, max_resident=0)


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({}, "fallback"),
        ({"engine_dir": "e"}, "fallback"),
        ({"backend": "eager", "engine_dir": "e"}, "fallback"),
        ({"backend": "inductor"}, "fallback"),
        ({"backend": "inductor", "engine_dir": "e"}, "build"),
        ({"backend": "tensorrt", "engine_dir": "e"}, "build"),
        ({"backend": "tensorrt", "engine_dir": "e", "on_miss": "error"}, "error"),
        ({"backend": "auto", "engine_dir": "e", "on_miss": "build"}, "build"),
    ],
)
def test_default_of_on_miss(fields, policy):
    assert AccelConfig(**fields).miss_policy == policy


@pytest.mark.parametrize(
    ("fields", "encode", "decode"),
    [
        ({}, torch.float16, torch.float16),
        ({"dtype": "bf16"}, torch.bfloat16, torch.bfloat16),
        ({"dtype": "bf16", "encode_dtype": "fp32"}, torch.float32, torch.bfloat16),
        ({"decode_dtype": torch.bfloat16}, torch.float16, torch.bfloat16),
    ],
)
def test_compute_dtypes(fields, encode, decode):
    config = AccelConfig(**fields)
    assert config.compute_dtype("encode", torch.float16) == encode
    assert config.compute_dtype("decode", torch.float16) == decode


@pytest.mark.parametrize(
    ("value", "size"),
    [(1, 1), (4096, 4096), ("4GiB", 4 * 2**30), ("4 gb", 4 * 10**9), ("1.5KiB", 1536), ("100 B", 100), ("2TB", 2 * 10**12)],
)
def test_budgets(value, size):
    assert parse_bytes(value) == size
