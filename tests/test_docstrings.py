"""Public functions say what they do, and those that take a tensor say its shape."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "qwen_vae_accel"
PARTS = ("sizes", "plan", "model", "backends", "engines", "plugin")
FILES = sorted(file for part in PARTS for file in [*PACKAGE.glob(f"{part}.py"), *(PACKAGE / part).rglob("*.py")])
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(body: list[ast.stmt], owner: ast.ClassDef | None = None) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, node)
        elif isinstance(node, Function) and not node.name.startswith("_"):
            yield owner, node


CLASSES = {
    node.name: node
    for file in FILES
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
}


def inherits(owner: ast.ClassDef, name: str) -> bool:
    """Whether a class overrides a method that a base class of the package documents."""
    for base in (CLASSES[ast.unparse(base)] for base in owner.bases if ast.unparse(base) in CLASSES):
        if any(isinstance(one, Function) and one.name == name and ast.get_docstring(one) for one in base.body):
            return True
        if inherits(base, name):
            return True
    return False


def faults(text: str) -> list[str]:
    """What the public functions of a source leave unsaid."""
    found = []
    for owner, function in public(ast.parse(text).body):
        doc = ast.get_docstring(function)
        name = f"{owner.name}.{function.name}" if owner else function.name
        if doc is None:
            if owner is None or not inherits(owner, function.name):
                found.append(f"{name} has no docstring")
            continue
        arguments = [*function.args.args, *function.args.kwonlyargs]
        takes = any(one.annotation is not None and ast.unparse(one.annotation) == "Tensor" for one in arguments)
        if takes and not re.search(r"\[[^]]*\]|any shape", doc):
            found.append(f"{name} takes a tensor and gives no shape")
        if re.match(r"(What|The same|As) ", doc):
            found.append(f"{name} begins with a fragment: {doc.splitlines()[0]}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_public_functions_say_what_they_do_and_to_which_shapes(file: Path) -> None:
    assert faults(file.read_text(encoding="utf-8")) == []


def test_what_is_unsaid_is_found() -> None:
    text = (
        "def one(): pass\n"
        'def two(x: Tensor):\n    """Double x."""\n'
        'def three():\n    """What it does."""\n'
        "def _four(): pass\n"
        'def five(x: Tensor):\n    """Double ``x [B, C]``."""\n'
        "class EagerBackend(DirectBackend):\n    def reasons(self): pass\n    def other(self): pass\n"
    )
    assert faults(text) == [
        "one has no docstring",
        "two takes a tensor and gives no shape",
        "three begins with a fragment: What it does.",
        "EagerBackend.other has no docstring",
    ]
