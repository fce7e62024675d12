"""A stand-in for a GPU: tensors that compute on the CPU, and say that they are on `cuda:0`.

    x.to("cuda")  ─▶  OnGpu(x)    holds a tensor of the CPU, which does the work
    OnGpu + Tensor                an error, as on a GPU
    .item(), .cpu(), x[mask], …   noted in `waits`: the host would wait for all that the GPU has been given to do

What a machine without a GPU otherwise hides shows: operands left on the other device, values that are asked for in the
middle of a step, code that only runs where `device.type` is "cuda". Nothing is said of CUDA's own kernels, streams or
speed, nor of what happens inside operators of ours: they are handed the tensors of the CPU, and Triton's kernels run in
its interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch._dynamo  # noqa: F401  which remembers torch's functions when it is imported: not while some of them are replaced
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

HERE = f"{Path(__file__).parent.parent}/"
OURS = tuple(f"{HERE}{folder}/" for folder in ("benchmarks", "tests", "tidal"))
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FACTORIES = ("arange", "as_tensor", "empty", "full", "ones", "tensor", "zeros")
"""are replaced, since `Places` does not see what a function of torch calls"""
COPIES = {"copy_", "_to_copy"}
"""operations whose operands may be on two devices"""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""take indices from the CPU, too, and send them"""
ASKED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""of operations for whose values or shapes the host waits"""


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    held: Tensor
    waits: ClassVar[list[str]] = []
    """lines that made the host wait: the innermost of this repository, else of who called"""

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        assert type(held) is Tensor
        assert not held.requires_grad
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=held.device)  # fmt: skip
        made.held = held
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        elsewhere = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, OnGpu)]
        if name in COPIES:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            note_wait(bool(elsewhere) and not (non_blocking and all(pinned(x) for x in elsewhere)))
            elsewhere = []
        elif name in INDEXING:
            indices = [x for x in args[1] if x is not None]
            note_wait(any(not isinstance(x, OnGpu) or x.dtype == torch.bool for x in indices))
            elsewhere = [x for x in elsewhere if all(x is not index for index in indices)]
        if any(x.dim() or torch.Tag.pointwise not in func.tags or (x is args[0] and func._schema.is_mutable)
               for x in elsewhere):  # fmt: skip
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found at least two devices,"
                               f" cuda:0 and cpu! On the CPU: {[list(x.shape) for x in elsewhere]}")  # fmt: skip
        note_wait(name not in INDEXING and not ASKED.isdisjoint(func.tags) and kwargs.get("output_size") is None)
        bare_args, bare = tree_map_only(OnGpu, lambda x: x.held, (args, kwargs))
        out = func(*bare_args, **bare)
        if name == "copy_" and not isinstance(args[0], OnGpu):
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnGpu, out))


def note_wait(whether: bool) -> None:
    if whether:
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        inner = ([frame for frame in frames if frame.filename.startswith(OURS)] or frames)[-1]
        OnGpu.waits.append(f"{inner.filename.removeprefix(HERE)}:{inner.lineno} {inner.line}")


def pinned(x: Tensor) -> bool:
    return getattr(x, "pinned", False)


def moved(x: Tensor, device: torch.device, dtype: torch.dtype | None = None, non_blocking: bool = False) -> Tensor:
    """A copy on the other device."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError("gradients from one device to the other")
    note_wait(not (non_blocking and pinned(x)))
    copy = (x.held if isinstance(x, OnGpu) else x.detach()).to(dtype or x.dtype, copy=True)
    return OnGpu(copy) if device.type == "cuda" else copy


