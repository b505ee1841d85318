"""Which engine serves a request: a pure function of values, as tables and as properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qwen_vae_accel.errors import ConfigError
from qwen_vae_accel.plan import Choice, EngineKey, Miss, Plan
from qwen_vae_accel.sizes import (
    GUIDE_MAX_SIDE,
    GUIDE_PROFILES,
    GUIDE_STATIC,
    LIGHTX2V_PROFILES,
    LIGHTX2V_STATIC,
    MAX_SIDE,
    MIN_SIDE,
    MODEL_CARD,
    PIPELINE_DEFAULT,
    STATIC_NAMES,
    Profile,
    Size,
    parse_size,
)

T2I = Plan.make(None, multi_profile=False)
I2I = Plan.make(None, multi_profile=True)
METHODS = ("encode", "decode")


def size(text: str) -> Size:
    width, height = map(int, text.split("x"))
    return Size(width, height)


def edit_shapes() -> list[Size]:
    """What the edit pipelines make of any ratio from 1:3 to 3:1: an area of 1024^2, sides rounded to 32."""
    shapes = set()
    for step in range(20001):
        ratio = 3 ** (step / 10000 - 1)
        width = math.sqrt(1024 * 1024 * ratio)
        height = width / ratio
        shapes.add(Size(round(width / 32) * 32, round(height / 32) * 32))
    return sorted(shapes)


# The guide's tables.


@pytest.mark.parametrize(
    ("request_size", "folder"),
    [
        ("1664x928", "16_9"),
        ("928x1664", "9_16"),
        ("1328x1328", "1_1"),
        ("1472x1136", "4_3"),  # what pipelines make of a request for 1472x1140
        ("768x1024", "3_4"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_static_sizes_of_the_guide(method, request_size, folder):
    choice = T2I.select(method, size(request_size))
    assert choice.key.name == folder
    assert choice.key.stem == f"{folder}/{'vae_encoder' if method == 'encode' else 'vae_decoder'}"
    assert choice.key.is_static
    assert choice.profile.minimum == choice.profile.optimum == choice.profile.maximum == size(request_size)


def test_the_guide_names_1472x1140_and_engines_are_for_1472x1136():
    assert parse_size("4_3") == Size(1472, 1140)
    assert Plan.make(["4_3"], False) == Plan.make(["1472x1140"], False) == Plan.make(["1472x1136"], False)
    assert [str(p.optimum) for p in Plan.make(["4_3"], False).profiles] == ["1472x1136"]
    # A decoder's request of 142x184 latents is 1472x1136 by construction; an image of 1140 rows is another size.
    assert isinstance(Plan.make(["4_3"], False).select("encode", Size(1472, 1140)), Miss)


@pytest.mark.parametrize(("name", "optimum"), GUIDE_PROFILES.items())
@pytest.mark.parametrize("method", METHODS)
def test_profiles_of_the_guide_serve_their_own_size(method, name, optimum):
    given_size = optimum if method == "encode" else optimum.floor(8)
    choice = I2I.select(method, given_size)
    assert choice.profile.name == name
    assert choice.key.stem == f"vae_{'encoder' if method == 'encode' else 'decoder'}_multi_profile"
    assert choice.key.profiles == I2I.profiles
    assert not choice.key.is_static


def test_the_guide_names_height_by_width():
    """Its text says 480x848 for 16_9_480p: 480 rows of 848 pixels."""
    assert GUIDE_PROFILES["16_9_480p"] == Size(width=848, height=480)
    assert GUIDE_PROFILES["9_16_1080p"] == Size(width=1080, height=1920)
    assert GUIDE_PROFILES["4_3_768p"] == Size(width=1024, height=768)
    assert len(GUIDE_PROFILES) == 9 and len(GUIDE_STATIC) == 5


@pytest.mark.parametrize(
    ("method", "request_size", "profile"),
    [
        ("encode", "1620x1088", "3_2_1080p"),
        ("decode", "1616x1088", "3_2_1080p"),  # 202 latent columns
        ("encode", "1616x1088", "3_2_1080p"),
        ("encode", "1080x1920", "9_16_1080p"),
        ("encode", "1920x1080", "16_9_1080p"),
        ("decode", "1920x1080", "16_9_1080p"),
        ("encode", "600x600", "1_1_512"),
        ("encode", "900x900", "1_1_1024"),  # 248 pixels away; 4_3_768p is 256
        ("encode", "1000x1000", "1_1_1024"),
        ("encode", "256x256", "1_1_512"),
        ("encode", "1328x1328", "3_2_1080p"),  # 532; 1_1_1024 is 608
        ("encode", "1184x880", "16_9_720p"),  # 256; 4_3_768p is 272
    ],
)
def test_nearest_profile(method, request_size, profile):
    assert I2I.select(method, size(request_size)).profile.name == profile


@pytest.mark.parametrize("request_size", ["2048x2048", "1928x1080", "1080x1928", "8x8", "248x512", "4096x64"])
@pytest.mark.parametrize("method", METHODS)
def test_outside_every_profile_is_a_miss_with_its_reason(method, request_size):
    miss = I2I.select(method, size(request_size))
    assert isinstance(miss, Miss)
    assert request_size in miss.reason and "1_1_1024" in miss.reason


@pytest.mark.parametrize("shape", [*MODEL_CARD, PIPELINE_DEFAULT], ids=str)
def test_sizes_of_the_model_card(shape):
    for method in METHODS:
        assert I2I.select(method, shape).profile.contains(shape)
        named = Plan.make([str(shape)], False).select(method, shape)
        assert named.profile.optimum == shape
    assert shape.floor(16) == shape


def test_every_shape_of_the_edit_pipelines_is_served():
    shapes = edit_shapes()
    assert len(shapes) == 75
    for shape in shapes:
        for method in METHODS:
            choice = I2I.select(method, shape)
            assert isinstance(choice, Choice), f"{method} at {shape}: {choice}"


# Names: of hosts that came after the guide, with a size of their own, and of what a directory holds.


def names(plan: Plan) -> dict[str, str]:
    return {profile.name: str(profile.optimum) for profile in plan.profiles}


@pytest.mark.parametrize(
    ("request_size", "folder"),
    [
        ("1664x928", "16_9"),
        ("928x1664", "9_16"),
        ("1328x1328", "1_1"),
        ("1472x1104", "4_3"),
        ("1104x1472", "3_4"),
        ("1056x1584", "3_2"),
        ("1584x1056", "2_3"),
    ],
)
def test_static_sizes_of_the_guides_host(request_size, folder):
    plan = Plan.make(["lightx2v"], False)
    assert plan.select("decode", size(request_size)).key.stem == f"{folder}/vae_decoder"
    assert len(plan.profiles) == len(LIGHTX2V_STATIC) == 7


def test_profiles_of_the_guides_host_are_1088_high():
    plan = Plan.make(["lightx2v"], True)
    assert [p.name for p in plan.profiles] == list(GUIDE_PROFILES), "the host counts on their order"
    assert plan.select("decode", Size(1920, 1088)).profile.name == "16_9_1080p"
    assert plan.select("encode", Size(1088, 1920)).profile.name == "9_16_1080p"
    differing = {name for name, profile in LIGHTX2V_PROFILES.items() if profile != GUIDE_PROFILES[name]}
    assert differing == {"16_9_1080p", "9_16_1080p"}


def test_names_that_only_the_host_has_are_its_sizes():
    assert names(Plan.make(["3_2", "2_3"], False)) == {"3_2": "1056x1584", "2_3": "1584x1056"}
    assert names(Plan.make(["4_3", "3_4"], False)) == {"4_3": "1472x1136", "3_4": "768x1024"}, "the guide's stay the default"
    assert names(Plan.make(None, False)) == {n: str(s.floor(16)) for n, s in GUIDE_STATIC.items()}


def test_a_name_may_be_given_a_size():
    plan = Plan.make(["4_3=1472x1104", "1_1=1664x928", "16_9"], False)
    assert names(plan) == {"4_3": "1472x1104", "1_1": "1664x928"}, "16_9 is that size too, and has an engine already"
    assert plan.select("decode", Size(1664, 928)).key.name == "1_1"
    assert Plan.make(["3_4=1104x1472"], False, scale=16, multiple=32).profiles[0].optimum == Size(1088, 1472)


def test_a_folder_holds_what_its_engine_says():
    held = {"4_3": Size(1472, 1104), "3_2": Size(1056, 1584)}
    default = Plan.make(None, False, held=held)
    assert names(default)["4_3"] == "1472x1104" and len(default.profiles) == 5
    assert default.select("decode", Size(1472, 1104)).key.name == "4_3"
    assert default.select("decode", Size(1056, 1584)).key.name == "3_2"
    assert default.select("decode", Size(1472, 1136)).key.name == "1472x1136", "not built over the engine in 4_3"
    assert T2I.surprises(held) == ["folder 4_3 holds an engine for 1472x1104, where 1472x1136 was expected"]
    assert default.surprises(held) == []

    closed = Plan.make(["4_3"], False, held=held)
    assert closed.select("decode", Size(1472, 1104)).key.name == "4_3"
    assert isinstance(closed.select("decode", Size(1472, 1136)), Miss)
    assert isinstance(closed.select("decode", Size(1056, 1584)), Miss), "held, but not in the list"


@pytest.mark.parametrize("text", ["1472x1136", "1472x1140", "4_3=1472x1140"])
def test_a_size_that_is_written_out_is_meant(text):
    held = {"4_3": Size(1472, 1104)}
    assert names(Plan.make([text], False, held=held)) == {"1472x1136": "1472x1136"}
    assert names(Plan.make([text], False)) == {"4_3": "1472x1136"}
    assert names(Plan.make([text], False, held={"1472x1136": Size(1472, 1136)})) == {"1472x1136": "1472x1136"}, "it is there"


def test_an_engine_under_any_name_is_found_by_its_size():
    held = {"1584x1056": Size(1584, 1056), "16_9": Size(640, 640)}
    plan = Plan.make(None, False, held=held)
    assert plan.select("decode", Size(1584, 1056)).key.name == "1584x1056", "as releases before the name 2_3 built it"
    assert plan.select("decode", Size(640, 640)).key.name == "16_9"
    assert names(Plan.make(["2_3"], False, held=held)) == {"1584x1056": "1584x1056"}


# The default static plan is open; a list of sizes is closed.


def test_an_open_plan_makes_an_engine_of_any_size():
    choice = T2I.select("decode", Size(512, 640))
    assert choice.key == EngineKey("decode", "512x640", (Profile.static("512x640", Size(512, 640)),))
    assert T2I.open and not I2I.open


def test_a_list_of_sizes_is_closed():
    plan = Plan.make(["512x640", "16_9"], False)
    assert plan.select("decode", Size(512, 640)).key.name == "512x640"
    assert plan.select("decode", Size(1664, 928)).key.name == "16_9"
    miss = plan.select("decode", Size(640, 512))
    assert isinstance(miss, Miss)
    assert "640x512" in miss.reason and "512x640" in miss.reason and "1664x928" in miss.reason


def test_custom_ranges():
    plan = Plan.make(["256x128:512x256:640x640", "1024x1024"], True)
    assert [p.name for p in plan.profiles] == ["512x256", "1024x1024"]
    assert plan.select("encode", Size(256, 128)).profile.name == "512x256"
    assert plan.select("encode", Size(640, 640)).profile.name == "512x256"
    assert plan.select("encode", Size(641, 640)).profile.name == "1024x1024"
    assert isinstance(plan.select("encode", Size(255, 128)), Miss)
    # A decoder's sizes are whole latent pixels, and so are its bounds.
    odd = Plan.make(["100x100:150x150:203x203"], True)
    assert isinstance(odd.select("decode", Size(96, 200)), Choice)
    assert isinstance(odd.select("encode", Size(96, 200)), Miss)
    assert isinstance(odd.select("decode", Size(208, 200)), Miss)


def test_another_scale():
    """A VAE that halves twice: latent pixels of 4."""
    plan = Plan.make(["100x100:150x150:203x203"], True, scale=4)
    assert isinstance(plan.select("decode", Size(100, 200)), Choice)
    assert isinstance(plan.select("decode", Size(96, 200)), Miss)
    assert Plan.make(["8x8:64x64:96x96"], True, scale=4).profiles[0].minimum == Size(8, 8)


@pytest.mark.parametrize("text", ["16x16", "20x24", "24x512", "40x40"])
@pytest.mark.parametrize(("scale", "multiple"), [(4, 1), (8, 1)])
def test_default_ranges_begin_at_two_latent_pixels(text, scale, multiple):
    """``torch.export`` takes a side of one for a constant."""
    (profile,) = Plan.make([text], True, scale, multiple).profiles
    low, optimum = profile.minimum, profile.optimum
    for side, best in ((low.width, optimum.width), (low.height, optimum.height)):
        assert side == max(2 * scale, best // 2 // 8 * 8) <= best


def test_engines_of_a_plan():
    assert [key.stem for key in T2I.engines("decode")] == [f"{name}/vae_decoder" for name in GUIDE_STATIC]
    assert [key.stem for key in T2I.engines("encode")] == [f"{name}/vae_encoder" for name in GUIDE_STATIC]
    assert [key.stem for key in I2I.engines("encode")] == ["vae_encoder_multi_profile"]


# Input that cannot be meant.


@pytest.mark.parametrize(
    ("sizes", "multi_profile", "message"),
    [
        (["16_10"], False, "16_9"),
        (["16_9_720"], True, "Did you mean '16_9_720p'"),
        (["axb"], False, "neither WIDTHxHEIGHT"),
        (["512"], False, "neither WIDTHxHEIGHT"),
        (["512x"], False, "neither WIDTHxHEIGHT"),
        (["512x512x3"], False, "neither WIDTHxHEIGHT"),
        ([""], False, "neither WIDTHxHEIGHT"),
        (["-512x512"], False, "between 8 and 8192"),
        (["0x512"], False, "between 8 and 8192"),
        (["4x512"], False, "between 8 and 8192"),
        (["512x100000"], False, "between 8 and 8192"),
        (["8x8"], False, "leaves nothing"),
        ([], False, "empty"),
        ([], True, "empty"),
        (["256x256:512x512:1024x1024"], False, "multi_profile"),
        (["256x256:512x512"], True, "MIN:OPT:MAX"),
        (["256x256:512x512:1024x1024:1x1"], True, "MIN:OPT:MAX"),
        (["512x512:256x256:1024x1024"], True, "must not decrease"),
        (["256x256:512x512:1024x400"], True, "must not decrease"),
        (["256x256:512x512:9000x9000"], True, "between 8 and 8192"),
        (["8x8:64x64:96x96"], True, "range '8x8:64x64:96x96': sides must be at least 16 pixels"),
        (["64x15:64x64:96x96"], True, "at least 16"),
        (["8x8"], True, "at least 16"),
        ([f"{'9' * 5000}x512"], False, "between 8 and 8192"),
        (["256x256:512x512:1024x1024", "128x128:512x512:1024x1024"], True, "two different ranges"),
    ],
)
def test_sizes_that_cannot_be_meant(sizes, multi_profile, message):
    with pytest.raises(ConfigError, match=message):
        Plan.make(sizes, multi_profile)


@pytest.mark.parametrize("text", ["512x640", " 512 x 640 ", "512X640", "512*640"])
def test_ways_to_write_a_size(text):
    assert parse_size(text) == Size(512, 640)


# Properties.

sides = st.integers(MIN_SIDE, MAX_SIDE)
any_size = st.builds(Size, sides, sides)
request_sizes = st.builds(Size, st.integers(1, 2 * GUIDE_MAX_SIDE), st.integers(1, 2 * GUIDE_MAX_SIDE))


@st.composite
def ranges(draw) -> str:
    widths, heights = (sorted(draw(st.tuples(sides, sides, sides))) for _ in "wh")
    return ":".join(f"{w}x{h}" for w, h in zip(widths, heights, strict=True))


@st.composite
def plans(draw) -> Plan:
    if draw(st.booleans()):
        texts = draw(
            st.lists(st.one_of(ranges(), any_size.map(str), st.sampled_from(list(GUIDE_PROFILES))), min_size=1, max_size=5)
        )
        try:
            return Plan.make(texts, True)
        except ConfigError:
            assume(False)
    usable = any_size.filter(lambda s: min(s.width, s.height) >= 16)
    texts = draw(st.none() | st.lists(usable.map(str), min_size=1, max_size=5))
    return Plan.make(texts, False)


@given(any_size)
def test_a_size_survives_its_text(shape):
    assert parse_size(str(shape)) == shape


@given(plans(), st.sampled_from(METHODS), request_sizes)
def test_the_chosen_profile_contains_the_shape_and_is_the_nearest(plan, method, shape):
    if method == "decode":
        shape = shape.floor(8)
    choice = plan.select(method, shape)
    fitting = [p for p in plan.profiles if p.contains(shape, 8 if method == "decode" else 1)]
    if isinstance(choice, Miss):
        assert not fitting and not plan.open
        assert str(shape) in choice.reason
        return
    assert choice.profile in choice.key.profiles
    assert choice.key.method == method
    if fitting:
        assert choice.profile.distance(shape) == min(p.distance(shape) for p in fitting)
        step = 8 if method == "decode" else 1
        assert choice.profile.minimum.width // step <= shape.width // step <= choice.profile.maximum.width // step
        assert choice.profile.minimum.height // step <= shape.height // step <= choice.profile.maximum.height // step
    else:
        assert plan.open


@given(plans(), st.dictionaries(st.sampled_from(sorted(STATIC_NAMES)), any_size.map(lambda s: s.floor(16))), request_sizes)
def test_no_plan_builds_over_an_engine_of_another_size(plan, held, shape):
    assume(not plan.multi_profile and all(min(s.width, s.height) for s in held.values()))
    texts = None if plan.open else [profile.text(multi_profile=plan.multi_profile) for profile in plan.profiles]
    settled = Plan.make(texts, False, held=held)
    choice = settled.select("encode", shape)
    keys = [*settled.engines("encode"), *([choice.key] if isinstance(choice, Choice) else [])]
    for key in keys:
        assert held.get(key.name, key.profiles[0].optimum) == key.profiles[0].optimum
    if isinstance(choice, Choice):
        assert choice.profile.optimum == shape


@given(plans())
@example(Plan.make(["16x16:16x16:16x16"], True))
def test_a_plan_survives_the_texts_of_its_profiles(plan):
    again = Plan.make([profile.text(multi_profile=plan.multi_profile) for profile in plan.profiles], plan.multi_profile)
    assert again.profiles == plan.profiles


@given(plans(), st.sampled_from(METHODS), request_sizes)
def test_selection_is_pure(plan, method, shape):
    assert plan.select(method, shape) == plan.select(method, shape)
    again = Plan(plan.profiles, plan.multi_profile, plan.open, plan.scale)
    assert again.select(method, shape) == plan.select(method, shape)


@given(st.lists(any_size.filter(lambda s: min(s.width, s.height) >= 16), min_size=1, max_size=4), request_sizes)
def test_static_engines_match_exactly(sizes, shape):
    plan = Plan.make([str(s) for s in sizes], False)
    choice = plan.select("encode", shape)
    assert isinstance(choice, Choice) == (shape in {s.floor(16) for s in sizes})
    if isinstance(choice, Choice):
        assert choice.profile.optimum == shape


@given(plans(), st.sampled_from(METHODS))
def test_engines_have_paths_of_their_own(plan, method):
    stems = [key.stem for key in plan.engines(method)]
    assert len(set(stems)) == len(stems)
    assert not set(stems) & {key.stem for other in METHODS if other != method for key in plan.engines(other)}
