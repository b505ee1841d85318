"""Reads stored results and says what a page shows of each: tables, a chart, pictures."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_vae_accel.bench import chart as bench_chart
from qwen_vae_accel.bench import kernels as bench_kernels
from qwen_vae_accel.bench import report as bench_report
from qwen_vae_accel.bench.report import optional_package
from qwen_vae_accel.bench.serve import chart as serve_chart
from qwen_vae_accel.bench.serve import report as serve_report
from qwen_vae_accel.demo import reload as demo
from qwen_vae_accel.documents import read_json
from qwen_vae_accel.errors import InvalidInputError, shown
from qwen_vae_accel.files import read_file
from qwen_vae_accel.page.svg import to_svg

SCHEMAS = {
    bench_report.KIND: bench_report.SCHEMA,
    serve_report.KIND: serve_report.SCHEMA,
    demo.KIND: demo.SCHEMA,
}
DEMO_FILE = "demo.json"
_PICTURES = ("PNG", "JPEG", "WEBP")
_LARGEST_PICTURE = 64 * 2**20
_LARGEST_RESULT = 2**20
_MOST_ROWS = 500


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts."""

    title: str
    columns: list[str]
    cells: list[list[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a data URI, with what is said of it."""

    name: str
    title: str
    line: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Section:
    """What the page shows of one result.

    Attributes:
        facts: name -> value, of the machine and the versions.
        charts: inline SVGs.
        pictures: those of the slider, in its order; then ``difference``.
    """

    title: str
    subtitle: str
    remarks: list[str]
    tables: list[Table]
    facts: dict[str, str]
    command: str = ""
    charts: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    difference: Picture | None = None


def read(path: Path) -> Section:
    """What a page shows of a result: the JSON of ``bench`` or ``serve-bench``, or the output folder of the demo.

    Raises:
        InvalidInputError: if the file cannot be read, is no such result, has another version of the schema, or names a
            picture that is not there or does not lie beside it.
        ConfigError: if matplotlib is not installed.
    """
    if os.path.isdir(path):
        path = path / DEMO_FILE
    document = _document(path)
    optional_package("matplotlib")
    make: Callable[[Mapping[str, Any], Path], Section] = _SECTIONS[document["kind"]]
    try:
        return make(document, path)
    except InvalidInputError:
        raise
    except Exception as error:  # whatever our tables and matplotlib make of values that anybody may have written
        why = f"{type(error).__name__}: {error}"
        raise InvalidInputError(f"{path} is a damaged result of {document['kind']} ({why[:300]}); measure again") from error


def _document(path: Path) -> dict[str, Any]:
    known = "the JSON of `bench` or `serve-bench`, or the demo's output folder"
    try:
        document = read_json(path, _LARGEST_RESULT)
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror or error}; give {known}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise InvalidInputError(f"{path} is no JSON: {error}; give {known}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise InvalidInputError(f"{path} is no result of this program; give {known}")
    # Results of bench had no kind at first.
    document.setdefault("kind", bench_report.KIND if "rows" in document else None)
    kind = document["kind"]
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise InvalidInputError(f"{path} is a result of kind {shown(kind)}; known are {', '.join(SCHEMAS)}")
    if document["schema"] != SCHEMAS[kind]:
        raise InvalidInputError(
            f"{path} has version {shown(document['schema'])} of the {kind} schema, this program reads {SCHEMAS[kind]}: "
            f"measure again, or use the version of this program that wrote it"
        )
    rows = document.get("rows", document.get("requests"))
    if isinstance(rows, list) and len(rows) > _MOST_ROWS:
        raise InvalidInputError(f"{path} has {len(rows)} rows; a page shows at most {_MOST_ROWS} of a result")
    return document


def _facts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name.removeprefix("package:").replace("_", " "): str(value) for name, value in facts.items()}


def _charts(*svgs: str) -> tuple[str, ...]:
    return tuple(svg for svg in svgs if svg)


def _bench(document: Mapping[str, Any], path: Path) -> Section:
    report = bench_report.BenchReport.from_dict(document)
    name = report.facts.get("device_name") if report.on_cuda else report.facts.get("cpu")
    return Section(
        title=f"The VAE alone, {report.settings['dtype']}: {name}",
        subtitle=f"{path.name}, {report.created}",
        remarks=[
            f"Weights: {report.settings['weights']}. Latency from an idle device to the result, median and 10th to 90th "
            f"percentile. Error: relative L2 against diffusers in float32. Speed-up: against diffusers eager in "
            f"{report.settings['dtype']}, same run.",
            *(line.removeprefix("- ") for line in report.remarks()),
        ],
        tables=[Table(title, *cells) for title, cells in report.sections()],
        facts=_facts(report.facts),
        command=report.command,
        charts=_charts(
            to_svg(lambda: bench_chart.draw(report), f"Milliseconds by method and size, {name}"),
            to_svg(lambda: bench_kernels.draw(report.kernels), f"Roofline of the fused kernels, {name}")
            if report.kernels
            else "",
        ),
    )


def _serve(document: Mapping[str, Any], path: Path) -> Section:
    values = dict(document)
    name = serve_report.machine_name(values)
    return Section(
        title=f"Whole requests: {name}",
        subtitle=f"{path.name}, {values['created']}",
        remarks=serve_report.remarks(values),
        tables=[Table(title, *cells) for title, cells in serve_report.sections(values)],
        facts=_facts(values["machine"]),
        command=str(values["command"]),
        charts=_charts(
            to_svg(lambda: serve_chart.draw(values), f"Milliseconds of each request by part, plain and accelerated, {name}")
        ),
    )


def _demo(document: Mapping[str, Any], path: Path) -> Section:
    photo = document["photo"]
    pictures = {name: _picture(path.parent, name, panel) for name, panel in photo["panels"].items()}
    difference = pictures.pop("difference")
    compared = tuple(pictures[name] for name in demo.PANELS if name != "difference")
    if len({(picture.width, picture.height) for picture in (*compared, difference)}) > 1:
        raise InvalidInputError(f"the pictures of {path} differ in size; run the demo again")
    times = []
    for method in ("encode", "decode"):
        theirs, ours = (float(photo[side][f"{method}_ms"]) for side in ("diffusers", "accelerated"))
        times.append([method, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}x"])
    quality = [[f"{float(photo['psnr_db'][name]):.2f}" for name in ("diffusers", "accelerated", "between")]]
    return Section(
        title=f"A photo through the VAE: {photo['image']}, {photo['size']}",
        subtitle=f"{path.parent.name}/{path.name}",
        remarks=[f"Model {document['model']}, {document['dtype']} on {document['device']}, backend {document['backend']}."],
        tables=[
            Table("Milliseconds", ["", "diffusers", "accelerated", "speed-up"], times),
            Table("PSNR, dB", ["diffusers to photo", "accelerated to photo", "accelerated to diffusers"], quality),
        ],
        facts={},
        pictures=compared,
        difference=difference,
    )


def _beside(folder: Path, name: str) -> Path:
    """The file ``name`` in ``folder`` or below it: a result must not bring other files of this machine into a page."""
    path = Path(os.path.realpath(folder / name))
    if os.path.isabs(name) or ".." in Path(name).parts or not path.is_relative_to(os.path.realpath(folder)):
        raise InvalidInputError(f"the picture {shown(name)} does not lie in {folder}, beside its result: it is not shown")
    return path


def _picture(folder: Path, name: str, panel: Mapping[str, str]) -> Picture:
    path = _beside(folder, panel["file"])
    try:
        data = read_file(path, _LARGEST_PICTURE)
        with Image.open(BytesIO(data), formats=_PICTURES) as image:
            image.load()
            kind, (width, height) = image.get_format_mimetype(), image.size
    except Exception as error:  # whatever Pillow makes of a file that anybody may have written
        named = str(path) if len(str(path)) <= 1000 else shown(str(path))
        why = getattr(error, "strerror", None) or shown(error)
        why = "it is not there" if isinstance(error, FileNotFoundError) else why
        raise InvalidInputError(f"cannot read the picture {named}: {why}; run the demo again") from error
    uri = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Picture(name, panel["title"], panel["line"], uri, width, height)


_SECTIONS: dict[str, Callable[[Mapping[str, Any], Path], Section]] = {
    bench_report.KIND: _bench,
    serve_report.KIND: _serve,
    demo.KIND: _demo,
}


def read_all(paths: Iterable[Path]) -> list[Section]:
    """The sections of all results, in their order; each result once."""
    return [read(path) for path in dict.fromkeys(paths)]
