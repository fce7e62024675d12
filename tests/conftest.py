"""For all tests: one thread (tiny tensors are slower on several), no deadlines (machines are shared)."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("tidal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tidal")
