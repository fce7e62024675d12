"""What every benchmark's results hold besides its figures: where, with what and when. And how they are saved."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from tidal.files import atomic_write

PEERS = ("triton", "flash_attn")
"""Packages that are named with their versions where they are installed."""


def machine() -> dict[str, Any]:
    """The machine, its load (processes that want a core, mean of a minute), versions, the date."""
    import torch

    named = {d.name: d.version for name in PEERS for d in importlib.metadata.distributions(name=name)}
    cuda = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2), **cuda, "torch": torch.__version__, **named,
            "python": platform.python_version(), "date": datetime.date.today().isoformat()}  # fmt: skip


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def processor() -> str:
    """Name of the CPU, as far as it is known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(line: dict[str, Any], out: Path | None) -> None:
    """Print results as one line of JSON, and save them."""
    if out:
        save(out, line)
    print(json.dumps(line))


def save(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
