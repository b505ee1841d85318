"""Figures and folders that documents name are those of the files and of the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.tables import RESULTS, tables

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
MEMORY = ROOT / "docs" / "memory-and-scale.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
TABLES = [(document, text) for document, texts in tables().items() for text in texts]


@pytest.mark.parametrize(("document", "text"), TABLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TABLES)])
def test_tables_of_results_are_made_from_the_files(document, text):
    words = " ".join((ROOT / document).read_text().split())
    assert " ".join(text.split()) in words, f"run python benchmarks/tables.py and put this into {document}"


@pytest.mark.parametrize("path", [README, BENCHMARKS], ids=lambda path: path.name)
def test_files_of_results_are_there(path):
    names = set(re.findall(r"`(?:benchmarks/results/)?(\w+\.(?:json|txt|md))`", path.read_text()))
    assert names
    assert [name for name in sorted(names) if not (RESULTS / name).is_file()] == []


def test_every_result_is_in_a_document():
    text = BENCHMARKS.read_text() + MEMORY.read_text()
    results = [path.name for path in RESULTS.glob("*.json") if path.stem != "h200_tune"]
    assert [name for name in results if name not in text] == []


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 90


def test_the_tree_of_the_architecture_is_that_of_the_package():
    package = ROOT / "qwen_vae_accel"
    folders = {
        f"{path.parent.relative_to(ROOT).as_posix()}/" for path in package.rglob("*.py") if "__pycache__" not in path.parts
    }
    listed = re.findall(r"^\| `(qwen_vae_accel/[\w/]*)` \|", ARCHITECTURE.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(folders)
    others = re.findall(r"^\| `(?!qwen_vae_accel)([\w/]+/)` \|", ARCHITECTURE.read_text(), re.MULTILINE)
    assert others and all((ROOT / folder).is_dir() for folder in others)
