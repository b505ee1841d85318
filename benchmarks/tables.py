"""The tables of README.md and docs/benchmarks.md, from the JSON in ``results/``: ``python benchmarks/tables.py`` prints them.

A test holds the documents to them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TASKS = ("decode", "encode")
GUIDE = "TensorRT (guide)"
HEADINGS = {
    "diffusers-compile bf16": "diffusers, `torch.compile`",
    "fastvae bf16": "fastvae 0.1",
    "eager bf16": "`eager`",
    "inductor-mp bf16": "`inductor`",
    "fused bf16": "**`fused`**",
    "fused fp16": "`fused`, fp16",
    "fused fp8": "`fused`, fp8",
}


def load(name: str) -> dict[str, Any]:
    """The document ``results/NAME.json``."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    rule = f"|{'---|' * len(header)}"
    first, *others = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([first, rule, *others])


def digits(value: float) -> str:
    """``value`` in three digits, or more before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


class Bench:
    """One result of ``qwen-vae-accel bench``."""

    def __init__(self, name: str) -> None:
        document = load(name)
        self.sizes: list[str] = document["settings"]["sizes"]
        self.methods: list[str] = document["settings"]["methods"]
        self.overhead: dict[str, float] = document["overhead"]
        self.rows = {(row["task"], row["size"], f"{row['method']} {row['dtype']}"): row for row in document["rows"]}

    def ms(self, task: str, size: str, method: str) -> float:
        """The median; of the guide what it published."""
        row = self.rows[task, size, self.methods[0] if method == GUIDE else method]
        value: float = row["published_tensorrt_h100_ms" if method == GUIDE else "median_ms"]
        return value

    def has(self, task: str, size: str, method: str) -> bool:
        """Whether there is one."""
        if method == GUIDE:
            return self.rows[task, size, self.methods[0]]["published_tensorrt_h100_ms"] is not None
        return (task, size, method) in self.rows

    def faster(self, task: str, method: str, over: str) -> list[float]:
        """How many times faster ``method`` is than ``over``, for every size that both have."""
        sizes = [size for size in self.sizes if self.has(task, size, method) and self.has(task, size, over)]
        return [self.ms(task, size, over) / self.ms(task, size, method) for size in sizes]

    def by_size(self) -> str:
        """Milliseconds of every size and method; in parentheses how many times faster than diffusers."""
        plain, *others = self.methods
        others = sorted(others, key=list(HEADINGS).index)
        columns = [name for name in others if "compile" in name or "fastvae" in name]
        columns += [GUIDE] if any(self.has(task, size, GUIDE) for task in TASKS for size in self.sizes) else []
        columns += [name for name in others if name not in columns]
        rows = []
        for task in TASKS:
            for size in self.sizes:
                cells = []
                for method in columns:
                    cell = digits(self.ms(task, size, method)) if self.has(task, size, method) else ""
                    if cell and method.startswith("fused"):
                        ratio = f"{self.ms(task, size, plain) / self.ms(task, size, method):.1f}x"
                        cell = f"**{cell}** ({ratio})" if method == "fused bf16" else f"{cell} ({ratio})"
                    cells.append(cell)
                rows.append([size, task, digits(self.ms(task, size, plain)), *cells])
            ratios = [self.faster(task, method, plain) if method != GUIDE else [] for method in columns]
            cells = [f"{mean(values):.1f}x" if values else "" for values in ratios]
            cells = [f"**{c}**" if m == "fused bf16" else c for c, m in zip(cells, columns, strict=True)]
            rows.append(["geometric mean", task, "", *cells])
        return table(["WxH", "network", "diffusers", *(HEADINGS.get(name, name) for name in columns)], rows)

    def over_the_guide(self) -> str:
        """The sizes that the guide has, beside its figures."""
        plain, ours = self.methods[0], "fused bf16"
        rows = []
        for task in TASKS:
            for size in self.sizes:
                if self.has(task, size, GUIDE):
                    values = [self.ms(task, size, method) for method in (plain, GUIDE, ours)]
                    rows.append(
                        [size, task, *map(digits, values), f"{values[0] / values[2]:.1f}x", f"{values[1] / values[2]:.1f}x"]
                    )
            ratios = [mean(self.faster(task, ours, GUIDE)), mean(self.faster(task, ours, plain))]
            rows.append(["geometric mean", task, "", "", "", f"{ratios[1]:.1f}x", f"{ratios[0]:.1f}x"])
        return table(["WxH", "network", "diffusers", GUIDE, "`fused`", "over diffusers", "over the guide"], rows)

    def at(self, size: str) -> str:
        """Errors and memory of one size."""
        names = [name for name in self.methods if (TASKS[0], size, name) in self.rows]
        facts = {
            "error against float32": lambda row: f"{row['relative_l2']:.1e}".replace("e-0", "e-"),
            "memory above weights, MiB": lambda row: f"{row['peak_mib'] - row['held_mib']:.0f}",
        }
        rows = []
        for what, text in facts.items():
            for task in TASKS:
                rows.append(
                    [what, task, *(text(self.rows[task, size, n]) if (task, size, n) in self.rows else "" for n in names)]
                )
        return table([f"at {size}", "network", "diffusers", *(HEADINGS[name] for name in names[1:])], rows)


def cpu() -> str:
    """Both dtypes on the CPU."""
    rows = []
    for name, dtype in (("cpu_512_fp32", "float32"), ("cpu_512_bf16", "bfloat16")):
        bench = Bench(name)
        for task in TASKS:
            plain, ours = (bench.rows[task, "512x512", method] for method in bench.methods)
            errors = " / ".join(f"{row['relative_l2']:.1e}".replace("e-0", "e-") for row in (plain, ours))
            times = [digits(row["median_ms"]) for row in (plain, ours)]
            rows.append([dtype, task, *times, f"{ours['speedup']:.1f}x", errors if dtype == "bfloat16" else ""])
    return table(["dtype", "network", "diffusers", "`eager`", "faster", "error against float32, diffusers / `eager`"], rows)


def overhead() -> str:
    """What the plugin adds to a call."""
    names = {"h100": "H100", "h200": "H200", "cpu_512_fp32": "AMD EPYC", "cpu_512_bf16": "AMD EPYC"}
    rows = []
    for name, machine in names.items():
        values = Bench(name).overhead
        rows.append([machine, f"{values['overhead_us']:.0f}", f"{values['overhead_cold_us']:.0f}", f"`{name}.json`"])
    return table(["host of", "in a loop", "caches emptied by the network", "file"], rows)


def engines() -> str:
    """A static AOTInductor engine."""
    bench = Bench("h200_inductor")
    rows = []
    for task in TASKS:
        plain, ours = (bench.ms(task, "1024x1024", method) for method in ("diffusers bf16", "inductor bf16"))
        rows.append([task, digits(plain), digits(ours), f"{plain / ours:.1f}x"])
    return table(["1024x1024", "diffusers", "`inductor`, static engine", "faster"], rows)


def service() -> str:
    """Whole requests, beside what the guide says of them."""
    document = load("h200_serve")
    summary, post = document["summary"], document["postprocess"]
    extra = summary["extra_memory_mib"]
    peaks = {
        task: [max(r[side]["peak_mib"] for r in document["requests"] if r["task"] == task) for side in ("plain", "accelerated")]
        for task in ("t2i", "i2i")
    }
    text = " / ".join(f"{plain:,.0f} to {accelerated:,.0f}" for plain, accelerated in peaks.values())
    rows = [
        ["decode and post-processing to PIL, text-to-image", f"{summary['t2i']['decode_postprocess']:.1f}x", "1.8x"],
        ["the same, editing", f"{summary['i2i']['decode_postprocess']:.1f}x", "1.08x"],
        ["encode, editing", f"{summary['i2i']['encode']:.1f}x", "1.66x"],
        ["whole request, text-to-image / editing", f"{summary['t2i']['total']:.2f}x / {summary['i2i']['total']:.2f}x", ""],
        [
            "post-processing alone, 1328x1328",
            f"{digits(post['plain_ms'])} to {digits(post['accelerated_ms'])} ms",
            "80-90 ms of CPU",
        ],
        ["first request of a new size, extra", f"at most {summary['first_request_extra_ms']['most']:.1f} ms", "178-344 ms"],
        [
            "GPU memory at rest above the plain pipeline, text-to-image / editing",
            f"{extra['t2i']:.0f} / {extra['i2i']:.0f} MiB",
            "about 5 GB per engine pair / 1.0-1.2 GB",
        ],
        ["peak of a request, plain to accelerated, text-to-image / editing", f"{text} MiB", ""],
    ]
    return table(["", "here, H200", "guide, H100"], rows)


def runs() -> str:
    """The same on three loans of such a machine."""
    rows = []
    for name in ("h200_serve", "h200_serve_other_run", "h200_serve_offload"):
        document = load(name)
        summary, post, extra = document["summary"], document["postprocess"], document["summary"]["extra_memory_mib"]
        rows.append([
            f"`{name}.json`",
            *(f"{value:.1f}x" for value in (
                summary["t2i"]["decode_postprocess"], summary["i2i"]["decode_postprocess"], summary["i2i"]["encode"],
            )),
            f"{digits(post['plain_ms'])} to {digits(post['accelerated_ms'])}",
            f"{extra['t2i']:.0f} / {extra['i2i']:.0f}",
        ])  # fmt: skip
    header = ["file", "decode + post, text-to-image", "editing", "encode", "post-processing alone, ms", "memory at rest, MiB"]
    return table(header, rows)


def first_image() -> str:
    """Seconds of the first image of a process."""
    document = load("h200_first_image")
    names = {"first_process_s": "first, compiles", "second_process_s": "second, finds the kernels on disk"}
    steps = ("import_qwen_vae_accel", "first_decode", "first_encode", "import_to_first_image")
    rows = [[label, *(f"{document[name][step]:.1f}" for step in steps)] for name, label in names.items()]
    return table(["process", "import", "first decode", "first encode", "from import to the first decoded image"], rows)


def memory() -> str:
    """Bands of rows: their time over that of one piece, the first row of a size, and planned and measured memory."""
    rows, whole = [], {}
    for row in load("h100_memory")["rows"]:
        size = row["vae"], row["method"], row["size"]
        one = whole.setdefault(size, row["ms"])
        limit = {None: "default", 0: "none"}.get(row["limit_mib"], f"{row['limit_mib']} MiB")
        times = [digits(row["ms"]), f"{row['ms'] / one:.2f}x" if row["bands"] > 1 else ""]
        sizes = [f"{row[name]:.0f}" for name in ("scratch_mib", "planned_mib", "measured_mib")]
        rows.append([*size, limit, str(row["bands"]), *times, *sizes, "yes" if row["equal"] else "no"])
    header = ["VAE", "network", "size", "limit", "bands", "ms", "over one piece"]
    return table([*header, "scratch, MiB", "with output, planned", "measured", "equal"], rows)


def ranks(name: str) -> str:
    """One image over several GPUs: what ``benchmarks/ranks.py`` printed."""
    line = re.compile(r"(.+) (\w+) (\d+x\d+): ([\d.]+) -> ([\d.]+) ms, ([\d.]+x)(?:, predicted ([\d.]+x))?, equal (\w+)")
    found = [match.groups() for match in map(line.fullmatch, (RESULTS / f"{name}.txt").read_text().splitlines()) if match]
    predicted = any(row[6] for row in found)
    rows = []
    for vae, task, size, one, together, faster, model, equal in found:
        last = [model, "yes" if equal == "True" else "no"] if predicted else ["yes" if equal == "True" else "no"]
        rows.append([vae, task, size, digits(float(one)), digits(float(together)), f"**{faster}**", *last])
    return table(["VAE", "network", "WxH", "one GPU", "all", "faster", *(["model"] if predicted else []), "equal"], rows)


def headline() -> str:
    """What the README says first."""
    h100 = Bench("h100")
    decode, encode = (mean(h100.faster(task, "fused bf16", "diffusers bf16")) for task in TASKS)
    guide = [ratio for task in TASKS for ratio in h100.faster(task, "fused bf16", GUIDE)]
    return (
        f"On an H100 decoding is {decode:.1f} times faster than diffusers and encoding {encode:.1f} times (geometric means of "
        f"{len(h100.sizes)} sizes, bfloat16), and {min(guide):.1f} to {max(guide):.1f} times faster than the TensorRT guide's "
        "published figures"
    )


def results() -> str:
    """The README's rows: the H100 first, which the guide measured on too."""
    h100, plain, ours = Bench("h100"), "diffusers bf16", "fused bf16"
    rows = []
    for task in TASKS:
        values = [h100.ms(task, "1024x1024", method) for method in (plain, GUIDE, ours)]
        times = [f"{digits(value)} ms" for value in values]
        ratios = [f"**{values[0] / values[2]:.1f}x**", f"{values[1] / values[2]:.1f}x"]
        rows.append(["H100", f"{task} 1024x1024", *times, *ratios, "`h100.json`"])
    for task in TASKS:
        over = [f"{mean(h100.faster(task, ours, method)):.1f}x" for method in (plain, GUIDE)]
        what = f"{task}, {len(h100.sizes)} sizes (guide: {len(h100.faster(task, ours, GUIDE))}), mean"
        rows.append(["H100", what, "", "", "", f"**{over[0]}**", over[1], "`h100.json`"])
    later = Bench("h100_qwen_image_21")
    both = " / ".join(f"{mean(later.faster(task, ours, plain)):.1f}x" for task in TASKS)
    what = f"Qwen-Image 2.1 decode / encode, {len(later.sizes)} sizes, mean"
    rows.append(["H100", what, "", "", "", f"**{both}**", "", "`h100_qwen_image_21.json`"])
    service = load("h200_serve")
    post, sizes = service["summary"]["t2i"]["decode_postprocess"], len(service["settings"]["sizes"]["t2i"])
    what = f"decode and post-processing inside a request, {sizes} sizes, mean"
    rows.append(["H200", what, "", "", "", f"**{post:.1f}x**", "", "`h200_serve.json`"])
    times = [Bench("cpu_512_bf16").ms("decode", "512x512", method) for method in (plain, "eager bf16")]
    seconds = [f"{value / 1000:.1f} s" for value in times]
    ratio = f"**{times[0] / times[1]:.1f}x**"
    rows.append(["AMD EPYC, 2 cores", "decode 512x512", seconds[0], "", seconds[1], ratio, "", "`cpu_512_bf16.json`"])
    return table(["machine", "bfloat16", "diffusers", GUIDE, "here", "over diffusers", "over the guide", "file"], rows)


def tables() -> dict[str, list[str]]:
    """Every table by the document that it stands in."""
    h100, h200, later = Bench("h100"), Bench("h200"), Bench("h100_qwen_image_21")
    return {
        "docs/memory-and-scale.md": [memory(), ranks("h100x4_ranks"), ranks("h200x2_ranks")],
        "README.md": [headline(), results()],
        "docs/benchmarks.md": [
            h100.over_the_guide(),
            h100.by_size(),
            h100.at("1024x1024"),
            later.by_size(),
            later.at("2048x2048"),
            h200.by_size(),
            h200.at("1024x1024"),
            engines(),
            cpu(),
            overhead(),
            service(),
            runs(),
            first_image(),
        ],
    }


if __name__ == "__main__":
    for document, texts in tables().items():
        print(f"# {document}\n", *texts, sep="\n\n")
