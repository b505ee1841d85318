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
from qwen_vae_accel.sizes import GUIDE_PROFILES, GUIDE_STATIC, LIGHTX2V_PROFILES, LIGHTX2V_STATIC, PRESETS, STATIC_NAMES

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
    renamed = st.sampled_from([*GUIDE_PROFILES] if multi_profile else [*STATIC_NAMES])
    mapping = st.builds(lambda name, size: {name: size}, renamed, wxh)
    sizes = st.none() | st.lists(wxh | names, min_size=1, max_size=4, unique=True) | mapping | st.sampled_from([*PRESETS])
    paths = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(is_path)
    engine_dir = draw(st.none() | paths.filter(lambda path: not path.startswith("~")))  # "~0" is nobody's home
    on_miss = draw(st.none() | st.sampled_from(ON_MISS if engine_dir else ON_MISS[1:]))
    fields = {
        "task": draw(st.sampled_from(TASKS)),
        "backend": draw(st.sampled_from(BACKENDS)),
        "engine_dir": engine_dir,
        "sizes": (drawn := draw(sizes)),
        "multi_profile": None if drawn is None and draw(st.booleans()) else multi_profile,
        "dtype": draw(dtypes),
        "encode_dtype": draw(dtypes),
        "decode_dtype": draw(dtypes),
        "max_resident": draw(st.none() | st.integers(1, 1024)),
        "vram_budget": draw(st.integers(1, 2**60) | st.sampled_from(["4GiB", "1.5 GB", "300 MB"])),
        "memory_limit": draw(
            st.none()
            | st.integers(1, 2**60)
            | st.floats(1e-6, 0.999)
            | st.sampled_from(["2GiB", "700 MiB", "50%", "12.5 %", "0.3"])
        ),
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


def test_a_memory_limit_is_bytes_or_a_share():
    limits = {
        2 * 2**30: 2 * 2**30,
        "2GiB": 2 * 2**30,
        "2147483648": 2**31,
        1: 1,
        0.5: 0.5,
        "50%": 0.5,
        "12.5 %": 0.125,
        ".25": 0.25,
    }
    for value, kept in limits.items():
        config = AccelConfig(memory_limit=value)
        assert config.memory_limit == kept and type(config.memory_limit) is type(kept), value
        assert AccelConfig.from_json(config.to_json()) == config
    assert AccelConfig().memory_limit is None
    share, nbytes = (AccelConfig.from_json(f'{{"memory_limit": {value}}}').memory_limit for value in ("0.25", '"1 GB"'))
    assert (share, nbytes) == (0.25, 10**9)


def test_sizes_may_be_any_iterable():
    assert AccelConfig(sizes=(f"{side}x{side}" for side in (64, 128))).sizes == ("64x64", "128x128")


def test_sizes_may_map_names_to_sizes():
    config = AccelConfig(sizes={"4_3": "1472x1104", "512x640": "512x640"})
    assert config.sizes == ("4_3=1472x1104", "512x640=512x640")
    assert [(p.name, str(p.optimum)) for p in config.plan().profiles] == [("4_3", "1472x1104"), ("512x640", "512x640")]
    assert config == AccelConfig.from_json('{"sizes": {"4_3": "1472x1104", "512x640": "512x640"}}')
    assert config == AccelConfig.from_json(config.to_json())
    profiles = AccelConfig(sizes={"1_1_512": "256x256:512x512:640x640"}, multi_profile=True).plan().profiles
    assert [p.text(multi_profile=True) for p in profiles] == ["1_1_512=256x256:512x512:640x640"]


def test_a_whole_table_goes_by_its_name():
    for sizes in ("lightx2v", ["lightx2v"]):
        static, multi = (AccelConfig(sizes=sizes, multi_profile=multi).plan() for multi in (False, True))
        assert {p.name: p.optimum for p in static.profiles} == LIGHTX2V_STATIC and not static.open
        assert {p.name: p.optimum for p in multi.profiles} == LIGHTX2V_PROFILES
    assert AccelConfig(sizes="guide", multi_profile=True).plan() == AccelConfig(multi_profile=True).plan()
    assert AccelConfig(sizes="guide").plan().profiles == AccelConfig().plan().profiles
    extended = AccelConfig(sizes=["lightx2v", "512x640", "1472x1104", "4_3"]).plan().profiles
    assert [p.name for p in extended] == [*LIGHTX2V_STATIC, "512x640"], (
        "the table's 4_3 is what 4_3 and its size mean beside it"
    )


@pytest.mark.parametrize(
    ("fields", "profiles"),
    [
        ({}, False),
        ({"task": "i2i"}, True),
        ({"task": "i2i", "sizes": ["16_9"]}, False),
        ({"task": "i2i", "multi_profile": False}, False),
        ({"task": "t2i", "multi_profile": True}, True),
    ],
)
def test_editing_alone_means_the_guides_profiles(fields, profiles):
    config = AccelConfig.resolve(None, **fields)
    assert config.has_profiles is config.plan().multi_profile is profiles
    assert AccelConfig.from_json(config.to_json()) == config
    assert AccelConfig.resolve(AccelConfig(task="t2i"), task="i2i").has_profiles


# The guide's documents.


def test_the_guides_text_to_image_document():
    config = AccelConfig.from_json(GUIDE_T2I)
    assert config == AccelConfig(task="t2i", backend="tensorrt", engine_dir="path/to/vae_trt_t2i_static", multi_profile=False)
    assert [p.name for p in config.plan().profiles] == list(GUIDE_STATIC)
    assert config.methods == ("decode",)


def test_the_guides_editing_document():
    config = AccelConfig.from_json(GUIDE_I2I)
    assert config == AccelConfig(task="i2i", backend="tensorrt", engine_dir="path/to/vae_trt_extended_mp", multi_profile=True)
    assert [p.name for p in config.plan().profiles] == list(GUIDE_PROFILES)
    assert config.methods == ("encode", "decode")


def test_keys_of_the_guides_pipelines_are_ignored_in_its_schema_only(caplog):
    document = {**json.loads(GUIDE_T2I), "infer_steps": 8, "guidance_scale": 1.0, "target_height": 928}
    with caplog.at_level("DEBUG", "qwen_vae_accel"):
        assert AccelConfig.from_dict(document) == AccelConfig.from_json(GUIDE_T2I)
    (record,) = caplog.records
    assert record.levelname == "DEBUG" and "'guidance_scale', 'infer_steps', 'target_height'" in record.message
    with pytest.raises(ConfigError, match="guidance_scale"):
        AccelConfig.from_dict({"task": "t2i", "guidance_scale": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae_type": "tensorRT"}, "vae_type must be 'tensorrt' or 'baseline'"),
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


HOST = {
    "model_cls": "qwen_image",
    "model_path": "/models/Qwen-Image-2512",
    "infer_steps": 50,
    "aspect_ratio": "16:9",
    "attn_type": "flash_attn3",
    "enable_cfg": True,
    "vae_scale_factor": 8,
    "in_channels": 64,
    "cpu_offload": False,
    "lora_configs": None,
    "sizes": "a key that means something else there",
}


def test_a_whole_configuration_of_the_host_is_taken():
    engines = {"vae_type": "tensorrt", "trt_vae_config": {"multi_profile": True, "trt_engine_path": "e"}}
    config = AccelConfig.from_dict({**HOST, "task": "i2i", **engines})
    assert config == AccelConfig(task="i2i", backend="tensorrt", engine_dir="e", multi_profile=True)
    for plain in ({}, {"vae_type": "baseline"}, {"vae_type": "baseline", "trt_vae_config": {"trt_engine_path": "e"}}):
        assert AccelConfig.from_dict({**HOST, "task": "i2i", **plain}) == AccelConfig(task="i2i"), "it would run no engines"
    assert AccelConfig.resolve({**HOST, **engines}, backend="auto", sizes="lightx2v").sizes == ("lightx2v",)
    with pytest.raises(ConfigError, match="task must be one of t2i, i2i"):
        AccelConfig.from_dict({**HOST, "task": "t2v"})


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
        ({"sizes": "lightx2w"}, "guide, lightx2v"),
        ({"sizes": {}}, "empty"),
        ({"sizes": {"4_3": 1472}}, "'4_3': 1472 does not map a name to a size"),
        ({"sizes": {"4_3": None}}, "does not map"),
        ({"sizes": {"4_3": ["1472x1104"]}}, "does not map"),
        ({"sizes": {43: "1472x1104"}}, "does not map"),
        ({"sizes": {"4_4": "1472x1104"}}, "'4_4' is neither the size itself nor one of .*Did you mean '4_3'"),
        ({"sizes": {"": "1472x1104"}}, "neither the size itself"),
        ({"sizes": {"4_3": "1472"}}, "'4_3=1472': after the name comes its size, WIDTHxHEIGHT"),
        ({"sizes": {"4_3": "16_9"}}, "after the name comes its size"),
        ({"sizes": {"4_3": "guide"}}, "after the name comes its size"),
        ({"sizes": {"4_3": "1472x9999"}}, "between 8 and 8192"),
        ({"sizes": {"4_3": "1472x1104", "3_2": "1472x1104"}}, "4_3 and 3_2 are names for one size, 1472x1104"),
        ({"sizes": {"4_3": "1472x1140", "3_2": "1472x1136"}}, "4_3 and 3_2 are names for one size, 1472x1136"),
        ({"sizes": ["guide", "lightx2v"]}, "4_3 stands for two sizes, 1472x1136 and 1472x1104"),
        ({"sizes": {"4_3": "256x256:512x512:1024x1024"}}, "multi_profile"),
        ({"sizes": {"1_1": "512x512"}, "multi_profile": True}, "'1_1' is neither .*1_1_512"),
        ({"sizes": {"1_1_512": "512x512", "512x512": "512x512"}, "multi_profile": True}, "two different ranges"),
        ({"sizes": ["1_1_512", "1_1_512=640x640"], "multi_profile": True}, "two different ranges have the name 1_1_512"),
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
        *(
            (
                {"memory_limit": value},
                "memory_limit .* a share of the free memory: a number between 0 and 1, or text such as '50%'",
            )
            for value in (
                0,
                -1,
                0.0,
                1.0,
                -0.5,
                1.5,
                2.0**31,
                True,
                "0",
                "100%",
                "0%",
                "-5%",
                "half",
                "",
                "2 GB of it",
                "1.5",
                2**63,
                "9" * 19,
                float("nan"),
                float("inf"),
                [1],
                b"2GiB",
            )
        ),
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
