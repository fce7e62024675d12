"""Damaged checkpoints, and output that cannot be written: one clear line, and nothing else is blamed."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
import torch
from commands import Ran, assert_refused, tree
from safetensors.torch import load_file, save_file

from tidal import checkpoint
from tidal.tokenizer import MixedTokenizer

Edit = Callable[[Path], object]
STEP = "runs/addition/checkpoints/step-000001"


def flip(name: str, where: int = -1) -> Edit:
    def edit(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[where] ^= 1
        (folder / name).write_bytes(data)

    return edit


def replaced(name: str, old: str, new: str) -> Edit:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return edit


def other_tokenizer(folder: Path) -> None:
    MixedTokenizer.train(["another text altogether, with other words"], max_block_units=16).save(folder / "tokenizer")


def other_block_cap(folder: Path) -> None:
    """The same pieces, but cut otherwise: nothing but the fingerprint can tell."""
    tokenizer = MixedTokenizer.load(folder / "tokenizer")
    MixedTokenizer((folder / "tokenizer/tokenizer.model").read_bytes(), tokenizer.max_block_units - 1).save(
        folder / "tokenizer"
    )


def sealed(edit: Edit) -> Edit:
    """An edit by someone who then writes a manifest that fits."""

    def edit_and_seal(folder: Path) -> None:
        edit(folder)
        files = checkpoint._hashes(folder)
        (folder / checkpoint.MANIFEST).write_text(checkpoint._manifest(1, files), newline="")

    return edit_and_seal


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["context.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors")


DAMAGE: dict[str, tuple[Edit, str]] = {
    "weights": (flip("model.safetensors"), "is damaged: model.safetensors has SHA-256"),
    "short weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged: model.safetensors has"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "is damaged: model.safetensors is missing"),
    "config": (replaced("config.json", '"d_model": 16', '"d_model": 32'), "is damaged: config.json has SHA-256"),
    "manifest": (flip("manifest.json", 20), "is damaged: manifest.json"),
    "stray file": (lambda f: (f / "notes.txt").write_text("x"), "is damaged: notes.txt is unexpected"),
    "tokenizer": (other_tokenizer, r"is damaged: tokenizer/tokenizer\.\w+ has SHA-256"),
    "sealed tokenizer": (sealed(other_tokenizer), r"trained with tokenizer [0-9a-f]{16}…, .* [0-9a-f]{16}…"),
    "sealed block cap": (sealed(other_block_cap), r"trained with tokenizer [0-9a-f]{16}…, .* [0-9a-f]{16}…"),
    "sealed half of a tokenizer": (
        sealed(replaced("tokenizer/tokenizer.json", '"max_block_units": 16', '"max_block_units": 8')),
        "cannot be loaded: tokenizer fingerprint differs",
    ),
    "sealed config": (
        sealed(replaced("config.json", '"d_model": 16', '"d_model": 32')),
        "weights do not fit its config.json: .*size mismatch",
    ),
    "sealed NaN": (sealed(not_a_number), "context.weight has 1 values that are not finite"),
    "sealed unknown key": (
        sealed(replaced("config.json", '"d_model": 16', '"d_model": 16, "colour": "blue"')),
        r"cannot be loaded: Shape has unknown keys \['colour'\]",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused(kind: str, trained: Path, tmp_path: Path, command: Callable[..., Ran],
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    here = tmp_path / "here"
    shutil.copytree(trained, here)
    monkeypatch.chdir(here)
    edit, message = DAMAGE[kind]
    edit(here / STEP)
    before = tree(here)
    assert_refused(command("infer", "--prompt", "1 + 1 ="), "infer", f"^{STEP}:? .*({message})")
    assert_refused(command("evaluate", "addition", "--count", "1"), "evaluate", message)
    assert tree(here) == before


def full_disk() -> TextIO:
    return open("/dev/full", "w", buffering=1)


def closed_pipe() -> TextIO:
    ours, its = os.pipe()
    os.close(ours)
    return open(its, "w", buffering=1)


def ascii_only() -> TextIO:
    return io.TextIOWrapper(io.BytesIO(), "ascii", line_buffering=True)


@pytest.mark.parametrize("flags", [(), ("--json",), ("--trace", "-")], ids=["plain", "json", "trace"])
@pytest.mark.parametrize(("output", "code", "said"), [
    pytest.param(full_disk, 2, "tidal.infer: error: cannot write the output: No space left on device",
                 marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the disk that is always full")),
    (closed_pipe, 141, ""),
    (ascii_only, 2, r"tidal.infer: error: '\xe9' cannot be written in ascii; set PYTHONIOENCODING=utf-8"),
], ids=["full disk", "closed pipe", "ascii"])  # fmt: skip
def test_what_takes_no_output_is_named(output: Callable[[], TextIO], code: int, said: str, flags: tuple[str, ...],
                                       trained: Path, command: Callable[..., Ran],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """And nothing else is blamed for it: not the prompt, nor --trace."""
    arguments = ("--checkpoint", str(trained / "runs/addition"), "--prompt", "é", "--max-new-units", "4", *flags)
    with output() as taken:
        monkeypatch.setattr(sys, "stdout", taken)
        done = command("infer", *arguments)
    assert (done.code, done.err.splitlines()[1:]) == (code, [said] if said else [])
