"""Shards: the blocks of some documents as flat arrays, in memory or memory-mapped."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tidal.blocks import BlockTable
from tidal.cli import UserError
from tidal.files import fsync
from tidal.prepare.reading import Part

SHARD = 1 << 22
"""Characters of a shard."""
BYTES_PER_BYTE = 3
"""About how many bytes a shard has for each of its text: one of text, and three for a block."""
ARRAYS = ("text", "blocks", "parts")
SUMMARY = "shard.json"
MOST = 2**31 - 1
"""What int32 holds: bytes, tokens or steps of a part."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Parts of documents, one after the other."""

    text: npt.NDArray[np.uint8]
    """[bytes], UTF-8"""
    blocks: npt.NDArray[np.unsignedinteger[Any]]
    """[blocks, 3]: bytes, tokens, steps with `<eob>`"""
    parts: npt.NDArray[np.int32]
    """[parts, 6]: blocks, blocks of the prompt, bytes, tokens, learnt steps (without `<eos>`), whether it ends"""

    @classmethod
    def encode(cls, parts: Sequence[Part], table: BlockTable) -> Self:
        """Split and count; the parts begin and end at seams. The table (of any content) is made use of."""
        table.limit()
        blocks: list[str] = []
        counts = []
        for part in parts:
            before = len(blocks)
            blocks += table.tokenizer.split(part.text) if part.text else ()
            counts.append(len(blocks) - before)
        index = table.indices(blocks)
        sizes = np.stack([table.n_bytes.view()[index], table.n_tokens(index), table.n_targets(index)], 1)
        up_to = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(sizes, 0)])
        ends = np.cumsum(np.array(counts, np.int64))
        n_bytes, n_tokens, n_steps = (up_to[ends] - up_to[ends - counts]).T
        is_prompt = np.array([part.is_prompt for part in parts])
        rows = np.array([counts, counts * is_prompt, n_bytes, n_tokens, n_steps * ~is_prompt,
                         [part.ends for part in parts]], np.int64).T  # fmt: skip
        if (worst := rows[:, :5].max(1, initial=0)).max(initial=0) > MOST:
            part = parts[int(worst.argmax())]
            raise UserError(f"{part.source} has {len(part.text):,} characters without a place where they can be cut; "
                            "put white space between them")  # fmt: skip
        text = "".join(part.text for part in parts).encode()
        longest = 4 * table.tokenizer.max_block_units  # bytes of a block; it has fewer tokens and steps
        return cls(np.frombuffer(text, np.uint8), sizes.astype(np.min_scalar_type(longest)), rows.astype(np.int32))

    def holds(self, parts: Sequence[Part]) -> bool:
        """Whether it was made of these parts."""
        texts = [part.text.encode() for part in parts]
        wanted = [(len(text), p.ends, bool(text) and p.is_prompt) for text, p in zip(texts, parts, strict=True)]
        own = [(row[2], row[5] == 1, row[1] > 0) for row in self.parts.tolist()]
        return own == wanted and self.text.tobytes() == b"".join(texts)

    def write(self, folder: Path) -> str:
        """Write the shard, as a whole or not at all; returns the SHA-256 of its shard.json. Raises OSError."""
        new = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        new.mkdir()
        try:
            for name in ARRAYS:
                packed = io.BytesIO()  # np.save into a file hides the reason of an error
                np.save(packed, getattr(self, name), allow_pickle=False)
                (new / f"{name}.npy").write_bytes(packed.getbuffer())
            hashes = {name: _sha256(new / f"{name}.npy") for name in ARRAYS}
            (new / SUMMARY).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8", newline="")
            for path in (*new.iterdir(), new):
                fsync(path)
            os.rename(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        fsync(folder.parent)
        return _sha256(folder / SUMMARY)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map the files of a shard into memory. Raises UserError where they are damaged."""
        try:
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS]
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder} is damaged: {error}; prepare it again") from error
        return cls(*arrays)


def verify(folder: Path, claimed: str | None = None) -> str:
    """Compare a shard with its digests (`claimed`: of shard.json itself); returns the digest of shard.json.

    Raises UserError that names the file: one is missing, or differs.
    """
    try:
        summary = (folder / SUMMARY).read_bytes()
        hashes = json.loads(summary)
        found = hashlib.sha256(summary).hexdigest()
        known = isinstance(hashes, dict) and sorted(hashes) == sorted(ARRAYS)
        if not known or claimed not in (None, found):
            raise UserError(f"{folder / SUMMARY} is damaged; remove {folder} and prepare again")
        for name in ARRAYS:
            if _sha256(folder / f"{name}.npy") != hashes[name]:
                raise UserError(f"{folder / name}.npy is damaged; remove {folder} and prepare again")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is damaged: {error}; remove it and prepare again") from error
    return found


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
