"""Compile CUDA C++ to a cubin with NVRTC (torch's CUDA wheels bring it), and keep the result on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from qwen_vae_accel.caches import cubin_folder
from qwen_vae_accel.files import read_file, write_atomically

logger = logging.getLogger(__name__)

ARCHITECTURE = "sm_90a"
_MAJORS = (13, 12)
_LARGEST = 64 * 2**20


class CompileError(RuntimeError):
    """NVRTC rejected the source; the message holds its log."""


def _candidates() -> list[str]:
    names = [f"libnvrtc.so.{major}" for major in _MAJORS]
    folders = [Path(entry) / "nvidia" for entry in sys.path if entry]
    wheels = [
        str(path)
        for folder in folders
        for name in names
        for pattern in (f"cu*/lib/{name}", f"cuda_nvrtc/lib/{name}")
        for path in sorted(folder.glob(pattern))
    ]
    return names + wheels  # by plain name first: torch has usually loaded its own already


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load NVRTC; None where it is not installed."""
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def version() -> str | None:
    """The version of NVRTC, such as ``"13.0"``; None where it is not installed."""
    nvrtc = library()
    if nvrtc is None:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_cubin(
    source: str, defines: Mapping[str, int], cache: Path | None = None, *, headers: Mapping[str, str] | None = None
) -> bytes:
    """Machine code of ``source`` for sm_90a, from the cache directory if it was compiled before.

    Args:
        source: CUDA C++.
        defines: values of its compile-time parameters.
        cache: directory of compiled kernels; default: :func:`cubin_folder`.
        headers: text of what it may include, by name.

    Raises:
        CompileError: NVRTC is missing or rejects the source.
    """
    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", *(f"-D{k}={v}" for k, v in sorted(defines.items()))]
    texts = [text for header in sorted((headers or {}).items()) for text in header]
    key = hashlib.sha256("\0".join([version() or "none", source, *texts, *options]).encode()).hexdigest()
    folder = cache or cubin_folder()
    path = None if folder is None else folder / f"{key[:40]}.{ARCHITECTURE}.cubin"
    try:
        if path is not None:
            return read_file(path, _LARGEST)
    except OSError:
        pass
    cubin = _compile(source, options, headers) if headers else _compile(source, options)
    if path is None:
        return cubin
    try:
        write_atomically(path, cubin)
    except OSError as error:
        logger.warning("cannot keep compiled kernels in %s: %s", path.parent, error)
    return cubin


def _compile(source: str, options: list[str], headers: Mapping[str, str] | None = None) -> bytes:
    nvrtc = library()
    if nvrtc is None:
        raise CompileError("NVRTC (libnvrtc.so) is not installed")
    program = ctypes.c_void_p()
    headers = headers or {}
    count = len(headers)
    names, texts = ((ctypes.c_char_p * count)(*map(str.encode, part)) for part in (headers, headers.values()))
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"sm90.cu", count, texts, names)
    _check(nvrtc, created)
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            raise CompileError(_text(nvrtc, "nvrtcGetProgramLog", program).decode(errors="replace"))
        return _text(nvrtc, "nvrtcGetCUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, getter: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"{getter}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, getter)(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")
