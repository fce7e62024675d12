"""Bits per byte by position, at the context length a model was trained at and at 2, 4 and 8 times that.

    python -m benchmarks.length --checkpoint runs/text --data corpora/kjv/held-out --picture length.png

Every held-out document is cut into windows of the longest length, once; each length then reads the same blocks, in
windows of its own that begin where a longest one does or a multiple later. A block is charged at every length, and only
the length of what is read before it differs:

    8×   |<bos> b b b b b b b b b b b b b b b b|        position: reader tokens between a block and its <bos>
    1×   |<bos> b b|<bos> b b|<bos> b b|…      |

ALiBi promises (Press et al. 2021) that the longer windows are no worse; two figures say whether they are: bits per byte
of all text, and of the blocks that lie beyond the trained length, against the same blocks read with the trained length
of context before them (windows that overlap by half).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import record
from benchmarks.quality import COLOURS, new_figure, save
from tidal.cli import UserError, main, parse

if TYPE_CHECKING:
    from tidal.blocks import BlockTable, Passage
    from tidal.model import TidalTransformer


@dataclass(frozen=True)
class Length:
    """Settings of `python -m benchmarks.length`."""

    data: tuple[str, ...] = ()
    """Held-out text files, folders, globs or .jsonl."""
    checkpoint: str | None = None
    """A run folder (its best checkpoint) or a checkpoint folder; none: the newest run under runs/."""
    trained: int = 0
    """Reader tokens of a row in training; 0: as the run's config.json says."""
    times: tuple[int, ...] = (1, 2, 4, 8)
    """Lengths to read, as multiples of that."""
    bytes: int = 0
    """Of the documents take windows, evenly spread, up to about so many bytes; 0: all."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""
    out: str | None = None
    """Write the results into this JSON file, too."""
    picture: str | None = None
    """Draw bits per byte by position into this PNG, needs the extra `plot`."""


def run(argv: list[str]) -> None:
    """Measure, print a table and one JSON line."""
    settings = parse(Length, argv, "python -m benchmarks.length", __doc__)
    if not settings.times or min(settings.times) < 1:
        raise UserError("--times must be at least 1 each")
    from tidal import checkpoint
    from tidal.blocks import BlockTable, passage
    from tidal.device import pick_device, set_threads
    from tidal.infer.load import load_with_trainer
    from tidal.prepare.again import training_of
    from tidal.prepare.documents import read_documents

    documents = [d.prompt + d.completion for d in read_documents(settings.data)]
    folder = checkpoint.resolve(settings.checkpoint or None)
    model, tokenizer, trainer = load_with_trainer(folder, device=pick_device(settings.device))
    set_threads(model.config.shape.d_model)
    try:
        trained = settings.trained or training_of(trainer).text.reader_budget
    except ValueError as error:
        raise UserError(f"{folder} does not say how long its rows were; give --trained") from error
    table = BlockTable(tokenizer)
    whole = [passage(table, "", text) for text in documents]
    longest = max(settings.times) * trained
    every = max(1, round(sum(len(d.encode()) for d in documents) / settings.bytes)) if settings.bytes else 1
    results: list[dict[str, Any]] = []
    for times in sorted(settings.times):
        results.append({"times": times, **measure(model, table, whole, longest, times * trained, trained, every)})
        r = results[-1]
        print(f"{times:>3} × {trained} tokens   {r['bits_per_byte']:.4f} bits per byte   {shown(r)} "
              f"beyond a longest window's first {trained}   {r['bytes']:,} bytes", flush=True)  # fmt: skip
    overlapping = measure(model, table, whole, longest, trained, trained, every, overlap=trained // 2)
    print(f"  1 × {trained}, half of it overlap: {overlapping['bits_per_byte']:.4f}; "
          f"{shown(overlapping)} beyond the first {trained}")  # fmt: skip
    content = {"benchmark": "length", "settings": asdict(settings), "checkpoint": str(folder), "trained": trained,
               "results": results, "overlapping": overlapping, **record.machine()}  # fmt: skip
    if settings.out:
        record.save(Path(settings.out), content)
    if settings.picture:
        draw(results, trained, Path(settings.picture))
    print(json.dumps(content))


def measure(model: TidalTransformer, table: BlockTable, whole: Sequence[Passage], longest: int, length: int,
            trained: int, every: int = 1, overlap: int = 0) -> dict[str, Any]:  # fmt: skip
    """Bits per byte of passages in windows of `length` tokens: of all, by position in the longest window and in its
    own, and of what lies beyond the longest window's first `trained` tokens, or None. One longest window in `every` is
    read.
    """
    import numpy as np

    from tidal.blocks import Passage, windows
    from tidal.infer.score import unit_log_probs

    cut = [w for p in whole for w in windows(p, table, longest, 1 << 40)][::every]
    rows, inside, outside = [], [], []  # windows; of their blocks the tokens before, in the window and in the longest
    for w in cut:
        start = 1
        for part in windows(Passage(w.blocks, 1), table, length, 1 << 40, overlap=overlap):
            own = np.cumsum(table.n_tokens(part.blocks))[part.supervise_from - 1 : -1]
            n = len(part.blocks) - part.supervise_from
            rows.append(part)
            inside.append(own)
            outside.append(np.cumsum(table.n_tokens(w.blocks))[start - 1 : start - 1 + n])
            start += n
        if start != len(w.blocks):
            raise RuntimeError("the windows do not add up to the longest one")
    log_probs = np.concatenate(unit_log_probs(model, rows, table))
    blocks = np.concatenate([r.blocks[r.supervised] for r in rows])
    n_units, n_bytes = table.n_targets(blocks), table.n_bytes.view()[blocks]
    bits = -np.add.reduceat(log_probs, np.cumsum(n_units) - n_units) / math.log(2)  # of each block
    here, there = np.concatenate(inside), np.concatenate(outside)
    beyond = there >= trained
    bins = 2 ** np.floor(np.log2(here))  # positions 1, 2–3, 4–7, …
    by_position = [[int(b), float(bits[bins == b].sum() / n_bytes[bins == b].sum()), int(n_bytes[bins == b].sum())]
                   for b in np.unique(bins)]  # fmt: skip
    return {"bits_per_byte": float(bits.sum() / n_bytes.sum()), "bytes": int(n_bytes.sum()),
            "beyond_the_first": float(bits[beyond].sum() / n_bytes[beyond].sum()) if beyond.any() else None,
            "by_position": by_position}  # fmt: skip


def shown(result: dict[str, Any]) -> str:
    """Bits per byte of what lies beyond the trained length, which no document may reach."""
    return "nothing" if result["beyond_the_first"] is None else f"{result['beyond_the_first']:.4f}"


def draw(results: Sequence[dict[str, Any]], trained: int, path: Path) -> None:
    """Bits per byte by position in the window, a line for each length. Raises UserError without matplotlib."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for r, colour in zip(results, COLOURS, strict=False):
        at, bits, _ = zip(*r["by_position"], strict=True)
        axes.plot([math.sqrt(2) * a for a in at], bits, color=colour, marker="o", markersize=3,
                  label=f"{r['times']}× ({r['times'] * trained:,} tokens): {r['bits_per_byte']:.3f}")  # fmt: skip
    axes.axvline(trained, color="grey", linewidth=0.8, linestyle="--")
    axes.text(trained, 0.98, " trained up to here", va="top", fontsize=8, color="grey",
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set(xscale="log", xlabel="tokens read before, in the window", ylabel="bits per byte, held out")
    axes.legend(title="window")
    axes.grid(alpha=0.3)
    save(figure, path)


if __name__ == "__main__":
    main(run, "benchmarks.length")
