"""``python -m tests.kernels.fingerprints``: print the fingerprints, and fail where they are not the recorded ones.

    --code           machine code, too: minutes; NVRTC must be found for sm90's
    --only TEXT      of the machine code, only networks and GPUs whose name has TEXT in it
    --write          record what was found, and print what was recorded before

After a change that is meant to change kernels: run it with ``--code --write``, with the versions of Triton and NVRTC that are
recorded, and put what it prints into the commit's message. NVRTC needs no GPU: ``pip install --target DIR
nvidia-cuda-nvrtc==13.0.*``, then ``PYTHONPATH=.:DIR LD_LIBRARY_PATH=DIR/nvidia/cu13/lib``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.kernels.fingerprints import machine_code, plans

RECORDED = Path(__file__).parent / "recorded.json"


def recorded() -> dict[str, dict[str, str]]:
    """Sections of fingerprints, each by name; ``compilers`` are the versions that made the machine code."""
    return json.loads(RECORDED.read_text())


def differences(found: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """One line for each fingerprint that is not as ``before``."""
    return [f"{name}: {before.get(name)} -> {value}" for name, value in found.items() if before.get(name) != value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {"plans": plans.plans(), "weights": plans.weights()}
    if options.code:
        found["compilers"] = machine_code.versions()
        found["sources"] = machine_code.sources()
        found["samples"] = machine_code.samples()
        found["machine code"] = machine_code.machine_code(lambda name: options.only in name)
    before = recorded() if RECORDED.exists() else {}
    changed = []
    for section, values in found.items():
        for name, value in values.items():
            print(f"{section}, {name}: {value}")
        changed += [f"{section}, {line}" for line in differences(values, before.get(section, {}))]
    print(f"{len(changed)} differ from the recorded ones", *changed, sep="\n", file=sys.stderr)
    if options.write:
        merged = {section: {**before.get(section, {}), **values} for section, values in found.items()}
        RECORDED.write_text(json.dumps({**before, **merged}, indent=1) + "\n")
        return 0
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
