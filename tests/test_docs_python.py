"""The Python that pages of docs/ show, each from top to bottom as one program."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.commands import ROOT, run
from tests.test_readme import fences
from tidal.kernels import interval_attention

MORE = """
assert tidal.doctor.run and tidal.doctor.Report, "without an import of its own"
assert model.config.shape == shape
assert all(p.grad is None for p in model.parameters())
assert "seed (7, 1)" in Path("trace.html").read_text(encoding="utf-8")
"""


def test_the_python_of_decoding_runs(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    blocks = fences("python", (ROOT / "docs/decoding.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    (tmp_path / "page.py").write_text("\n".join([*blocks, MORE]), encoding="utf-8")
    done = run([sys.executable, "page.py"], tmp_path)
    assert done.code == 0, done.err


def test_the_masks_of_kernels_are_what_they_are_called() -> None:
    names: dict[str, Any] = {}
    for block in fences("python", (ROOT / "docs/kernels.md").read_text(encoding="utf-8")):
        exec(block, names)
    k, v, position, j = names["k"], names["v"], names["position"], torch.arange(names["L"])
    q, past = torch.randn_like(k), j <= j[:, None]
    for ranges, mask in (
        ("causal", past),
        ("window", past & ((j > j[:, None] - 64) | (j < 4))),
        ("prefix", past | (j < names["prompt"][:, :, None, None])),
        ("packed", past & (j // 100 == j[:, None] // 100)),
    ):
        found = interval_attention(q, k, v, names[ranges], position, position, torch.zeros(names["H"]))
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, mask), msg=ranges)
