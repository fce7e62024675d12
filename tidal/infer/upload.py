"""Values for the device, sent without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, lists of them or a tensor on the CPU, as a tensor on the device.

    A copy from pageable memory makes the host wait for all that the GPU has been given to do; one from pinned memory
    joins the queue.
    """
    here = torch.as_tensor(values, dtype=dtype)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)
