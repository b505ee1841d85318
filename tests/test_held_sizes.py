"""Folders whose engines are for other sizes than their names stand for: the engines are believed, and none is built over."""

from __future__ import annotations

import copy
import json

import pytest

from qwen_vae_accel import AccelConfig, accelerate
from qwen_vae_accel.engines.manifest import NAME
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.errors import EngineMissingError
from tests.helpers import Reference, decoded, latents, moments

pytest_plugins = ["tests.fixtures_cli"]
pytestmark = pytest.mark.usefixtures("no_grad")

HERE = "4_3/vae_decoder.fake"
SAYS = "folder 4_3 holds an engine for 64x32, where 1472x1136 was expected"


def shapes(folder) -> dict[str, list[str]]:
    records = EngineStore(folder).manifest().engines
    return {path: [str(p.optimum) for p in found[-1].profiles] for path, found in records.items()}


@pytest.fixture
def made(micro, fake, tmp_path):
    """A directory whose folder 4_3 was made for 64x32."""
    folder = tmp_path / "made"
    with accelerate(micro, backend="tensorrt", engine_dir=folder, sizes={"4_3": "64x32"}) as handle:
        handle.warmup(progress=False)
    assert shapes(folder) == {HERE: ["64x32"]}
    return folder


def by_path(document) -> dict[str, dict]:
    return {entry["path"]: entry for entry in document["engines"]}


def options(folder, **more):
    return {"backend": "tensorrt", "engine_dir": folder, "on_miss": "error", **more}


@pytest.mark.parametrize("sizes", [None, ["4_3"], ["4_3", "32x32"], {"4_3": "64x32"}, ["64x32"]])
def test_the_engine_of_a_folder_serves_its_own_size(micro, made, caplog, sizes):
    z = latents("64x32")
    reference = Reference(micro, "decode", z)
    handle = accelerate(micro, options(made, sizes=sizes))
    for _ in range(2):
        reference.check(decoded(micro, z))
    assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 2}
    assert handle.report().as_dict()["engines"] == [HERE]
    told = [record.message for record in caplog.records if "was expected" in record.message]
    assert told == ([SAYS] if sizes in (None, ["4_3"], ["4_3", "32x32"]) else [])


def test_warming_up_a_name_loads_what_its_folder_holds(micro, made, fake):
    fake.events.clear()
    handle = accelerate(micro, options(made, sizes=["4_3"]))
    handle.warmup(progress=False)
    assert fake.events == [("load", "4_3/vae_decoder")]


def test_a_size_that_is_written_out_gets_a_folder_of_its_own(micro, made):
    before = (made / HERE).read_bytes()
    accelerate(micro, options(made, sizes=["4_3=32x32"], on_miss="build"))
    decoded(micro, latents("32x32"))
    assert shapes(made) == {HERE: ["64x32"], "32x32/vae_decoder.fake": ["32x32"]}
    assert (made / HERE).read_bytes() == before


def test_an_engine_that_appears_under_a_name_is_believed(micro, made, fake, tmp_path):
    """Another process builds into the directory while this one serves."""
    with accelerate(micro, options(made, on_miss="fallback")) as handle:
        decoded(micro, latents("32x64"))
        assert handle.report().as_dict()["calls"]["decode"] == {"eager": 1}
        other = copy.deepcopy(micro)
        with accelerate(other, options(made, sizes={"3_4": "32x64"}, on_miss="build")):
            decoded(other, latents("32x64"))
        decoded(micro, latents("32x64"))
        assert handle.report().as_dict()["calls"]["decode"] == {"eager": 1, "tensorrt": 1}


def test_the_profiles_of_an_engine_are_believed_where_no_sizes_are_given(micro, fake, tmp_path, caplog):
    ranges = ["1_1_512=16x16:32x32:48x48", "1_1_1024=16x16:64x64:96x96"]
    with accelerate(micro, options(tmp_path, sizes=ranges, multi_profile=True, on_miss="build")) as handle:
        handle.warmup(progress=False)
    caplog.clear()
    with accelerate(micro, options(tmp_path, task="i2i")) as handle:
        decoded(micro, latents("96x64"))
        with pytest.raises(EngineMissingError, match="1_1_512"):
            decoded(micro, latents("128x64"))
        with pytest.raises(EngineMissingError):  # there is no encoder
            moments(micro, latents("96x64").new_zeros(1, 3, 1, 64, 96))
    assert [fake.events.count(("build", f"vae_{network}coder_multi_profile")) for network in ("de", "en")] == [1, 0]
    (told,) = [record.message for record in caplog.records if "of its own" in record.message]
    assert told.startswith(
        "vae_decoder_multi_profile.fake has 2 optimization profiles of its own: 1_1_512 [16x16..32x32..48x48]"
    )
    accelerate(micro, options(tmp_path, sizes=["16x16:32x32:64x64"], multi_profile=True))
    with pytest.raises(EngineMissingError, match="sizes: built for 1_1_512"):
        decoded(micro, latents("32x32"))


