"""How large a network's activations get on its calibration input; kept beside the engines under the weights' fingerprint."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch

from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.samples import sample_input
from qwen_vae_accel.documents import read_json
from qwen_vae_accel.files import write_atomically
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.ranges import activation_peaks
from qwen_vae_accel.sizes import Size

logger = logging.getLogger(__name__)

_VERSION = 1
_SIZE = Size(512, 512)


def measured_peaks(source: ModelSource, job: Job) -> dict[str, float]:
    """Largest ``|output|`` by module of ``job``'s network in float32, for one image of 512x512 pixels."""
    x = sample_input(job, _SIZE, source.config)
    return activation_peaks(source.model(job.method, torch.float32, job.device), x)


def calibration_path(folder: Path, method: str, fingerprint: str) -> Path:
    """The file in ``folder`` that holds the peaks of the weights with that ``fingerprint`` (sha256)."""
    return folder / f"calibration_{method}_{fingerprint[:16]}.json"


def calibrated_peaks(source: ModelSource, job: Job) -> dict[str, float]:
    """``measured_peaks``, from the file in ``source.folder`` where these weights were measured before.

    So every process of an engine directory rounds alike. Without a folder that can be written they are measured anew.
    """
    if source.folder is None:
        return measured_peaks(source, job)
    fingerprint = source.fingerprint(job.method, torch.float32)
    path = calibration_path(source.folder, job.method, fingerprint)
    known = _read(path, fingerprint)
    if known is not None:
        return known
    peaks = measured_peaks(source, job)
    if all(map(math.isfinite, peaks.values())):
        _write(path, {"version": _VERSION, "weights": fingerprint, "size": str(_SIZE), "peaks": peaks})
    return peaks


def _read(path: Path, fingerprint: str) -> dict[str, float] | None:
    try:
        document = read_json(path)
        if document["version"] == _VERSION and document["weights"] == fingerprint:
            peaks = {name: float(peak) for name, peak in document["peaks"].items()}
            if not all(0 <= peak < math.inf for peak in peaks.values()):
                raise ValueError("a peak is not a finite number")
            return peaks
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read, measuring again: %s", path, error)
    return None


def _write(path: Path, document: dict[str, object]) -> None:
    try:
        write_atomically(path, json.dumps(document, indent=1))
    except OSError as error:
        logger.warning("the calibration cannot be kept in %s: %s", path.parent, error)
