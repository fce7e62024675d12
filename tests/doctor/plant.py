"""How to plant a bug: in functions, methods, streams, blocks, kernels."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import tidal
from tidal import streams
from tidal.blocks import BlockTable, Passage
from tidal.config import PLAIN_STEPS, Steps
from tidal.kernels import cpu
from tidal.model import TidalTransformer
from tidal.streams import Batch, DocumentBuilder, ReaderToken, WriterStep
from tidal.tokenizer import Block, MixedTokenizer

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
Spoil = Callable[[TidalTransformer], None]
INT32 = torch.int32


@dataclass(frozen=True)
class Mutant:
    """A bug, and the number of the check that must find it."""

    name: str
    check: int
    plant: Plant = lambda patch: None
    spoil: Spoil = lambda model: None
    shape: Mapping[str, Any] = field(default_factory=dict)
    """What the model must have, for the bug to show."""
    stops: str = ""
    """What the finding says where Tidal itself stops before a law is seen to be broken."""


# -------------------------------------------------------------------------------------- how to plant bugs


_OF_TRITON = (".triton_", "kernels.aot")  # where there is no Triton, they cannot be imported
for _, _name, _ in pkgutil.walk_packages(tidal.__path__, "tidal."):
    if not any(part in _name for part in _OF_TRITON) and not _name.endswith("__main__"):
        importlib.import_module(_name)  # now: imported while a bug is planted, a module would keep it


def everywhere(original: Any, new: Any) -> Plant:
    """Replace a function in every module of the package that has imported it."""

    def plant(patch: Patch) -> None:
        for name, module in list(sys.modules.items()):
            if name == "tidal" or name.startswith("tidal."):
                for attribute, value in list(vars(module).items()):
                    if value is original:
                        patch.setattr(module, attribute, new)

    return plant


def replacing(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Plant:
    """The method `name` of a class, or name of a module, becomes `wrap(what it was)`."""
    return lambda patch: patch.setattr(owner, name, wrap(getattr(owner, name)))


def both(*plants: Plant) -> Plant:
    def plant(patch: Patch) -> None:
        for one in plants:
            one(patch)

    return plant


def in_packing(change: Callable[[Batch], dict[str, Any]]) -> Plant:
    """Training is fed other streams than decoding."""
    pack = streams.pack

    def bugged(rows: Sequence[Sequence[Passage]], table: BlockTable, *, steps: Steps = PLAIN_STEPS) -> Batch:
        batch = pack(rows, table, steps=steps)
        return dataclasses.replace(batch, **change(batch))

    return everywhere(pack, bugged)


def bugged_builder(step: Callable[[DocumentBuilder, Sequence[int], WriterStep], dict[str, Any]] | None = None,
                   read: Callable[[int, ReaderToken], dict[str, Any]] | None = None,
                   ) -> type[DocumentBuilder]:  # fmt: skip
    """One whose steps, and whose reader tokens, are changed."""

    class Bugged(DocumentBuilder):
        def step(self, written: Sequence[int]) -> WriterStep:
            right = super().step(written)
            return dataclasses.replace(right, **(step(self, written, right) if step else {}))

        def _append(self, tokens: Sequence[int], places: Sequence[int]) -> list[ReaderToken]:
            first, right = self.n_read, super()._append(tokens, places)
            return [dataclasses.replace(t, **(read(first + i, t) if read else {})) for i, t in enumerate(right)]

    return Bugged


def builder(*args: Any, **kwargs: Any) -> Plant:
    """The decoder is fed other streams than training."""
    return everywhere(DocumentBuilder, bugged_builder(*args, **kwargs))


def with_block(change: Callable[[MixedTokenizer, Block], dict[str, Any]]) -> Plant:
    """Blocks come out of the tokenizer changed, for training and decoding alike."""

    def wrap(encode: Callable[..., Block]) -> Callable[..., Block]:
        return lambda self, text: dataclasses.replace(right := encode(self, text), **change(self, right))

    return replacing(MixedTokenizer, "encode_block", wrap)


def geometry(change: Callable[..., tuple[Tensor, Tensor | None]]) -> Plant:
    """A bug in the distances or the mask of the CPU kernel."""
    right = cpu.tile_geometry
    return lambda patch: patch.setattr(cpu, "tile_geometry", lambda *args: change(right, *args))


def clamped(batch: Batch, name: str, by: tuple[int, int], most: int) -> dict[str, Tensor]:
    """Half-open ranges moved, where there is something to see."""
    sees = getattr(batch, name)
    moved = (sees + torch.tensor(by, dtype=INT32)).clamp(0, most)
    return {name: torch.where((sees[..., :1] < sees[..., 1:]), moved, sees)}
