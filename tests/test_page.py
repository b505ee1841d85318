"""The page of results: what it refuses, and how it behaves in a browser."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import tables
from qwen_vae_accel.bench import vae_sheet
from qwen_vae_accel.bench.harness import Row
from qwen_vae_accel.bench.serve import request_sheet
from qwen_vae_accel.bench.serve.measurement import Measurement
from qwen_vae_accel.bench.serve.pipelines import Pipelines
from qwen_vae_accel.bench.serve.request_sheet import make_document
from qwen_vae_accel.bench.stored import read_all
from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.demo.reload import Instructions, as_json, main
from qwen_vae_accel.page.console import to_terminal
from qwen_vae_accel.page.html import to_html
from qwen_vae_accel.page.markdown import to_markdown
from qwen_vae_accel.page.sheet import Answer, Chart, Drawing, Sheet, Table
from qwen_vae_accel.sizes import Size, parse_size
from qwen_vae_accel.terminal import Terminal
from tests import browser
from tests.helpers import CPU, DATA, ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.fixtures_cli import Cli

pytest_plugins = ["tests.fixtures_cli"]

BENCH = ROOT / "benchmarks" / "results" / "cpu_512_fp32.json"


@pytest.fixture(scope="session")
def results(micro_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one result of each kind: ``bench.json``, ``serve.json``, ``demo/``."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copy(BENCH, folder / "bench.json")
    pipelines = Pipelines(micro_folder, "tiny", CPU, torch.float32)
    rows, memory = Measurement(pipelines, 1, "auto", None, lambda line: None).run({"t2i": [Size(64, 32), Size(32, 64)]})
    settings = {"backend": "auto", "repeats": 1, "dtype": "fp32", "weights": "micro", "transformer": "tiny"}
    document = make_document(rows, memory, None, {"device": "cpu", "cpu": "Some CPU"}, settings, "serve-bench")
    (folder / "serve.json").write_text(json.dumps(document))
    demo = folder / "demo"
    demo.mkdir()
    config = AccelConfig(task="i2i", backend="eager").as_dict()
    instructions = Instructions(
        str(micro_folder), str(DATA / "photos" / "coffee.png"), 96 * 64, "float32", "cpu", config, str(demo), repeats=1
    )
    (demo / "request.json").write_text(as_json(instructions))
    assert main(str(demo / "request.json")) == 0
    return folder


@pytest.fixture
def own(results: Path, tmp_path: Path) -> Path:
    """A copy of the results, to damage."""
    return Path(shutil.copytree(results, tmp_path / "results"))


# What is refused.


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "not there": ("none.json", lambda folder: None, "cannot read .*none.json: No such file"),
    "no demo in the folder": ("", lambda folder: None, "cannot read .*demo.json: No such file"),
    "no JSON": ("serve.json", lambda folder: (folder / "serve.json").write_text("# Table"), "serve.json is no JSON"),
    "bytes": ("serve.json", lambda folder: (folder / "serve.json").write_bytes(b"\x89PNG\xff"), "serve.json is no JSON"),
    "a list": ("serve.json", lambda folder: (folder / "serve.json").write_text("[]"), "no result of this program"),
    "another JSON": ("demo/request.json", lambda folder: None, "no result of this program"),
    "another kind": (
        "serve.json",
        lambda folder: edit(folder / "serve.json", lambda d: d.update(kind="tune")),
        "kind 'tune'; known are bench, serve-bench, demo",
    ),
    "another schema": (
        "bench.json",
        lambda folder: edit(folder / "bench.json", lambda d: d.update(schema=7)),
        "has version 7 of the bench schema, this program reads 1",
    ),
    "a row without a size": (
        "bench.json",
        lambda folder: edit(folder / "bench.json", lambda d: d["rows"][0].pop("size")),
        "bench.json is a damaged result of bench .*'size'",
    ),
    "a side without times": (
        "serve.json",
        lambda folder: edit(folder / "serve.json", lambda d: d["requests"][0]["plain"].pop("median")),
        "serve.json is a damaged result of serve-bench .*'median'",
    ),
    "a picture gone": (
        "demo",
        lambda folder: (folder / "demo" / "panels" / "diffusers.png").unlink(),
        "cannot read the picture .*diffusers.png: it is not there; run the demo again",
    ),
    "a picture cut off": (
        "demo",
        lambda folder: os.truncate(folder / "demo" / "panels" / "photo.png", 900),
        "cannot read the picture .*photo.png",
    ),
    "a picture of another size": (
        "demo/demo.json",
        lambda folder: shutil.copy(DATA / "photos" / "coffee.png", folder / "demo" / "panels" / "accelerated.png"),
        "differ in size",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_result_is_refused_and_nothing_overwritten(cli: Cli, own: Path, tmp_path: Path, name: str) -> None:
    file, damage, message = DAMAGE[name]
    page = tmp_path / "page" / "report.html"
    page.parent.mkdir()
    page.write_text("the page before")
    damage(own)
    result = cli("report", own / "bench.json", own / file, "-o", page, "--json")
    assert result.code == 2
    assert result.document["error"]["type"] == "InvalidInputError"
    assert re.search(message, result.document["error"]["message"])
    assert page.read_text() == "the page before"
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_the_page_goes_to_a_file_of_its_own(cli: Cli, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for output, message in ((own, "is a folder"), (own / "bench.json", "one of the results")):
        before = (own / "bench.json").read_bytes()
        result = cli("report", own / "bench.json", "-o", output)
        assert result.code == 2
        assert message in " ".join(result.stderr.split())
        assert (own / "bench.json").read_bytes() == before
    page = tmp_path / "deep" / "page.html"
    assert cli("report", own / "bench.json", "-o", page).code == 0
    before = page.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = cli("report", own / "serve.json", "-o", page)
    assert result.code == 2
    assert "No space left" in result.stderr
    assert page.read_bytes() == before
    assert list(page.parent.iterdir()) == [page]


STORED = [path for path in sorted(BENCH.parent.glob("*.json")) if "kind" in json.loads(path.read_text())]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_what_lies_beside_a_stored_result_is_made_of_it(path: Path) -> None:
    document = json.loads(path.read_text())
    make = {"bench": vae_sheet.make_sheet, "serve-bench": request_sheet.make_sheet}[document["kind"]]
    sheet = make(document)
    if path.with_suffix(".md").exists():
        assert to_markdown(sheet) == path.with_suffix(".md").read_text()
    charts = [block for block in sheet.blocks if isinstance(block, Chart)]
    assert charts and all(panel.title and len(panel.title) <= 60 for chart in charts for panel in chart.panels)


@pytest.mark.parametrize("name", ["cpu_512_fp32", "h200"])
def test_a_stored_benchmark_says_of_itself_what_its_rows_say(name: str) -> None:
    document = json.loads((BENCH.parent / f"{name}.json").read_text())
    known = {field.name for field in dataclasses.fields(Row)}
    rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in document["rows"]]
    rows = [dataclasses.replace(row, size=parse_size(str(row.size))) for row in rows]
    settings, overhead, kernels = document["settings"], document["overhead"], document.get("kernels")
    made = vae_sheet.make_document(rows, document["machine"], settings, overhead, document["command"], kernels)
    assert {**made, "created": document["created"]} == document


def test_a_roofline_is_drawn_without_formulas() -> None:
    (sheet,) = read_all([BENCH.parent / "h200.json"])
    roofline = next(block for block in sheet.blocks if isinstance(block, Drawing) and block.title == "Roofline")
    assert "Fused kernels" in roofline.svgs[0] and "mathdefault" not in roofline.svgs[0]
    assert "Kernels of fused decode, 1024x1024 bf16" in [block.title for block in sheet.blocks if isinstance(block, Table)]


def test_markdown_keeps_its_columns_whatever_a_cell_holds() -> None:
    sheet = Sheet("A title", Answer((), ""), [Table("Two", ["a", "b"], [["x | y", "1\n2"]])])
    table = to_markdown(sheet).splitlines()[-3:]
    assert table == ["| a      |   b |", "| ------ | --: |", "| x \\| y | 1 2 |"]


def test_a_terminal_shows_every_table_and_ends_with_the_answer() -> None:
    sheet = vae_sheet.make_sheet(json.loads((BENCH.parent / "h100.json").read_text()))
    terminal = Terminal(width=160, file=io.StringIO())
    with terminal.capture() as shown:
        terminal.print(to_terminal(sheet))
    shown_tables = [block for block in sheet.blocks if isinstance(block, Table)]
    assert len(shown_tables) == 1 + 2 + 2 + 3
    assert all(table.title in shown.get() for table in shown_tables)
    assert shown.get().split("\n")[-2] == str(sheet.answer)
    result = tables.Bench("h100")
    decode, encode = (tables.mean(result.faster(task, "fused bf16", "diffusers bf16")) for task in tables.TASKS)
    assert str(sheet.answer).startswith(f"decode {decode:.2f}x, encode {encode:.2f}x: fused bf16 against diffusers bf16")


# In a browser.


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = browser.find()
    if path is None:
        pytest.skip(f"no browser: `make browser`, or {browser.HOW}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=path, args=list(browser.ARGUMENTS))
        yield instance
        instance.close()


@pytest.fixture
def opened(cli: Cli, results: Path, tmp_path: Path, chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of all results; whatever the browser asked for or complained about is checked at the end."""
    target = tmp_path / "report.html"
    assert cli("report", results / "demo", results / "bench.json", results / "serve.json", "-o", target).code == 0
    asked: list[str] = []
    complaints: list[str] = []
    pages = []

    def open_page(width: int = 1280, scheme: str = "light", path: Path = target) -> Page:
        page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []
    assert {url for url in asked if not url.startswith("data:")} <= {path.as_uri() for path in tmp_path.glob("*.html")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_opens_from_disk_at_any_width(opened: Callable[..., Page], width: int, scheme: str) -> None:
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.get_by_role("heading", level=2).count() == 3
    assert page.locator(".chart svg").count() == 2 + 2
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    background, ink = page.evaluate("(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))")
    values = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (background, ink)]
    assert values[0] - values[1] > 500 if scheme == "light" else values[1] - values[0] > 500
    assert page.evaluate("getComputedStyle(document.querySelector('.chart svg text')).fill") == ink


