"""Launches, places in memory, packed weights and machine code are those that were recorded.

After a change that is meant to change them, ``python -m tests.kernels.fingerprints --code --write`` records them anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.fingerprints import machine_code, plans
from tests.kernels.fingerprints.__main__ import differences, recorded

AGAIN = "python -m tests.kernels.fingerprints --code --write records them anew"


def test_launches_and_places_in_memory_are_the_recorded_ones():
    """All sizes on the GPU that has all kernels; on the others the last."""
    found = plans.plans(lambda name: "H200, " in name or name.endswith("3x72x91"))
    assert len(found) == 3 * (6 + 3) + 3 * 6
    assert not differences(found, recorded()["plans"]), AGAIN


def test_packed_weights_are_the_recorded_ones():
    assert not differences(plans.weights(), recorded()["weights"]), AGAIN


def test_the_recorded_machine_code_is_of_these_sources():
    assert not differences(machine_code.sources(), recorded()["sources"]), AGAIN


@pytest.fixture(scope="module")
def samples():
    """Made by the compilers that are here, in a process where Triton does not interpret."""
    code = "import json; from tests.kernels.fingerprints import machine_code as m; print(json.dumps(m.samples()))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("compiler", machine_code.SAMPLES)
def test_a_sample_of_the_machine_code_is_the_recorded_one(compiler, request):
    here, made_by = machine_code.versions()[compiler], recorded()["compilers"][compiler]
    if here != made_by:
        pytest.skip(f"machine code was recorded with {compiler} {made_by}, here is {here or 'none'}")
    assert request.getfixturevalue("samples")[compiler] == recorded()["samples"][compiler], AGAIN


def test_a_difference_is_told():
    before = {"a": "1", "b": "2"}
    assert differences({"a": "1", "b": "3", "c": "4"}, before) == ["b: 2 -> 3", "c: None -> 4"]
