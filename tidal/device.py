"""Where to compute."""

from __future__ import annotations

import torch

from tidal.cli import UserError


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU where there is one. Raises UserError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error
    return device
