"""The report: what it counts, as JSON values and as a table."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from rich.console import Console

from qwen_vae_accel import accelerate
from qwen_vae_accel.journal import ORIGINAL, Banded, EngineLoad, Journal
from tests.helpers import decoded, randn


def filled() -> Journal:
    journal = Journal()
    for _ in range(3):
        journal.served("decode", "inductor")
    journal.served("encode", "eager")
    journal.load(EngineLoad("16_9/vae_decoder.pt2", "inductor", 12.5, 2_000_000))
    journal.load(EngineLoad("1_1/vae_decoder.pt2", "inductor", 10.0, 1_000_000))
    journal.build("16_9/vae_decoder.pt2", 31.0)
    journal.verify("16_9/vae_decoder.pt2", 80.0)
    journal.evict()
    return journal


def test_values(caplog):
    journal = filled()
    for reason in ("no [engine]", "no [engine]", "another reason"):
        journal.served("encode", "eager", reason)
    journal.served("decode", ORIGINAL, "2 frames")
    assert caplog.messages == [
        "encode is served by eager: no [engine]",
        "encode is served by eager: another reason",
        "decode is served by diffusers: 2 frames",
    ], "each reason once"
    for bands, reason in ((3, "a limit"), (8, "a lower limit"), (3, "a limit")):
        journal.banded(Banded("decode", "4096x4096", "fused", bands, reason))
    journal.compute("decode", torch.bfloat16, torch.float32, "a reason")
    values = journal.report("inductor", ["1_1/vae_decoder.pt2"], "a note").as_dict()
    assert values == {
        "backend": "inductor",
        "calls": {"encode": {"eager": 4}, "decode": {"inductor": 3, "diffusers": 1}},
        "fallbacks": [
            {"method": "encode", "backend": "eager", "reason": "no [engine]", "count": 2},
            {"method": "encode", "backend": "eager", "reason": "another reason", "count": 1},
            {"method": "decode", "backend": "diffusers", "reason": "2 frames", "count": 1},
        ],
        "bands": [
            {"method": "decode", "size": "4096x4096", "backend": "fused", "bands": 3, "reason": "a limit", "count": 2},
            {"method": "decode", "size": "4096x4096", "backend": "fused", "bands": 8, "reason": "a lower limit", "count": 1},
        ],
        "engines": ["1_1/vae_decoder.pt2"],
        "loads": 2,
        "evictions": 1,
        "load_ms": [
            {"engine": "16_9/vae_decoder.pt2", "backend": "inductor", "ms": 12.5, "nbytes": 2_000_000},
            {"engine": "1_1/vae_decoder.pt2", "backend": "inductor", "ms": 10.0, "nbytes": 1_000_000},
        ],
        "builds": [{"engine": "16_9/vae_decoder.pt2", "seconds": 31.0}],
        "self_checks": [{"engine": "16_9/vae_decoder.pt2", "ms": 80.0}],
        "offloaded_bytes": 0,
        "arithmetic": {"decode": "bfloat16 is computed in float32: a reason"},
        "left_alone": [],
        "note": "a note",
    }
    assert json.loads(json.dumps(values)) == values


def test_a_report_is_a_snapshot():
    journal = filled()
    before = journal.report("auto", [])
    journal.served("decode", "inductor")
    assert before.as_dict()["calls"]["decode"] == {"inductor": 3}


@pytest.mark.parametrize("show", ["print", "rich"])
def test_tables(show):
    journal = filled()
    journal.served("encode", "eager", "not [bold]served[/bold] at 8x8")
    report = journal.report("inductor", ["1_1/vae_decoder.pt2"], "the VAE was replaced")
    if show == "rich":
        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(report)
        text = capture.get()
    else:
        text = str(report)
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "inductor" in text and "2 loads, 1 releases" in text and "the VAE was replaced" in text
    assert "3" in rows["decode"] and "12.5" in rows["16_9/vae_decoder.pt2"]
    assert "no" in rows["16_9/vae_decoder.pt2"] and "yes" in rows["1_1/vae_decoder.pt2"]
    assert "not [bold]served[/bold] at 8x8" in text, "reasons are text, not markup"


def test_an_empty_report(micro):
    report = accelerate(micro, backend="eager").report()
    assert report.as_dict()["calls"] == {"encode": {}, "decode": {}}
    assert report.as_dict()["loads"] == report.as_dict()["evictions"] == 0
    assert "eager" in str(report)


def test_counts_of_many_threads():
    journal = Journal()

    def count() -> None:
        for _ in range(500):
            journal.served("decode", "eager", "reason")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = journal.report("eager", []).as_dict()
    assert values["calls"]["decode"] == {"eager": 4000} and values["fallbacks"][0]["count"] == 4000


@pytest.mark.usefixtures("no_grad")
def test_a_handle_counts_its_own_calls(micro, tiny):
    first, second = accelerate(micro), accelerate(tiny)
    decoded(micro, randn(1, 4, 1, 2, 2))
    decoded(tiny, randn(1, 16, 1, 2, 2))
    decoded(tiny, randn(1, 16, 1, 2, 2))
    assert first.report().as_dict()["calls"]["decode"] == {"eager": 1}
    assert second.report().as_dict()["calls"]["decode"] == {"eager": 2}
