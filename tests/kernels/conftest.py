"""Triton's interpreter, where tests use it: rounds as a GPU does, and is about a third faster."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_triton_*"]
if HAS_TRITON:
    import triton
    from triton.runtime import interpreter

patched: set[int] = set()


def cast_impl(self, source, to):  # type: ignore[no-untyped-def]
    """To bfloat16 by rounding to the nearest; the interpreter cuts the last bits off."""
    done = cut_impl(self, source, to)
    if (source.dtype.scalar.name, to.scalar.name) == ("fp32", "bf16"):
        rounded = torch.from_numpy(np.array(source.data, ndmin=1)).bfloat16().view(torch.int16)
        done.data = rounded.numpy().view(np.uint16).reshape(np.shape(source.data))
    return done


def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    """A call inside a kernel; the interpreter would patch triton.language anew each time, which takes 2 ms."""
    if id(self.fn.__globals__) not in patched:
        patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


if HAS_TRITON and triton.knobs.runtime.interpret:
    np.seterr(divide="ignore", over="ignore", invalid="ignore")  # log2(0) and the like are selected away
    cut_impl = interpreter.InterpreterBuilder.cast_impl
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpretedFunction.__call__ = call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run when asked for: -m slow."""
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run it with -m slow"))
