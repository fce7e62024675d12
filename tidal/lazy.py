"""Names of a package that are imported on first use, so that command lines answer before torch is loaded."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562), given the module in which each of its names lives; of a
    module of its own, that module. `from package import *` gives these names.

    Type checkers need the same imports under `if TYPE_CHECKING`.
    """

    def getattr_(name: str) -> Any:
        if name in homes:
            home = importlib.import_module(homes[name])
            return home if homes[name] == f"{package}.{name}" else getattr(home, name)
        if name == "__all__":
            return [*homes]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattr_, lambda: [*vars(sys.modules[package]), *homes]