@pytest.mark.parametrize(("name", "folder"), [("64x32", "32x32"), ("4_3", "1_1"), ("nowhere", "nowhere")])
def test_a_record_that_contradicts_its_folder_is_not_believed(micro, made, name, folder):
    document = json.loads((made / NAME).read_text())
    record = document["engines"][HERE][0]
    record["name"] = name
    (made / folder).mkdir()
    path = f"{folder}/vae_decoder.fake"
    (made / path).write_bytes((made / HERE).read_bytes())
    document["engines"][path] = [record]
    del document["engines"][HERE]
    (made / HERE).unlink()
    (made / NAME).write_text(json.dumps(document))
    accelerate(micro, options(made, sizes=["32x32", "64x32"]))
    for size in ("32x32", "64x32"):
        with pytest.raises(EngineMissingError, match="sizes: built for 4_3|there is no engine"):
            decoded(micro, latents(size))
    assert shapes(made) == {path: ["64x32"]} and (made / path).is_file(), "nothing is lost"


# The commands.


def test_build_does_not_build_over_another_size(cli, made, micro_folder):
    command = ("build", "--vae", micro_folder, "--backend", "tensorrt", "--engine-dir", made, "--method", "decode", "--json")
    result = cli(*command, "--sizes", "4_3=32x32,16_9=48x32")
    assert result.code == 0
    assert shapes(made) == {HERE: ["64x32"], "32x32/vae_decoder.fake": ["32x32"], "16_9/vae_decoder.fake": ["48x32"]}
    assert "folder 4_3 holds an engine for 64x32, where 32x32 was expected" in " ".join(result.stderr.split())
    assert by_path(cli(*command, "--sizes", "4_3").document)[HERE]["status"] == "current"


def test_prune_keeps_what_a_name_of_the_plan_holds(cli, made):
    cli("prune", "--engine-dir", made, "--sizes", "4_3", "--yes")
    assert shapes(made) == {HERE: ["64x32"]}
    cli("prune", "--engine-dir", made, "--sizes", "3_4", "--yes")
    assert shapes(made) == {}


def test_adopt_takes_the_size_of_a_name_from_the_plan(cli, made, micro, micro_folder):
    """These files do not say what they are for, so the plan does."""
    (made / NAME).unlink()
    command = ("adopt", "--engine-dir", made, "--vae", micro_folder, "--trust", "--json")
    result = cli(*command, "--sizes", "4_3=64x32")
    assert result.code == 0 and "note" not in result.document["engines"][0]
    assert shapes(made) == {HERE: ["64x32"]}
    accelerate(micro, options(made))
    decoded(micro, latents("64x32"))


@pytest.mark.parametrize(
    ("task", "engines"),
    [
        (
            "t2i",
            {f"{name}/vae_{part}.fake" for name in ("16_9", "9_16", "1_1", "4_3", "3_4") for part in ("encoder", "decoder")},
        ),
        ("i2i", {"vae_encoder_multi_profile.fake", "vae_decoder_multi_profile.fake"}),
    ],
)
def test_a_task_alone_builds_the_guides_whole_directory(cli, fake, micro, micro_folder, tmp_path, task, engines):
    file, folder = tmp_path / "config.json", tmp_path / "engines"
    file.write_text(AccelConfig(backend="tensorrt", engine_dir=folder, verify=False).to_json())
    command = ("build", "--vae", micro_folder, "--config", file, "--task", task, "--json")
    decoders = {path for path in engines if "decoder" in path}
    assert set(by_path(cli(*command, "--method", "decode").document)) == decoders
    assert set(shapes(folder)) == decoders
    assert cli(*command).code == 0
    assert set(shapes(folder)) == engines
    profiles = shapes(folder)[sorted(engines)[-1]]
    assert len(profiles) == (9 if task == "i2i" else 1)
    with accelerate(micro, options(folder, task=task, verify=False)):
        assert fake.count("load") == 0, "loading stays lazy"


def test_build_says_which_methods_there_are(cli, micro_folder, tmp_path):
    result = cli("build", "--vae", micro_folder, "--engine-dir", tmp_path / "e", "--method", "decoder", "--json")
    assert result.code == 2 and "'decoder' is not one of encode, decode" in result.document["error"]["message"]