def placed(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function makes, on the device that it is told."""
    name = function.__name__
    if name == "_parse_to" or torch.device(kwargs.get("device") or "cpu").type != "cuda":
        return function(*args, **kwargs)
    if args and isinstance(args[0], OnGpu):  # new_zeros, zeros_like
        return function(*args, **{**kwargs, "device": None})
    note_wait(name in ("tensor", "as_tensor"))
    made = function(*args, **{**kwargs, "device": CPU})
    return tree_map_only(Tensor, lambda x: OnGpu(x.clone() if name == "as_tensor" else x), made)


class Places(TorchFunctionMode):
    """Sees what is called in Python, where a device is named."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        x: Any = args[0] if args else None
        if name == "pin_memory":
            x = x.clone()
            x.pinned = True
            return x
        if name == "to" and isinstance(x, Tensor):
            like = next((y for y in args[1:] if isinstance(y, Tensor)), kwargs.get("other"))
            others = [y for y in args[1:] if not isinstance(y, Tensor)]
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(
                *others, **{k: v for k, v in kwargs.items() if k in ("device", "dtype", "non_blocking")})  # fmt: skip
            if like is not None:
                device, dtype = like.device, like.dtype
            if device is not None and (device.type == "cuda") != isinstance(x, OnGpu):
                return moved(x, device, dtype, non_blocking)
            return func(x, dtype or x.dtype, copy=kwargs.get("copy", False))
        if name == "cuda":
            return x if isinstance(x, OnGpu) else moved(x, GPU)
        if isinstance(x, OnGpu):
            if name == "cpu":
                return moved(x, CPU)
            if name == "tolist":
                note_wait(True)
                return x.held.tolist()
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            if name == "new_tensor":
                note_wait(True)
                return OnGpu(torch.tensor(args[1], dtype=kwargs.get("dtype", x.dtype)))
        return placed(func, *args, **kwargs)


class Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(on_cpu(device_type), *args, **kwargs)


def on_cpu(device_type: str) -> str:
    return device_type.replace("cuda", "cpu")


class Event:
    """A moment, in seconds."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@contextlib.contextmanager
def stand_in_gpu() -> Iterator[list[str]]:
    """Inside, there is a GPU; yields `OnGpu.waits`. Not for tensors of `inference_mode`, which becomes `no_grad`."""
    group, compatible = torch._C._group_tensors_by_device_and_dtype, torch._has_compatible_shallow_copy_type
    enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype

    def grouped(lists: Any, *args: Any) -> Any:  # reads the device where Python cannot say another
        return {(GPU if isinstance(found[0][0], OnGpu) else device, dtype): (found, indices)
                for (device, dtype), (found, indices) in group(lists, *args).items()}  # fmt: skip

    def alike(input: Tensor, from_: Tensor) -> bool:  # noqa: A002
        """Where not, `module.to` makes a new Parameter."""
        if isinstance(input, OnGpu) and isinstance(from_, OnGpu):
            return input.held is from_.held
        return not isinstance(input, OnGpu) and not isinstance(from_, OnGpu) and compatible(input, from_)

    cuda: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "set_device": lambda *_: None, "device_of": lambda _: contextlib.nullcontext(),
        "get_device_name": lambda *_: "stand-in", "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: mock.Mock(multi_processor_count=132),
        "max_memory_allocated": lambda *_: 2**30, "empty_cache": lambda: None, "synchronize": lambda *_: None,
        "Event": Event, "_sleep": lambda *_: None, "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    stream = mock.Mock(**{"is_capturing.return_value": False})
    with torch.device("meta"):
        torch.empty(0)  # a torch.device remembers, when it is first used, which functions make tensors: not ours
    OnGpu.waits.clear()
    with (mock.patch.multiple(torch.cuda, create=True, **cuda),
          mock.patch.object(torch.accelerator, "current_stream", return_value=stream),
          mock.patch.multiple(torch, autocast=Autocast, is_autocast_enabled=lambda t: enabled(on_cpu(t)),
                              get_autocast_dtype=lambda t: dtype_of(on_cpu(t)),
                              _has_compatible_shallow_copy_type=alike,
                              **{f: functools.partial(placed, getattr(torch, f)) for f in FACTORIES}),
          mock.patch.multiple(torch.inference_mode, __enter__=torch.no_grad.__enter__,
                              __exit__=torch.no_grad.__exit__, prev=False, create=True),
          mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped), Places()):  # fmt: skip
        yield OnGpu.waits
