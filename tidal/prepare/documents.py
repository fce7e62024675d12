"""Documents as a whole, and keeping some of them for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidal.cli import UserError, note
from tidal.prepare.reading import Part, read_parts


@dataclass(frozen=True, slots=True)
class Document:
    """A text to learn: all of it, or (where there is a prompt) the completion given the prompt."""

    prompt: str
    """Read but not learned; "" for plain text."""
    completion: str
    """Read and learned."""
    source: str
    """Where it comes from: a file, or FILE:LINE."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def read_documents(paths: Sequence[str]) -> Iterator[Document]:
    """The documents that `read_parts` reads, each in one piece; folders that it leaves out are noted."""
    return joined(read_parts(paths, note))


def joined(parts: Iterable[Part]) -> Iterator[Document]:
    """Documents of their parts."""
    prompt: list[str] = []
    completion: list[str] = []
    for part in parts:
        (prompt if part.is_prompt else completion).append(part.text)
        if part.ends:
            yield Document("".join(prompt), "".join(completion), part.source)
            prompt, completion = [], []


@dataclass(frozen=True, slots=True)
class Division:
    """Which documents are for validation: some of them as a whole, or else the tail of one."""

    held_out: npt.NDArray[np.bool_]
    """[documents], those held out as a whole."""
    left_out: npt.NDArray[np.bool_]
    """[documents], copies of what is held out, as a whole or its tail: neither learnt nor held out."""
    n_copies: int
    """How many documents are copies of ones before them, these among them."""
    cut: int = -1
    """The document whose tail is held out, if any, and its characters."""
    length: int = 0
    size: int = 0
    """About how many characters the tail has."""

    @property
    def reach(self) -> tuple[int, int]:
        """The characters of the document, from and to, that decide where exactly the tail begins."""
        near = self.size // 2
        return max(self.length - self.size - max(near, 2), 0), min(self.length - self.size + near + 1, self.length)

    def tail_start(self, text: str) -> int:
        """Where the tail begins, given the text of the document within `reach`."""
        low, _ = self.reach
        return low + _boundary(text, self.length - self.size - low, self.size // 2)


def divide(sizes: npt.NDArray[np.int64], has_prompt: npt.NDArray[np.bool_], digests: npt.NDArray[np.uint64],
           fraction: float, seed: int, cap: int = 1_000_000) -> Division:  # fmt: skip
    """Divide documents of these sizes (characters, [n]) into training and validation, by document, never by line.

    Validation is about `fraction` of the characters, but at most about `cap`. Which documents it gets depends
    only on `seed` and their numbers. Where no choice of whole documents comes near that (there is only one,
    or one of them is nearly everything), the *tail* of the longest plain document, cut at the end of a
    paragraph, line or word, becomes the only validation document, and training keeps the rest of it. A
    document with a prompt is never cut.

    Of documents with equal `digests` ([n], of their texts) the first one counts, and the others go with it: they are
    learnt where it is learnt, and left out where it, or its tail, is held out. So nothing is both learnt and held out,
    and validation holds nothing twice.

    Raises:
        UserError: a `fraction` outside (0, 1), no documents, or a single one that cannot be divided.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the held out part must lie between 0 and 1, not {fraction}; try 0.05")
    _, firsts, which = np.unique(digests, return_index=True, return_inverse=True)
    first, n = firsts[which], len(firsts)  # of each document the first one with its text; how many texts there are
    is_copy = first != np.arange(len(sizes))
    total = int(sizes[~is_copy].sum())
    target = min(fraction * total, cap)
    keys = np.frombuffer(b"".join(_hash(f"{seed}:{i}") for i in range(len(sizes))), ">u8")
    order = np.argsort(keys, kind="stable")
    order = order[~is_copy[order]]
    chosen: list[int] = []
    taken = 0
    for i, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if taken >= 0.99 * target:
            break
        if taken + size <= target:
            chosen.append(i)
            taken += size
    if taken < target / 2:
        limit = min(max(2 * target, min(0.2 * total, cap)), total - 1)
        shuffled = sizes[order]
        rather_long = order[(target < shuffled) & (shuffled <= limit)]
        divisible = order[(shuffled > max(target, 1)) & ~has_prompt[order]]
        if len(rather_long):
            chosen = [int(rather_long[np.argmin(sizes[rather_long])])]
        elif len(divisible):
            cut = int(divisible[np.argmax(sizes[divisible])])
            length = int(sizes[cut])  # a short one is cut earlier: a fifth before its end
            size = min(max(1, round(target), min(1000, length // 5)), length - 1)
            return Division(np.zeros(len(sizes), np.bool_), (first == cut) & is_copy, len(sizes) - n, cut, length, size)
        elif not chosen and n > 1:
            chosen = [int(order[np.argmin(shuffled)])]
    if not chosen:
        raise UserError(f"too little data to hold some out for validation (different documents: {n}); add more")
    held_out = np.zeros(len(sizes), np.bool_)
    held_out[chosen] = True
    return Division(held_out, held_out[first] & is_copy, len(sizes) - n)


def apart(digests: npt.NDArray[np.uint64], n: int) -> Division:
    """Documents with these `digests` ([documents], of their texts), of which all from number `n` on are for validation.

    Copies of those are left out: nothing is both learnt and held out, and validation holds nothing twice. Raises
    UserError where nothing is left to learn.
    """
    held_out = np.zeros(len(digests), np.bool_)
    held_out[n + np.unique(digests[n:], return_index=True)[1]] = True
    left_out = np.isin(digests, digests[n:]) & ~held_out
    if left_out[:n].all():
        raise UserError("every document of --data is in --validation-data, too, so none is left to learn; give others")
    return Division(held_out, left_out, len(digests) - len(np.unique(digests)))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _boundary(text: str, at: int, reach: int) -> int:
    """The end of a paragraph, else line, else word, nearest to `at` and at most `reach` from it; or `at`."""
    low, high = max(at - reach, 0), min(at + reach, len(text) - 1)
    for end in ("\n\n", "\n\r\n", "\n", " "):
        found = text.rfind(end, low, at), text.find(end, max(at - len(end) + 1, 0), high)
        if cuts := [start + len(end) for start in found if start >= 0]:
            return min(cuts, key=lambda cut: abs(cut - at))
    return at
