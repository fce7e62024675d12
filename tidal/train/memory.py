"""What is done where memory runs out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from tidal.ranks import OwnError

SAID = re.compile(r"DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory"
                  r"|Triton Error \[CUDA\]: out of memory")  # fmt: skip
"""Said by the CPU's allocator, and by the CUDA libraries, the driver and Triton for what they allocate themselves."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory: torch's allocator of a GPU has a class for it, others words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or SAID.search(str(error)) is not None


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Say in one line what there is no memory for."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OwnError(f"out of memory ({first_line(error)}) for {what}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return str(error).partition("\n")[0][:160] or type(error).__name__
