"""Data flows one way: no module imports one of a later layer (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LAYERS = ("cli", "lazy", "files", "config", "ranks", "device", "allocator", "tokenizer", "places", "foretold", "blocks",
          "recall", "streams", "kernels", "linear", "model", "checkpoint", "infer", "corpora", "prepare", "train",
          "evaluate", "report", "doctor", "sizes")  # fmt: skip
PICTURE = "kernels/picture.py"  # a command that draws what the builder builds


def imported(source: str) -> Iterator[str]:
    """Layers of this package that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "tidal":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tidal."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("tidal."))


def upwards(package: Path) -> list[str]:
    """Imports of a later layer, as `FILE imports LAYER`. A command may show what comes after it."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        layer = name.split("/")[0].removesuffix(".py")
        if layer == "__init__" or path.name == "__main__.py" or name == PICTURE:
            continue
        own = LAYERS.index(layer)
        found += [f"{name} imports {other}" for other in imported(path.read_text()) if LAYERS.index(other) > own]
    return found


def test_nothing_imports_upwards() -> None:
    assert not upwards(Path(__file__).parents[1] / "tidal")


def test_an_import_upwards_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare/shards.py").write_text("def late():\n    from tidal.train.loop import train\n")
    (tmp_path / "streams.py").write_text("import tidal.model\nfrom tidal import infer, tokenizer\n")
    later = ("prepare/shards.py", "train"), ("streams.py", "model"), ("streams.py", "infer")
    assert upwards(tmp_path) == [f"{name} imports {layer}" for name, layer in later]
