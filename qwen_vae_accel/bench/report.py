"""What a benchmark leaves behind: JSON with machine and versions, a Markdown table, a chart."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from qwen_vae_accel.backends.base import Environment
from qwen_vae_accel.bench import kernels
from qwen_vae_accel.bench.cases import BASELINE, TASKS
from qwen_vae_accel.bench.harness import Row, geometric_mean
from qwen_vae_accel.bench.published import LABEL, milliseconds
from qwen_vae_accel.documents import dump_json
from qwen_vae_accel.errors import ConfigError
from qwen_vae_accel.files import write_output
from qwen_vae_accel.plan import parse_size
from qwen_vae_accel.terminal import plain

SCHEMA = 1
KIND = "bench"


def machine(device: torch.device) -> dict[str, Any]:
    """What the measurements were made on."""
    facts: dict[str, Any] = dict(Environment.detect(device).describe())
    facts["cpu"] = _cpu_name()
    facts["cpu_cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["torch_threads"] = torch.get_num_threads()
    if hasattr(os, "getloadavg"):
        # Of the minute before: what else this machine was doing.
        facts["load_average"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        facts["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


class BenchReport:
    """The rows of one run and what follows from them.

    Args:
        rows: one per case.
        facts: see :func:`machine`.
        settings: what was asked for.
        overhead: see :func:`qwen_vae_accel.bench.overhead.overhead`.
        command: the command line.
        kernel_times: see :func:`qwen_vae_accel.bench.kernels.measure`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        facts: Mapping[str, Any],
        settings: Mapping[str, Any],
        overhead: Mapping[str, float | int] | None,
        command: str,
        kernel_times: dict[str, Any] | None = None,
    ) -> None:
        self.rows = tuple(rows)
        self.facts = dict(facts)
        self.settings = dict(settings)
        self.overhead = None if overhead is None else dict(overhead)
        self.command = command
        self.kernels = kernel_times
        self.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        dtype = self.settings.get("dtype")
        self._baseline = {
            (row.task, row.size): row.median_ms
            for row in self.rows
            if row.method == BASELINE and row.dtype == dtype and row.median_ms
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> BenchReport:
        """The report that :meth:`as_dict` made a document of.

        Raises:
            KeyError, TypeError, ValueError: if it is none.
        """
        known = {field.name for field in dataclasses.fields(Row)}
        rows = []
        for values in document["rows"]:
            kept = {name: value for name, value in values.items() if name in known}
            if kept["task"] not in TASKS:
                raise ValueError(f"task {kept['task']!r} is neither encode nor decode")
            numbers = {"psnr_db": None if kept["psnr_db"] is None else float(kept["psnr_db"])}
            rows.append(Row(**{**kept, "size": parse_size(kept["size"]), **numbers}))
        facts, settings, overhead = document["machine"], document["settings"], document["overhead"]
        report = cls(rows, facts, settings, overhead, document["command"], document.get("kernels"))  # older: none
        report.created = str(document["created"])
        return report

    @property
    def on_cuda(self) -> bool:
        """Whether the published GPU figures may stand beside these."""
        return self.facts.get("device") == "cuda"

    @property
    def tasks(self) -> list[str]:
        """The tasks of the rows, in their order."""
        return list(dict.fromkeys(row.task for row in self.rows))

    def speedup(self, row: Row) -> float | None:
        """Times faster than diffusers eager in the run's dtype, same task and size."""
        base = self._baseline.get((row.task, row.size))
        return base / row.median_ms if base and row.median_ms else None

    def summary(self) -> list[dict[str, Any]]:
        """Geometric means of the speed-ups over sizes, by method and task."""
        found = []
        for task in self.tasks:
            for label in dict.fromkeys(row.label for row in self.rows):
                ratios = [self.speedup(row) for row in self.rows if row.task == task and row.label == label]
                known = [ratio for ratio in ratios if ratio is not None]
                if known:
                    found.append({"method": label, "task": task, "speedup": geometric_mean(known), "sizes": len(known)})
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = []
        for row in self.rows:
            values = dataclasses.asdict(row)
            values["size"] = str(row.size)
            values["speedup"] = self.speedup(row)
            if self.on_cuda:
                values["published_tensorrt_h100_ms"] = milliseconds(row.task, row.size)
            rows.append({name: _finite(value) for name, value in values.items()})
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "created": self.created,
            "command": self.command,
            "machine": self.facts,
            "settings": self.settings,
            "rows": rows,
            "summary": self.summary(),
            "overhead": self.overhead,
            "kernels": self.kernels,
        }

    # Text.

    def markdown(self) -> str:
        """A document with one table per task."""
        name = self.facts.get("device_name") if self.on_cuda else self.facts.get("cpu")
        versions = ", ".join(
            f"{key.removeprefix('package:')} {v}" for key, v in self.facts.items() if key.startswith("package:")
        )
        lines = [
            f"# Qwen-Image VAE on {name}",
            "",
            f"{self.created}, {versions}.",
            "",
            f"`{self.command}`",
            "",
            f"Weights: {self.settings.get('weights')}. Latency from an idle device to the result, median and 10th to 90th "
            "percentile. Error: relative L2 against diffusers in float32. Speed-up: against diffusers eager in "
            f"{self.settings.get('dtype')}, same run.",
            "",
        ]
        for title, (columns, cells) in self.sections():
            lines += [f"## {title}", "", _github(columns, cells), ""]
        return "\n".join([*lines, *self.remarks(), ""])

    def sections(self) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
        """Titles of the tables, with their headings and rows."""
        return [*((task.capitalize(), self.cells(task)) for task in self.tasks), *kernels.sections(self.kernels)]

    def cells(self, task: str) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of the table of ``task``."""
        rows = [row for row in self.rows if row.task == task]
        memory = any(row.peak_mib is not None for row in rows)
        columns = ["size", "method", "ms", "p10-p90", "speed-up", "error", "PSNR dB", "first call s"]
        columns += ["peak MiB"] if memory else []
        cells = []
        for row in rows:
            if row.median_ms is None or row.p10_ms is None or row.p90_ms is None:
                cells.append([str(row.size), row.label, "failed", *[""] * (len(columns) - 3)])
                continue
            ratio = self.speedup(row)
            spread = f"{_digits(row.p10_ms)}-{_digits(row.p90_ms)}"
            cell = [str(row.size), row.label, _digits(row.median_ms), spread, f"{ratio:.2f}x" if ratio else ""]
            cell += [f"{row.relative_l2:.1e}", f"{row.psnr_db:.1f}", f"{row.prepare_s:.1f}"]
            cells.append(cell + ([f"{row.peak_mib:.0f}"] if memory else []))
        cells += self._published(task, rows, len(columns))
        for entry in self.summary():
            if entry["task"] == task and entry["sizes"] > 1:
                cell = ["geometric mean", entry["method"], "", "", f"{entry['speedup']:.2f}x"]
                cells.append(cell + [""] * (len(columns) - len(cell)))
        return columns, cells

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        for task in self.tasks:
            columns, cells = self.cells(task)
            table = Table(title=task, title_justify="left")
            for index, column in enumerate(columns):
                table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
            for cell in cells:
                table.add_row(*cell)
            parts.append(table)
        parts += [plain(line) for line in self.remarks()]
        return Group(*parts)

    def remarks(self) -> list[str]:
        """What the tables do not say: failures, the plugin's cost."""
        lines = [f"- failed: {row.label}, {row.task} {row.size}: {row.error.splitlines()[0]}" for row in self.rows if row.error]
        if self.overhead is not None:
            line = f"- The plugin adds {self.overhead['overhead_us']:.0f} us to a call"
            cold = self.overhead.get("overhead_cold_us")  # older results have none
            lines.append(line + ("." if cold is None else f"; {cold:.0f} us where the network has emptied the caches."))
        return lines

    def _published(self, task: str, rows: Sequence[Row], width: int) -> list[list[str]]:
        cells = []
        for size in dict.fromkeys(row.size for row in rows) if self.on_cuda else ():
            ms, base = milliseconds(task, size), self._baseline.get((task, size))
            if ms is not None:
                cell = [str(size), LABEL, f"{ms:.2f}", "", f"{base / ms:.2f}x" if base else ""]
                cells.append(cell + [""] * (width - len(cell)))
        return cells

    # Files.

    def write_json(self, folder: Path, name: str) -> list[Path]:
        """``name.json`` in ``folder``, replaced as a whole."""
        path = folder / f"{name}.json"
        write_output(path, dump_json(self.as_dict()))
        return [path]

    def write(self, folder: Path, name: str) -> list[Path]:
        """``name.json``, ``name.md``, ``name.png`` and, with kernels, ``name_roofline.png`` in ``folder``."""
        from qwen_vae_accel.bench.chart import draw

        paths = [*self.write_json(folder, name), folder / f"{name}.md"]
        write_output(paths[1], self.markdown())
        for figure, suffix in ((draw(self), ".png"), (kernels.draw(self.kernels), "_roofline.png")):
            if figure is not None:
                paths.append(folder / f"{name}{suffix}")
                write_output(paths[-1], png(figure))
        return paths


def png(figure: Any) -> bytes:
    """A matplotlib figure as the bytes of a PNG."""
    data = BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _github(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    alignment = ["left", "left", *["right"] * (len(columns) - 2)]
    tabulate = optional_package("tabulate").tabulate
    return str(tabulate(cells, columns, tablefmt="github", colalign=alignment, disable_numparse=True))


def _digits(ms: float) -> str:
    return f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def _finite(value: Any) -> Any:
    """JSON has no infinity: exact equality gives an infinite PSNR."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def optional_package(name: str) -> Any:
    """A package of the extra ``bench``.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"benchmark reports need {name}: pip install 'qwen-vae-accel[bench]'") from error


def require_packages() -> None:
    """Fail before the long part if a package of the report is missing."""
    for name in ("tabulate", "matplotlib"):
        optional_package(name)
