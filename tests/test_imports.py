"""Nothing in the package imports upwards (CONTRIBUTING.md), wherever in a file the import stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tidal

ORDER = (
    "lazy", "cli", "files", "allocator", "ranks", "device", "config", "checkpoint", "kernels", "corpora", "tokenizer",
    "blocks", "boundary_dropout", "recall", "streams", "foretold", "layers", "model", "prepare", "infer", "train",
    "report", "doctor", "evaluate", "sizes", "__init__",
)  # fmt: skip
"""Modules and folders of tidal/, each of which imports only what stands before it."""

COMMANDS = {
    "infer/__main__.py": {"train"},  # which recipes are decoded greedily
    "train/__main__.py": {"report", "doctor"},  # a run is examined before it begins, and its curves are drawn
    "kernels/picture.py": {"tokenizer", "blocks", "streams", "infer"},  # of a text, which has to become streams first
}
"""What each command, which nothing imports, takes from above: exactly that."""


def imports(source: str) -> Iterator[str]:
    """The modules and folders of tidal/ that a file imports."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("tidal."))


def upwards(path: str, source: str) -> set[str]:
    """What a file imports that does not stand before it."""
    own = Path(path).with_suffix("").parts[0]
    return {name for name in imports(source) if name != own and ORDER.index(name) > ORDER.index(own)}


def test_nothing_imports_upwards() -> None:
    root = Path(tidal.__file__).parent
    sources = {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    assert {Path(path).with_suffix("").parts[0] for path in sources} == set(ORDER)
    assert {path: found for path, source in sources.items() if (found := upwards(path, source))} == COMMANDS


@pytest.mark.parametrize("planted", ["from tidal.infer.engine import generate", "import tidal.doctor",
                                     "def f():\n    from tidal import train"])  # fmt: skip
def test_an_import_upwards_shows(planted: str) -> None:
    assert len(upwards("streams.py", "import torch\nfrom tidal.blocks import Block\n" + planted)) == 1


def test_all_names_can_be_imported_at_once() -> None:
    names: dict[str, object] = {}
    exec("from tidal import *; from tidal.kernels import *", names)
    assert names["generate"] is tidal.generate
    assert names["TilePlan"] is tidal.kernels.TilePlan
    assert not names.keys() & {"annotations", "exports", "TYPE_CHECKING"}
