"""The numeric tests as other machines would run them: with fewer vector instructions, and with two threads.

``ATEN_CPU_CAPABILITY`` bounds what PyTorch's own kernels use, ``ONEDNN_MAX_CPU_ISA`` what the convolutions use; a machine that
has less than a setting allows runs what it has. Each value of each is run, not every combination.

python -m tests.numeric [--only N ...] [pytest's arguments]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.helpers import ROOT

THREADS = "QWEN_VAE_ACCEL_TEST_THREADS"  # read by conftest.py


@dataclass(frozen=True)
class Setting:
    """Environment variables of one run; None leaves the variable unset."""

    aten: str | None
    onednn: str | None
    threads: int

    def environment(self) -> dict[str, str]:
        """The variables of this process with those of the setting."""
        values = {"ATEN_CPU_CAPABILITY": self.aten, "ONEDNN_MAX_CPU_ISA": self.onednn, THREADS: str(self.threads)}
        rest = {name: value for name, value in os.environ.items() if name not in values}
        return {**rest, "OMP_NUM_THREADS": str(self.threads), **{name: value for name, value in values.items() if value}}

    def row(self, result: str, seconds: float) -> str:
        """A row of the table."""
        return f"{self.aten or 'unset':<12}{self.onednn or 'unset':<12}{self.threads:<9}{seconds:>6.0f} s   {result}"


SETTINGS = (
    Setting("default", "SSE41", 1),
    Setting("avx2", "AVX2", 2),
    Setting(None, None, 1),
    Setting("default", None, 2),
    Setting(None, "SSE41", 2),
    Setting("avx2", None, 1),
)


def run(setting: Setting, arguments: list[str]) -> tuple[bool, str, float]:
    """Whether the tests passed, what pytest's last line says, and seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "numeric and not slow and not gpu", "-q", *arguments]
    process = subprocess.run(command, cwd=ROOT, env=setting.environment(), stdout=subprocess.PIPE, text=True)
    lines = process.stdout.strip().splitlines() or [""]
    if process.returncode:
        print(process.stdout)
    return process.returncode == 0, re.sub(r" in [\d.]+s.*|=", "", lines[-1]).strip(), time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", metavar="N", help="numbers of the settings to run, from 0")
    options, arguments = parser.parse_known_args()
    good = True
    print(f"{'aten':<12}{'onednn':<12}{'threads':<9}", flush=True)
    for index, setting in enumerate(SETTINGS):
        if options.only is None or index in options.only:
            passed, result, seconds = run(setting, arguments)
            print(setting.row(result, seconds), flush=True)
            good = good and passed
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
