"""The Python that docs/decoding.md shows, from top to bottom as one program."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.commands import ROOT, run
from tests.test_readme import fences

MORE = """
assert tidal.doctor.run and tidal.doctor.Report, "without an import of its own"
assert model.config.shape == shape
assert all(p.grad is None for p in model.parameters())
assert "seed (7, 1)" in Path("trace.html").read_text(encoding="utf-8")
"""


def test_the_python_of_the_page_runs(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    blocks = fences("python", (ROOT / "docs/decoding.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    (tmp_path / "page.py").write_text("\n".join([*blocks, MORE]), encoding="utf-8")
    done = run([sys.executable, "page.py"], tmp_path)
    assert done.code == 0, done.err
