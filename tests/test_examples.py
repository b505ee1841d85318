"""The programs of ``examples/`` run as they are, offline, and say what they are there to show."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
import torch

from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"
RUNS: dict[str, tuple[str, list[str]]] = {
    "one_liner.py": ("", [r"decode +│ eager", r"two images: \d\.\de-0[5-9]"]),
    "text_to_image_static_engines.py": (
        "static",
        [r"decode +│ inductor +│ +2", r"decode +│ eager +│ +1", r"1 loads", "96x64 is not a"],
    ),
    "editing_multi_profile.py": (
        "dynamic",
        [r"encode +│ inductor +│ +3", r"decode +│ inductor +│ +3", "2 loads", r"96x64: \(96, 64\)"],
    ),
    "mixed_precision.py": ("", [r"encode float32 +decode bfloat16 +\d+\.\d dB", r"decode float32 +\d\d\d\.\d dB"]),
    "prebuild_engines.py": ("static", ["built: nothing, all engines are current", "loaded 64x64", r"\{'inductor': 1\}"]),
    "threaded_serving.py": ("", ["16 of 16 images", r"decode +│ eager +│ +32"]),
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*RUNS, "several_gpus.py"}  # that one in test_share.py


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if folder else ()) for name, (folder, _) in RUNS.items()]
)
def test_example(request, monkeypatch, tmp_path, capsys, name):
    folder, patterns = RUNS[name]
    engines = [str(request.getfixturevalue("inductor_dir") / folder)] if folder else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [name, *engines])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    output = capsys.readouterr().out
    for pattern in patterns:
        assert re.search(pattern, output), f"{pattern!r} is not in\n{output}"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", RUNS)
def test_examples_are_short(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"examples/{name}" in text, "it does not say how to run it"
