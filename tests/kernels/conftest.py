"""Without a GPU the kernels run under the Triton interpreter, which is chosen when a function is decorated."""

from __future__ import annotations

import inspect
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton")
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    # diffusers may have imported triton already: then its own library (tl.sum, tl.cdiv) was decorated for a GPU.
    _interpreted: dict[int, interpreter.InterpretedFunction] = {}
    for _module in [m for name, m in sys.modules.items() if name.startswith("triton.language")]:
        for _name, _value in list(vars(_module).items()):
            if isinstance(_value, JITFunction):
                _function = _interpreted.setdefault(id(_value), interpreter.InterpretedFunction(_value.fn))
                setattr(_module, _name, _function)

    # Triton 3.6 turns one-element arrays into loop bounds with int(), which NumPy 2.4 refuses.
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_with_item(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_item

    # The interpreter looks through all of triton.language at every call of a function. Once is enough.
    _builtins = {
        package: [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    }

    def _patch_known(package, builder, scope):
        for name, member in _builtins[package]:
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = _patch_known

    # The interpreter keeps bfloat16 and float8 as their bits. It would multiply those of bfloat16, and it converts to and
    # from float8 with other roundings than the hardware: PyTorch does it in its place.
    _dot = interpreter.InterpreterBuilder.create_dot
    _convert = interpreter.InterpreterBuilder.create_fp_to_fp

    def _from_float8(handle):
        values = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn).float()
        return interpreter.TensorHandle(values.numpy(), tl.float32)

    def _widened(handle):
        if handle.dtype == tl.float8e4nv:
            return _from_float8(handle)
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def _dot_of_widened(self, a, b, d, *options):
        return _dot(self, _widened(a), _widened(b), d, *options)

    def _convert_float8(self, src, dst_type, rounding_mode):
        if dst_type.scalar == tl.float8e4nv and src.dtype.scalar == tl.float32:
            values = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn)
            return interpreter.TensorHandle(values.view(torch.uint8).numpy(), tl.float8e4nv)
        return _convert(self, src, dst_type, rounding_mode)

    # Minimum and maximum swallow NaN unless told to pass it on; the interpreter always passes it on.
    interpreter.InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    interpreter.InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    interpreter.InterpreterBuilder.create_dot = _dot_of_widened
    interpreter.InterpreterBuilder.create_fp_to_fp = _convert_float8