SIDEWAYS = "[...document.querySelectorAll('.box')].filter(box => box.scrollWidth > box.clientWidth).map(box => box.ariaLabel)"
PLACES = """selector => [...document.querySelectorAll(selector)].map(found => {
  const box = found.getBoundingClientRect();
  return {text: found.textContent.trim(), left: box.left, right: box.right, top: box.top + scrollY, height: box.height};
})"""


@pytest.fixture(scope="session")
def h100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of the benchmark with the most sizes and methods."""
    target = tmp_path_factory.mktemp("page") / "h100.html"
    target.write_text(to_html(read_all([BENCH.parent / "h100.json"]), "H100", "0"), encoding="utf-8")
    return target


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_of_a_benchmark_opens_with_the_answer_and_nothing_scrolls_sideways(
    chromium: Browser, h100: Path, width: int
) -> None:
    document = json.loads((BENCH.parent / "h100.json").read_text())
    means = {entry["task"]: entry["speedup"] for entry in document["summary"] if entry["method"] == "fused bf16"}
    page = chromium.new_page(viewport={"width": width, "height": 800}, offline=True)
    page.goto(h100.as_uri())
    figures = page.evaluate(PLACES, ".answer dd")
    assert [figure["text"] for figure in figures] == [f"{means[task]:.2f}x" for task in ("decode", "encode")]
    assert all(figure["top"] + figure["height"] < 800 for figure in figures)
    charts = page.evaluate(PLACES, ".chart svg")
    tables = page.evaluate(PLACES, ".box")
    assert len(charts) == 3 and charts[0]["top"] > figures[0]["top"]
    assert all(0 <= place["left"] < place["right"] <= width for place in (*charts, *tables) if place["height"])
    # The chart of the speed-ups comes first, is named, and can be read: no letter is lower than 8 pixels.
    assert page.locator("svg").nth(0).get_attribute("aria-label").startswith("Speed-up by size")
    assert all(size in charts[0]["text"] for size in document["settings"]["sizes"])
    assert min(word["height"] for word in page.evaluate(PLACES, ".chart svg text")) >= 8
    # What is long is folded; all else fits. Unfolded it scrolls in its box, and the page does not.
    assert page.evaluate(SIDEWAYS.replace("'.box'", "'.box:not(details *)'")) == []
    assert page.get_by_role("table").count() == 1 + 2
    assert page.get_by_role("columnheader", name="fused bf16").count() == 3
    for fold in page.locator("summary").all():
        fold.click()
    assert page.get_by_role("table").count() == 1 + 2 + 2 + 3
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert bool(page.evaluate(SIDEWAYS)) == (width == 390)
    page.close()


def test_the_slider_moves_by_keyboard_and_pointer(opened: Callable[..., Page]) -> None:
    page = opened(360)
    slider = page.get_by_role("slider", name=re.compile("Divider"))
    right = page.locator(".stage img.right")
    assert right.get_attribute("data-name") == "accelerated"
    assert page.locator(".stage img.left").get_attribute("data-name") == "diffusers"
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "53"
    assert slider.get_attribute("aria-valuetext") == "53 % diffusers, 47 % accelerated (eager)"
    clip = "image => getComputedStyle(image).clipPath"
    assert right.evaluate(clip) == "inset(0px 0px 0px 53%)"
    page.keyboard.press("Home")
    assert right.evaluate(clip) == "inset(0px 0px 0px 0%)"
    page.get_by_role("combobox", name="Left").select_option("photo")
    assert page.locator(".stage img.left").get_attribute("data-name") == "photo"
    assert page.locator(".stage img").evaluate_all("all => all.map(image => getComputedStyle(image).visibility)") == [
        "visible",
        "hidden",
        "visible",
    ]
    box = page.locator(".stage").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 10, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 20, steps=4)
    page.mouse.up()
    assert slider.input_value() == "75"
    assert "Grey is no difference" in page.locator("figure").last.inner_text()


def test_a_result_cannot_bring_code_into_the_page(cli: Cli, own: Path, tmp_path: Path, opened: Callable[..., Page]) -> None:
    evil = "<img src=x onerror=\"document.title='taken'\">$\\frac{</svg><script>document.title='taken'</script>"

    def change(document: dict[str, Any]) -> None:
        document["rows"][0]["method"] = document["machine"]["cpu"] = document["command"] = evil

    edit(own / "bench.json", change)
    target = tmp_path / "evil.html"
    assert cli("report", own / "bench.json", "-o", target, "--title", evil).code == 0
    page = opened(path=target)
    assert page.title() == evil
    assert page.locator("img, script").count() == 1  # the page's own
    assert page.get_by_role("columnheader", name=re.compile("taken")).count() > 0
