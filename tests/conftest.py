"""For all tests: one thread (tiny tensors are slower on several) and no deadlines (machines are shared)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `from tests.… import`, however pytest is started
torch.set_num_threads(1)
settings.register_profile("tidal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tidal")
