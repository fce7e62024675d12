"""The picture: every cell and every tile is what the ranges say, and the command draws, prints or refuses."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import run
from tidal import cli
from tidal.kernels import picture
from tidal.kernels.picture import EMPTY, FULL, PARTIAL, Panel, characters, figure, panels_of, summary, tile_kinds
from tidal.kernels.reference import visible_keys
from tidal.streams import DocumentBuilder
from tidal.tokenizer import MixedTokenizer

SUM = "12 + 7 = 19\n"


def kinds_by_hand(seen: Any, tile: int) -> list[list[int]]:
    """One tile after the other."""
    rows = [seen[i : i + tile] for i in range(0, len(seen), tile)]
    tiles = [[row[:, j : j + tile] for j in range(0, seen.shape[1], tile)] for row in rows]
    return [[FULL if t.all() else PARTIAL if t.any() else EMPTY for t in row] for row in tiles]


def panel(seed: int, n_queries: int, n_keys: int) -> Panel:
    ranges = torch.randint(0, n_keys + 1, (n_queries, 2, 2), generator=torch.Generator().manual_seed(seed))
    keys = [("reader" if j < n_keys // 2 else "writer", "x") for j in range(n_keys)]
    return Panel("writer", ranges.int(), ["q"] * n_queries, keys)


def wrong_cells(p: Panel, tile: int) -> int:
    """How many cells of the drawing in characters contradict the ranges."""
    drawn = [line[8:].replace(" ", "") for line in characters(p, tile, 200)[-len(p.queries) :]]
    seen = visible_keys(p.ranges[None], len(p.keys))[0].numpy()
    kinds = kinds_by_hand(seen, tile)
    return sum(
        drawn[i][j] != {EMPTY: "··", PARTIAL: "░▓", FULL: "?█"}[kinds[i // tile][j // tile]][int(seen[i, j])]
        for i, j in np.ndindex(*seen.shape)
    )


@given(st.integers(0, 2**30), st.integers(1, 20), st.integers(1, 30), st.integers(1, 9))
def test_cells_and_tiles_are_what_the_ranges_say(seed: int, n_queries: int, n_keys: int, tile: int) -> None:
    p = panel(seed, n_queries, n_keys)
    assert tile_kinds(p.seen, tile).tolist() == kinds_by_hand(p.seen, tile)
    assert wrong_cells(p, tile) == 0


@pytest.mark.parametrize("bug", [
    lambda seen, tile: tile_kinds(seen, tile).T if seen.shape[0] == seen.shape[1] else tile_kinds(seen, tile),
    lambda seen, tile: tile_kinds(np.roll(seen, 1, 1), tile),
    lambda seen, tile: np.minimum(tile_kinds(seen, tile), PARTIAL),
    lambda seen, tile: np.maximum(tile_kinds(seen, tile), PARTIAL),
])  # fmt: skip
def test_check_catches(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = [panel(3, 15, 15), panel(4, 9, 20), *panels_of([SUM])]
    assert not any(wrong_cells(p, 4) for p in panels)
    monkeypatch.setattr(picture, "tile_kinds", bug)
    assert any(wrong_cells(p, 4) for p in panels)


def test_tiles_where_keys_do_not_fit() -> None:
    p = panel(1, 20, 60)
    assert max(map(len, characters(p, 8, 69))) == 69  # labels, keys, a gap
    assert characters(p, 8, 68) == ["".join("·▒█"[kind] for kind in row) for row in kinds_by_hand(p.seen, 8)]
    with pytest.raises(cli.UserError, match="--tile 8: too small for 7 columns; take 9 or more"):
        characters(p, 8, 7)


def test_labels_are_one_column_a_character() -> None:
    keys = [("reader", "学"), ("reader", "e\u0301"), ("writer", "abcdefghij")]
    drawn = characters(Panel("writer", torch.tensor([[[0, 2], [2, 3]]], dtype=torch.int32), ["学"], keys), 3, 80)
    assert [line[8:] for line in drawn[:-1]] == ["   a", "   b", "   c", "   d", "   e", "   f", "▫e …"]
    assert drawn[-1] == "      ▫ ██ █"


def test_streams_are_the_builders() -> None:
    """Documents packed into a row: reader and writer see what DocumentBuilder says."""
    texts = [SUM, "3 + 4 = 7\n"]
    tokenizer = MixedTokenizer.train(texts, 512)
    reader, writer, labels = [], [], []
    n_reader = n_writer = 0
    for text in texts:
        builder = DocumentBuilder(tokenizer, reader_start=n_reader, writer_start=n_writer)
        tokens, steps = [*builder.opening], []
        for block in (tokenizer.encode_block(b) for b in tokenizer.split(text)):
            steps += builder.write([*block.units[::-1], tokenizer.eob_id])
            tokens += builder.read(block)
        steps += builder.write([tokenizer.eos_id])
        reader += [token.sees for token in tokens]
        writer += [(step.sees_reader, step.sees_writer) for step in steps]
        labels += [step.id for step in steps]
        n_reader, n_writer = n_reader + len(tokens), n_writer + len(steps)
    drawn_reader, drawn_writer = panels_of(texts)
    assert drawn_reader.ranges.tolist() == [[[*sees], [0, 0]] for sees in reader]
    assert drawn_writer.ranges.tolist() == [
        [[*sees_reader], [n_reader + first, n_reader + end]] for sees_reader, (first, end) in writer
    ]
    assert [stream for stream, _ in drawn_writer.keys] == ["reader"] * n_reader + ["writer"] * n_writer
    assert [label for _, label in drawn_writer.keys[n_reader:]] == drawn_writer.queries
    assert drawn_writer.queries[:4] == ["<bob>", "2", "1", "<bob>"]


def test_summary_counts() -> None:
    p = Panel("reader", torch.tensor([[[0, 4], [0, 0]]] * 2 + [[[0, 3], [0, 0]]] * 2), ["q"] * 4, [("reader", "k")] * 6)
    assert summary(p, 2) == (
        "reader: 4 queries × 6 keys, 6 tiles of 2 × 2: 2 empty, 1 partial, 3 full; "
        "58% of the pairs seen, 67% computed"
    )


@pytest.mark.parametrize("text", ["", "a b", "The tide goes out in characters and comes in as tokens. " * 4])
def test_figure_shows_every_cell(text: str) -> None:
    """The colours in the image, the frames of the tiles, and a label for every key where there is room."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb

    panels = panels_of([text])
    drawn = figure(panels, 8, "title")
    assert len(drawn.axes) == 2
    for axes, p in zip(drawn.axes, panels, strict=True):
        image = np.asarray(axes.images[0].get_array())
        kinds = picture.kind_of_cells(p.seen, 8)
        wanted = np.where(kinds[..., None] > EMPTY, to_rgb(picture.MASKED), to_rgb("white"))
        colours = [to_rgb(picture.COLOURS[stream]) for stream, _ in p.keys]
        for i, j in np.argwhere(p.seen):
            wanted[i, j] = colours[j]
        assert np.allclose(image, wanted)
        hatched = [patch for patch in axes.patches if patch.get_hatch()]
        assert len(axes.patches) == tile_kinds(p.seen, 8).size
        assert len(hatched) == (tile_kinds(p.seen, 8) == PARTIAL).sum()
        if len(panels[1].keys) < 120:
            assert [tick.get_text() for tick in axes.get_xticklabels()] == [label for _, label in p.keys]


