"""Run the pipeline tests under several releases of diffusers, each in a virtual environment of its own.

    python tests/pipelines/matrix.py [RELEASE ...]

Prints a Markdown table of pipelines and releases, and writes it with the counts of every release to the folder of the
environments. Exits with 1 if a test failed. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RELEASES = ("0.36.0", "0.39.0", "0.42.1")
# An older diffusers wants an older hub; what the rest of the tests runs with stays as it is.
UNPINNED = ("diffusers", "huggingface_hub", "hf-xet", "httpcore2", "httpx2")
MATRIX_TESTS = (
    "test_images_of_the_plain_pipeline",
    "test_post_processing_is_bitwise",
    "test_bfloat16",
    "test_latents_need_no_decoder",
)
CASE = re.compile(r"(\w+)\[(.+)\]")


@dataclass
class Outcome:
    """What one release made of the tests."""

    counts: dict[str, int] = field(default_factory=lambda: {"passed": 0, "failed": 0, "skipped": 0})
    seconds: float = 0.0
    cases: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def environment(folder: Path, release: str, torch: str) -> Path:
    """The Python of a virtual environment with that release; made if it is not there. torch is pinned to ``torch``."""
    target = folder / release
    python = target / "bin" / "python"
    stamp = target / "installed"
    wanted = f"diffusers=={release} torch=={torch}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    venv.create(target, with_pip=True, clear=True)
    pins = [line for line in (ROOT / "constraints-dev.txt").read_text().splitlines() if line and not line.startswith("#")]
    kept = [line for line in pins if line.split("==")[0] not in (*UNPINNED, "torch")]
    constraints = target / "constraints.txt"
    # With its local version, a CPU build is all that pip can take: never gigabytes of CUDA libraries.
    constraints.write_text("\n".join([*kept, f"torch=={torch}", f"diffusers=={release}"]) + "\n")
    packages = [f"{ROOT}[pipelines]", "peft", "pytest", "pytest-timeout"]
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
    subprocess.run([*install, "-e", *packages], check=True)
    stamp.write_text(wanted)
    return python


def run(python: Path, folder: Path, release: str, arguments: list[str]) -> Outcome:
    """Run the pipeline tests; read what happened from pytest's JUnit file."""
    report = folder / f"{release}.xml"
    report.unlink(missing_ok=True)
    command = [
        str(python),
        "-m",
        "pytest",
        "tests/pipelines",
        "-q",
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}, check=False
    )
    outcome = Outcome(versions=versions(python))
    if not report.exists():
        outcome.counts["failed"] += 1
        outcome.failures.append("pytest wrote no report")
        return outcome
    for test in ElementTree.parse(report).iter("testcase"):
        outcome.seconds += float(test.get("time", 0))
        skipped = test.find("skipped")
        failed = test.find("failure") is not None or test.find("error") is not None
        status = "failed" if failed else "skipped" if skipped is not None else "passed"
        outcome.counts[status] += 1
        name = test.get("name", "")
        if failed:
            outcome.failures.append(name)
        match = CASE.fullmatch(name)
        if match and match[1] in MATRIX_TESTS:
            note = "not in this release" if skipped is not None and "has no" in skipped.get("message", "") else ""
            add(outcome.cases, match[2], status, note)
    return outcome


def add(cases: dict[str, str], case: str, status: str, note: str) -> None:
    """One failure makes a case fail, one success makes it pass."""
    before = cases.get(case, "")
    if status == "failed" or before == "failed":
        cases[case] = "failed"
    elif status == "passed" or before == "passed":
        cases[case] = "passed"
    else:
        cases[case] = note or before or "skipped"


def versions(python: Path) -> dict[str, str]:
    """Versions that matter, as installed."""
    code = (
        "import importlib.metadata as m, json;"
        "names = 'torch diffusers transformers accelerate huggingface_hub peft numpy pillow'.split();"
        "print(json.dumps({n: m.version(n) for n in names}))"
    )
    output = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    values: dict[str, str] = json.loads(output)
    return values


def table(outcomes: dict[str, Outcome]) -> str:
    """Markdown: a row for every pipeline, a column for every release."""
    cases = list(dict.fromkeys(case for outcome in outcomes.values() for case in outcome.cases))
    lines = ["| pipeline | " + " | ".join(outcomes) + " |", "|---" * (1 + len(outcomes)) + "|"]
    for case in cases:
        lines.append(f"| {case} | " + " | ".join(outcome.cases.get(case, "not run") for outcome in outcomes.values()) + " |")
    totals = (", ".join(f"{count} {status}" for status, count in outcome.counts.items()) for outcome in outcomes.values())
    lines.append("| all pipeline tests | " + " | ".join(totals) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=RELEASES, metavar="RELEASE", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix", help="where the environments are kept")
    parser.add_argument("--torch", default="2.13.0+cpu", help="torch to pin, with its local version (default: %(default)s)")
    parser.add_argument("--slow", action="store_true", help="run the slow tests too")
    options, arguments = parser.parse_known_args()
    arguments += [] if options.slow else ["-m", "not slow"]
    options.folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    for release in options.releases:
        print(f"diffusers {release}", flush=True)
        outcomes[release] = run(environment(options.folder, release, options.torch), options.folder, release, arguments)
    values = {release: vars(outcome) for release, outcome in outcomes.items()}
    (options.folder / "results.json").write_text(json.dumps(values, indent=2) + "\n")
    text = table(outcomes)
    (options.folder / "results.md").write_text(text + "\n")
    print(text)
    for release, outcome in outcomes.items():
        for failure in outcome.failures:
            print(f"diffusers {release}: {failure} failed", file=sys.stderr)
    return 1 if any(outcome.counts["failed"] for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
