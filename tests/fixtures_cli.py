"""Calling the command line in this process, and folders for it to work on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from qwen_vae_accel.cli.app import app


@dataclass(frozen=True)
class Result:
    """What a call of the command left."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.stdout)


class Cli:
    """The command ``qwen-vae-accel``."""

    def __call__(self, *arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="qwen-vae-accel")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def cli() -> Iterator[Cli]:
    """Call the command; the logging that it sets up is undone."""
    root, torch_logger = logging.getLogger(), logging.getLogger("torch")
    handlers, level, torch_level = list(root.handlers), root.level, torch_logger.level
    yield Cli()
    root.handlers[:] = handlers
    root.setLevel(level)
    torch_logger.setLevel(torch_level)


@pytest.fixture(scope="session")
def micro_folder(_micro: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with the ``micro`` VAE in it."""
    folder = tmp_path_factory.mktemp("pipeline")
    _micro.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="session")
def other_folder(_micro: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE's folder with the topology of ``micro`` and other weights."""
    from qwen_vae_accel.loading import random_vae
    from tests.conftest import MICRO

    folder = tmp_path_factory.mktemp("other")
    random_vae(seed=1, **MICRO).save_pretrained(folder)
    return folder
