"""Where to compute, and on how many threads; how values get there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tidal import ranks
from tidal.cli import UserError

WIDE = 128
"""Models of at least this width are faster on several CPU threads than on one, also beside other work."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU where there is one, of several processes each takes its own.

    Raises UserError for one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"--device is {name}, but each of several processes takes its own GPU; give --device cuda")
        name = f"cuda:{ranks.local_rank()}"
    return usable(name)


def usable(device: str | torch.device) -> torch.device:
    """The device itself, or of that name. Raises UserError for one that is not there, or has no float64."""
    name = str(device)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()  # `meta` makes tensors, but they hold nothing
    except TypeError as error:  # of MPS
        raise UserError(f"device {name!r} has no float64, which decoding and validation need; give --device cpu or cuda"
                        ) from error  # fmt: skip
    except (RuntimeError, AssertionError, ImportError) as error:  # ImportError: torch knows of it by an extension only
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error
    return device


def set_threads(d_model: int, asked: int = 0) -> None:
    """Use `asked` CPU threads; 0: torch's choice for wide models, one for narrow ones, which several slow down."""
    if asked or d_model < WIDE:
        torch.set_num_threads(asked or 1)


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, lists of them (of one shape; of floating point ones say the dtype) or a tensor, as a tensor on the
    device, sent without waiting for it.

    A copy from pageable memory makes the host wait for all that the GPU has been given to do; one from pinned memory
    joins the queue.
    """
    array = values if isinstance(values, Tensor) else np.asarray(values)  # torch takes five times as long to read lists
    here = torch.as_tensor(array, dtype=dtype)
    if device.type == "cuda" and here.is_cpu:
        return here.pin_memory().to(device, non_blocking=True)
    return here.to(device)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """What is made here has a shape and no memory: modules on torch's meta device, not initialised.

    To draw normal numbers for tensors without memory imports torch's compiler, which takes two seconds.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if function is torch.nn.init.normal_ else function(*args, **kwargs)