# ------------------------------------------------------------------------------------------ the command


def test_command_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)  # no matplotlib
    picture.run(["--text", "a b", "--tile", "4"])
    out = capsys.readouterr().out
    assert "\n  <bob> ▓░░░ ▓░░░··\n      a ▓░░░ ▓▓░░··\n  <bob> ▓▓░░ ░░▓░··\n" in out  # as in the module's docstring
    assert out.count("tiles of 4 × 4") == 2


def test_command_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flags = ["--text", SUM, "今天 😀 $x^$", "--out", str(tmp_path / "p.png")]
    done = run([sys.executable, "-m", "tidal.kernels.picture", *flags], tmp_path)
    assert done.code == 0, done.err
    assert done.err == f"wrote {tmp_path / 'p.png'}\n"
    assert [line.split(":")[0] for line in done.lines] == ["reader", "writer"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


@pytest.mark.parametrize(("flags", "message"), [
    (["--tile", "0"], "--tile is 0; it must be 1 to 4096"),
    (["--tile", "1" + "0" * 20], "--tile is 10{20}; it must be 1 to 4096"),
    (["--out", "p.jpg"], r"--out 'p.jpg': the picture is a .png"),
    (["--out", "nowhere/p.png"], r"cannot write 'nowhere/p.png': No such file"),
    (["--text", "a\udcff"], "cannot draw this: .*surrogate"),
    (["--text", "a b " * 2000], "the text has .* a picture at most 4096: shorten it"),
    (["--tokenizer", "nowhere"], "cannot draw this: cannot read nowhere"),
    (["--txt", "a"], "unknown flag '--txt'; did you mean '--text'"),
])  # fmt: skip
def test_command_refuses(flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UserError, match=message):
        picture.run(flags)
    assert not list(tmp_path.iterdir())


def test_help_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    done = run([sys.executable, "-X", "importtime", "-m", "tidal.kernels.picture", "--help"], tmp_path)
    assert done.code == 0
    assert "python -m tidal.kernels.picture" in done.out
    assert "--tokenizer" in done.out
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.err.splitlines()}
    assert "tidal" in imported
    assert not {"torch", "triton", "matplotlib", "sentencepiece"} & imported


def test_out_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.UserError, match="--out needs matplotlib"):
        picture.run(["--out", "p.png"])


def test_a_trained_tokenizer_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MixedTokenizer.train(["banana " * 50], 1024).save(tmp_path)
    picture.run(["--text", "banana", "--tokenizer", str(tmp_path)])
    assert "2 queries × 2 keys" in capsys.readouterr().out  # <bos> banana
