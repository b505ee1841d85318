"""What TensorRT says, and what must not happen while it says it."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from qwen_vae_accel.backends.tensorrt import flavour as flavours
from qwen_vae_accel.backends.tensorrt.logs import collector_paused

# A builder in a cycle is destroyed by the collector, which may begin with any new object: here inside a logger.
_BUILDERS = """
import gc, logging
from qwen_vae_accel.backends.tensorrt import flavour
from qwen_vae_accel.backends.tensorrt.logs import collector_paused, make_logger

class Cycle:
    pass

class Handler(logging.Handler):
    def emit(self, record):
        print("logged")
        if gc.isenabled():
            gc.collect()

trt = flavour.RTX.bindings()
logger = logging.getLogger("qwen_vae_accel")
cycle = Cycle()
cycle.me, cycle.builder = cycle, trt.Builder(make_logger(trt))
logger.addHandler(Handler())
logger.setLevel(logging.DEBUG)
with collector_paused():
    del cycle
    trt.Builder(make_logger(trt))
"""


def test_a_builder_is_not_destroyed_while_another_one_logs(rtx: flavours.Flavour) -> None:
    result = subprocess.run([sys.executable, "-c", _BUILDERS], capture_output=True, text=True, timeout=60, check=True)
    assert "logged" in result.stdout


def test_blocks_that_overlap_leave_the_collector_as_it_was() -> None:
    assert gc.isenabled()
    first, second = collector_paused(), collector_paused()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused(), pytest.raises(KeyError), collector_paused():
            raise KeyError
        assert not gc.isenabled()
    finally:
        gc.enable()
