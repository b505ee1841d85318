"""Imports only go down: no module imports one that is above it, and none imports itself through others."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = "qwen_vae_accel"
# From below: each may import those before it. "" is the package's own __init__, its public names.
ORDER = (
    "errors", "visits", "terminal", "accuracy", "owners", "files", "caches", "documents", "progress", "share", "sizes",
    "plan", "config", "model", "checkpoints", "loading", "journal", "kernels", "backends", "engines", "plugin", "", "page",
    "demo", "bench", "cli",
)  # fmt: skip


def modules(root: Path, package: str) -> dict[str, Path]:
    """The files of ``package`` below ``root`` by the names of their modules."""
    names = {".".join(path.relative_to(root).with_suffix("").parts): path for path in (root / package).rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(root: Path, package: str) -> dict[str, set[str]]:
    """What each module of ``package`` imports of it, wherever the import stands: in functions, and for types only, too."""
    files = modules(root, package)
    return {name: set(_imported(ast.parse(path.read_text("utf-8")), files)) - {name} for name, path in files.items()}


def _imported(tree: ast.AST, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, "imports are absolute"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (found for name in names if (found := name if name in known else node.module) in known)


def upward(graph: Mapping[str, set[str]], order: tuple[str, ...]) -> list[str]:
    """The imports of ``graph`` that lead to what comes later in ``order``."""

    def level(module: str) -> int:
        return order.index([*module.split("."), ""][1])

    return [f"{name} imports {other}" for name in graph for other in sorted(graph[name]) if level(other) > level(name)]


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle of ``graph``, its first module again at the end; none: []."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next((found for other in sorted(graph[name]) if (found := search(other, [*way, name]))), [])
        done.add(name)
        return found

    return next((found for name in sorted(graph) if (found := search(name, []))), [])


def test_every_part_of_the_package_has_its_place_in_the_order() -> None:
    parts = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    parts |= {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert sorted(parts | {""}) == sorted(ORDER)


def test_no_import_leads_up() -> None:
    assert upward(imports(ROOT, PACKAGE), ORDER) == []


def test_no_import_leads_back() -> None:
    assert circle(imports(ROOT, PACKAGE)) == []


@pytest.mark.parametrize(
    "line", ["import p.high.b", "from p.high import b", "from p.high.b import name", "def f():\n    from p.high import b"]
)
def test_a_circle_and_an_import_that_leads_up_are_found_in_functions_too(tmp_path: Path, line: str) -> None:
    for file, text in {
        "__init__": "",
        "low": line,
        "high/__init__": "",
        "high/a": "import p.low",
        "high/b": "import p.high.a",
    }.items():
        path = tmp_path / "p" / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = imports(tmp_path, "p")
    assert upward(graph, ("low", "high", "")) == ["p.low imports p.high.b"]
    assert circle(graph) == ["p.high.a", "p.low", "p.high.b", "p.high.a"]
    graph["p.low"].clear()
    assert upward(graph, ("low", "high", "")) == circle(graph) == []
