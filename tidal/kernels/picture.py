"""A picture of interval attention: which keys each query sees, and which tiles a kernel has to visit.

    python -m tidal.kernels.picture --text "54663 + 132 = 54795" [--tile 8] [--out picture.png]

    <bob> ▓░░░ ▓░░░··      the writer's steps of "a b" with --tile 4: reader tokens, then writer steps
        a ▓░░░ ▓▓░░··      █ seen, in a full tile: no mask        ░ not seen, in a partial tile: masked
    <bob> ▓▓░░ ░░▓░··      ▓ seen, in a partial tile              · in an empty tile: never visited
        b ▓▓░░ ░░▓▓··
        ␣ ▓▓░░ ░░▓▓▓░
    <bob> ▓▓▓▓ ░░░░░▓

What draws (`Panel`, `tile_kinds`, `characters`, `figure`) knows only ranges and labels. `run`, the command, is a leaf
that nothing imports: it alone reaches up, when it is called, to the tokenizer and the one builder of streams
(tests/test_imports.py declares it).
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tidal.cli import UserError, main, note, parse

if TYPE_CHECKING:
    from torch import Tensor

Mask = npt.NDArray[np.bool_]
Kinds = npt.NDArray[np.int64]

MOST = 4096  # elements of both streams: the picture has the square of it
EMPTY, PARTIAL, FULL = 0, 1, 2
COLOURS = {"reader": "#2f6fb5", "writer": "#e07b27"}  # of the keys, by stream
MASKED, INK = "#e9e7e2", "#333333"
AS_IT_IS: dict[str, Any] = {"family": "monospace", "parse_math": False}  # dollars would else begin a formula


@dataclass(frozen=True)
class Settings:
    """Settings of `python -m tidal.kernels.picture`."""

    text: tuple[str, ...] = ("54663 + 132 = 54795\n",)
    """What the streams are made of; several texts are documents packed into one row."""
    tile: int = 8
    """Queries and keys of a tile; those of the kernels have 64 or 128."""
    out: Path | None = None
    """Write a .png here (needs matplotlib); none: print characters."""
    tokenizer: Path | None = None
    """Folder of a trained tokenizer; none: a tiny one is trained on the text."""


@dataclass(frozen=True)
class Panel:
    """One attention call: all queries of a stream."""

    name: str
    """The stream of the queries: reader or writer."""
    ranges: Tensor
    """int32 [Lq, 2, 2], as in `interval_attention`"""
    queries: list[str]
    """A label for each."""
    keys: list[tuple[str, str]]
    """The stream and the label of each."""

    @property
    def seen(self) -> Mask:
        """[Lq, Lk]: which keys each query sees."""
        from tidal.kernels.reference import visible_keys

        seen: Mask = visible_keys(self.ranges[None], len(self.keys))[0].numpy()
        return seen


def tile_kinds(seen: Mask, tile: int) -> Kinds:
    """What a kernel has to do with each tile of a mask.

    Args:
        seen: bool [Lq, Lk].
        tile: queries and keys of a tile; the last ones may be smaller.

    Returns:
        int64 [⌈Lq / tile⌉, ⌈Lk / tile⌉]: EMPTY is skipped, PARTIAL needs the mask, FULL needs none.
    """
    starts = [np.arange(0, n, tile) for n in seen.shape]
    n_seen = np.add.reduceat(np.add.reduceat(seen.astype(np.int64), starts[0], 0), starts[1], 1)
    n_all = np.outer(*[np.diff(start, append=n) for start, n in zip(starts, seen.shape, strict=True)])
    kinds: Kinds = (n_seen > 0).astype(np.int64) + (n_seen == n_all)
    return kinds


def kind_of_cells(seen: Mask, tile: int) -> Kinds:
    """[Lq, Lk]: the kind of the tile that each cell lies in."""
    return tile_kinds(seen, tile)[np.ix_(*[np.arange(n) // tile for n in seen.shape])]


def summary(panel: Panel, tile: int) -> str:
    """One line: how many tiles there are of each kind, and how much of the score matrix a kernel computes."""
    seen, kinds = panel.seen, tile_kinds(panel.seen, tile)
    empty, partial, full = ((kinds == kind).sum() for kind in (EMPTY, PARTIAL, FULL))
    return (
        f"{panel.name}: {seen.shape[0]} queries × {seen.shape[1]} keys, {kinds.size} tiles of {tile} × {tile}: "
        f"{empty} empty, {partial} partial, {full} full; "
        f"{seen.mean():.0%} of the pairs seen, {(kind_of_cells(seen, tile) > EMPTY).mean():.0%} computed"
    )


# ------------------------------------------------------------------------------------------ characters


def characters(panel: Panel, tile: int, columns: int) -> list[str]:
    """Lines of at most `columns` characters: one character a key and, where these do not fit, one a tile.

    Raises:
        UserError: even the tiles do not fit.
    """
    kinds = tile_kinds(panel.seen, tile)
    if 8 + len(panel.keys) + 1 > columns:
        if kinds.shape[1] > columns:
            least = -(-len(panel.keys) // columns)
            raise UserError(f"--tile {tile}: too small for {columns} columns; take {least} or more, or --out FILE.png")
        return ["".join("·▒█"[kind] for kind in row) for row in kinds.tolist()]
    n_reader = sum(stream == "reader" for stream, _ in panel.keys)
    labels = [_narrow(label) for _, label in panel.keys]
    height = max(map(len, labels))
    lines = []
    for i in range(height):  # labels of the keys stand upright
        line = "".join(label.rjust(height)[i] for label in labels)
        lines.append(f"{'':7} {line[:n_reader]} {line[n_reader:]}".rstrip())
    shade = np.array([["·", "·"], ["░", "▓"], ["░", "█"]])  # [kind, seen]
    for label, row in zip(panel.queries, shade[kind_of_cells(panel.seen, tile), panel.seen.astype(int)], strict=True):
        cells = "".join(row)
        lines.append(f"{_narrow(label):>7} {cells[:n_reader]} {cells[n_reader:]}".rstrip())
    return lines


def _narrow(label: str) -> str:
    """A label of at most seven characters, each one column wide."""
    wide = "".join("▫" if unicodedata.east_asian_width(c) in "WF" else c for c in label)
    wide = "".join(c for c in wide if not unicodedata.combining(c))
    return wide if len(wide) <= 7 else wide[:6] + "…"


# ------------------------------------------------------------------------------------------ matplotlib


def figure(panels: Sequence[Panel], tile: int, title: str = "") -> Any:
    """A matplotlib figure: the panels below one another, square cells, keys on one scale.

    ::

        ┌ reader ┐  legend          the reader's queries see no writer keys, so there is room
        ├────────┴────────┐
        │     writer      │
        └─────────────────┘
    """
    from matplotlib.figure import Figure

    n_queries, n_keys = sum(len(p.queries) for p in panels), max(len(p.keys) for p in panels)
    cell = min(0.2, 11.0 / max(n_queries, n_keys))  # inches, as all lengths here
    labelled = cell >= 0.085
    left, right, top, bottom, gap = 0.85, 0.25, (1.05 if labelled else 0.75), (0.95 if labelled else 0.6), 0.3
    legend_x, legend_width, legend_height = left + len(panels[0].keys) * cell + 0.3, 3.2, 2.9
    if len(panels[0].queries) * cell < legend_height:  # no room beside the reader alone
        legend_x = left + n_keys * cell + 0.3
    width = max(left + n_keys * cell + right, legend_x + legend_width)
    height = top + max(n_queries * cell + gap * (len(panels) - 1), legend_height) + bottom
    drawn = Figure(figsize=(width, height), dpi=150)
    drawn.text(left / width, 1 - 0.18 / height, title, fontsize=11, color=INK, va="top", **AS_IT_IS)
    y = height - top
    for index, panel in enumerate(panels):
        y -= len(panel.queries) * cell
        box = (left / width, y / height, len(panel.keys) * cell / width, len(panel.queries) * cell / height)
        axes = drawn.add_axes(box)
        _draw_panel(axes, panel, tile, cell if labelled else None, first=index == 0, last=index == len(panels) - 1)
        y -= gap
    _draw_legend(drawn, legend_x / width, (height - top + 0.05) / height)
    lines = "\n".join(summary(panel, tile).replace(": ", "\n  ").replace("; ", "\n  ") for panel in panels)
    drawn.text(legend_x / width, (height - top - 1.3) / height, lines, fontsize=8, color=INK, va="top", linespacing=1.4)
    return drawn


def _draw_panel(axes: Any, panel: Panel, tile: int, cell: float | None, first: bool, last: bool) -> None:
    """Cells, tiles and labels; `cell` is the size of one in inches, None where it is too small for labels."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    seen = panel.seen
    n_queries, n_keys = seen.shape
    n_reader = sum(stream == "reader" for stream, _ in panel.keys)
    rgb = np.ones((n_queries, n_keys, 3))
    rgb[kind_of_cells(seen, tile) > EMPTY] = to_rgb(MASKED)
    colour = np.array([to_rgb(COLOURS[stream]) for stream, _ in panel.keys])
    rgb = np.where(seen[..., None], colour, rgb)
    axes.imshow(rgb, extent=(0, n_keys, n_queries, 0), interpolation="nearest", aspect="auto")
    if cell:  # fine lines between the cells
        axes.hlines(range(1, n_queries), 0, n_keys, color="white", linewidth=0.4)
        axes.vlines(range(1, n_keys), 0, n_queries, color="white", linewidth=0.4)
    for (i, j), kind in np.ndenumerate(tile_kinds(seen, tile)):
        x, y = j * tile, i * tile
        box = (x, y), min(tile, n_keys - x), min(tile, n_queries - y)
        axes.add_patch(Rectangle(*box, **_tile_style(int(kind))))
    if 0 < n_reader < n_keys:
        axes.axvline(n_reader, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set(xlim=(0, n_keys), ylim=(n_queries, 0))
    axes.tick_params(length=0, pad=2, colors=INK)
    for spine in axes.spines.values():
        spine.set(color="#999999", linewidth=0.6)
    axes.set_ylabel(f"{panel.name} queries", color=INK)
    if cell:
        size = min(8.0, cell * 72 * 0.72)
        axes.set_yticks(np.arange(n_queries) + 0.5, panel.queries, fontsize=size, **AS_IT_IS)
        axes.set_xticks(np.arange(n_keys) + 0.5, [label for _, label in panel.keys], fontsize=size, rotation=90,
                        **AS_IT_IS)  # fmt: skip
        axes.tick_params(axis="y", labelcolor=COLOURS[panel.name])
        for tick, (stream, _) in zip(axes.xaxis.get_major_ticks(), panel.keys, strict=True):
            tick.label1.set_color(COLOURS[stream])  # below the axes
            tick.label2.set_color(COLOURS[stream])  # above
    axes.xaxis.set_ticks_position("top" if first else "bottom")
    if last:
        axes.set_xlabel("keys: reader tokens, then writer steps", color=INK, loc="left")


def _tile_style(kind: int) -> dict[str, Any]:
    """How the frame of a tile is drawn."""
    return {
        EMPTY: {"fill": False, "edgecolor": "#dddddd", "linewidth": 0.5, "zorder": 2.5},
        PARTIAL: {"fill": False, "edgecolor": "#00000055", "linewidth": 0.6, "zorder": 2.5, "hatch": "////"},
        FULL: {"fill": False, "edgecolor": "black", "linewidth": 1.3, "zorder": 3},
    }[kind]


def _draw_legend(drawn: Any, x: float, y: float) -> None:
    """What colours and frames mean; (x, y) is the upper left corner."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=COLOURS["reader"], label="sees a reader token"),
        Patch(facecolor=COLOURS["writer"], label="sees a step of its own block"),
        Patch(label="full tile: no mask needed", **_tile_style(FULL)),
        Patch(label="partial tile: grey is masked", **{**_tile_style(PARTIAL), "fill": True, "facecolor": MASKED}),
        Patch(label="empty tile: never visited", **_tile_style(EMPTY)),
    ]
    drawn.legend(handles=handles, loc="upper left", bbox_to_anchor=(x, y), frameon=False, fontsize=9, borderpad=0)


# ------------------------------------------------------------------------------------------ the command


def panels_of(texts: Sequence[str], tokenizer_folder: Path | None = None) -> list[Panel]:
    """The reader's and the first writer layer's attention for documents packed into one row.

    Raises:
        UserError: lone surrogates, a tokenizer that cannot be loaded, too long a text.
    """
    import torch

    from tidal.blocks import BlockTable, passage
    from tidal.infer.trace import shown
    from tidal.streams import pack
    from tidal.tokenizer import MixedTokenizer

    try:
        tokenizer = MixedTokenizer.load(tokenizer_folder) if tokenizer_folder else MixedTokenizer.train(texts, 512)
        table = BlockTable(tokenizer)
        batch = pack([[passage(table, "", text) for text in texts]], table)
    except ValueError as error:
        raise UserError(f"cannot draw this: {error}") from error
    n_reader, n_writer = batch.reader_ids.shape[1], batch.writer_ids.shape[1]
    if n_reader + n_writer > MOST:
        raise UserError(f"the text has {n_reader} tokens and {n_writer} steps, a picture at most {MOST}: shorten it")
    read, fed = ([shown(tokenizer, i) for i in ids[0].tolist()] for ids in (batch.reader_ids, batch.writer_ids))
    reader_keys, writer_keys = [("reader", name) for name in read], [("writer", name) for name in fed]
    reader_ranges = torch.stack([batch.reader_sees, torch.zeros_like(batch.reader_sees)], 2)[0]
    writer_ranges = torch.stack([batch.sees_reader, batch.sees_writer + n_reader], 2)[0]
    return [
        Panel("reader", reader_ranges, read, reader_keys),
        Panel("writer", writer_ranges, fed, reader_keys + writer_keys),
    ]


def run(argv: list[str]) -> None:
    """Draw the picture that the arguments ask for."""
    settings = parse(Settings, argv, "tidal.kernels.picture", "Which keys each query sees, tile by tile.")
    if not 1 <= settings.tile <= MOST:
        raise UserError(f"--tile is {settings.tile}; it must be 1 to {MOST}")
    if settings.out and settings.out.suffix != ".png":
        raise UserError(f"--out {str(settings.out)!r}: the picture is a .png, name it so")
    if settings.out and not importlib.util.find_spec("matplotlib"):
        raise UserError('--out needs matplotlib: pip install -e ".[plot]"; without --out it is printed')
    panels = panels_of(settings.text, settings.tokenizer)
    if settings.out is None:
        for panel in panels:
            print(summary(panel, settings.tile))
            print("\n".join(characters(panel, settings.tile, shutil.get_terminal_size().columns)), end="\n\n")
        print("one character a key: █ seen, full tile  ▓ seen, partial tile  ░ masked  · empty tile  (▫ a wide one)")
        print("where keys do not fit, one a tile: █ full  ▒ partial  · empty")
        return
    from tidal.files import atomic_write

    png = io.BytesIO()
    title = " ".join(settings.text).strip().replace("\n", " ")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character the font lacks is drawn as a box
        figure(panels, settings.tile, title if len(title) <= 60 else title[:59] + "…").savefig(png)
    try:
        atomic_write(settings.out, png.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {str(settings.out)!r}: {error.strerror}; choose another --out") from error
    note(f"wrote {settings.out}")
    for panel in panels:
        print(summary(panel, settings.tile))


if __name__ == "__main__":
    main(run, "tidal.kernels.picture")
