"""Distinct blocks with all that the streams need of them, and passages: documents as indices of blocks."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt

from tidal.tokenizer import NO_PLACE, MixedTokenizer

Ints = npt.NDArray[np.int64]
SUFFIX_ORDERS = (0, 2, 3)  # all units written so far in the block, the last two, the last three
FACTOR, _64_BITS = 0x9E3779B97F4A7C15, 0xFFFFFFFFFFFFFFFF
# Far apart: seeds that differ by no more than units do would name a word and another's last units by one code.
_SEEDS = [(0xCBF29CE484222325 + order * FACTOR) & _64_BITS for order in SUFFIX_ORDERS]
NOTHING_WRITTEN = _SEEDS[0]  # the code of no units at all
MAX_BLOCKS = 1 << 17  # of a table before `limit` empties it; about half a kilobyte each
BOS_BLOCK, EOS_BLOCK = 0, 1  # indices of the two special blocks in every BlockTable
NOTHING = -1  # a target or hash that is not there


def suffix_hashes_along(written: Sequence[int], digits: Sequence[bool]) -> list[tuple[int, int, int]]:
    """Name the suffixes that the steps of a block stand on: for every t, hashes of the first t units written.

    `written` are units, last character first; `digits[unit]` says which are digits. Each entry has a 32-bit hash
    for each of SUFFIX_ORDERS; a suffix that is shorter than its order, or that holds a digit (numbers are not
    spelt by rote), is NOTHING. Multiplicative hashing (Knuth, TAOCP 6.4): the upper half of 64 bits is kept.
    """
    steps = [(NOTHING, NOTHING, NOTHING)]
    plain, before, last = 0, 0, 0  # plain: how many units since the last digit
    for t, (unit, whole) in enumerate(zip(written, codes_along(written)[1:], strict=True), start=1):
        plain = 0 if digits[unit] else plain + 1
        two = three = NOTHING
        if plain >= 2:
            two = fold(fold(_SEEDS[1], last), unit) >> 32
        if plain >= 3:
            three = fold(fold(fold(_SEEDS[2], before), last), unit) >> 32
        steps.append((whole >> 32 if plain == t else NOTHING, two, three))
        before, last = last, unit
    return steps


def suffix_hashes(written: Sequence[int], digits: Sequence[bool]) -> tuple[int, int, int]:
    """The last entry of `suffix_hashes_along`: what the step that follows `written` stands on."""
    return suffix_hashes_along(written, digits)[-1]


def codes_along(written: Sequence[int]) -> list[int]:
    """For every t from 0 to len(written): 64 bits that name the first t units."""
    return list(accumulate(written, fold, initial=NOTHING_WRITTEN))


def fold(code: int, unit: int) -> int:
    """A step of multiplicative hashing, in 64 bits: the code of what `code` names with one more unit."""
    return (code ^ unit + 1) * FACTOR & _64_BITS


class Growing:
    """An append-only int64 array [n, …] that doubles its memory when it is full."""

    def __init__(self, *width: int) -> None:
        self._data: Ints = np.zeros((1024, *width), np.int64)
        self.n = 0

    def extend(self, values: Ints | Sequence[int] | Sequence[tuple[int, ...]]) -> None:
        """Append `values` ([m] or [m, width])."""
        end = self.n + len(values)
        if end > len(self._data):
            self._data = np.concatenate([self._data, np.zeros((max(end, self.n), *self._data.shape[1:]), np.int64)])
        if end > self.n:
            self._data[self.n : end] = values
        self.n = end

    def view(self) -> Ints:
        """The values so far, without a copy."""
        return self._data[: self.n]


# text, tokens, places, targets (last unit first, then <eob>), last token
_Entry = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


class BlockTable:
    """Distinct blocks, each with all that the streams need of it, as ragged arrays to gather from.

    Blocks repeat (Zipf), so a text is an array of indices into this table, and building a batch is a few
    gathers. Index BOS_BLOCK reads `<bos>` and writes nothing; EOS_BLOCK writes `<eos>` and reads nothing.
    """

    def __init__(self, tokenizer: MixedTokenizer) -> None:
        self.tokenizer = tokenizer
        self._digits: list[bool] = tokenizer.digit_units.tolist()
        self.clear()

    def clear(self) -> None:
        """Forget all blocks; indices given out before are void."""
        self.index: dict[str, int] = {}
        self.texts: list[str] = []
        self.tokens, self.places, self.targets = Growing(), Growing(), Growing()
        self._hashes, self._nodes, self._codes = Growing(3), Growing(), Growing()
        self.token_start, self.target_start, self.last_token = Growing(), Growing(), Growing()
        self.n_bytes, self.n_chars = Growing(), Growing()
        self._unnamed: list[tuple[int, ...]] = []  # targets of new blocks
        self.token_start.extend([0])
        self.target_start.extend([0])
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        self._append([("", (bos,), (NO_PLACE,), (), bos), ("", (), (), (eos,), eos)])

    def __len__(self) -> int:
        return self.last_token.n

    def limit(self) -> None:
        """Forget all blocks if there are more than MAX_BLOCKS; for where endless text comes in."""
        if len(self) > MAX_BLOCKS:
            self.clear()

    def n_tokens(self, index: npt.NDArray[np.int32]) -> Ints:
        """How many tokens each of these blocks [n] is read as."""
        return self.token_start.view()[index + 1] - self.token_start.view()[index]

    def n_targets(self, index: npt.NDArray[np.int32]) -> Ints:
        """How many steps each of these blocks [n] is written in, the last one for `<eob>`."""
        return self.target_start.view()[index + 1] - self.target_start.view()[index]

    @property
    def hashes(self) -> Growing:
        """[n, 3], hashes of the suffixes that the steps of all blocks stand on."""
        self._name()
        return self._hashes

    @property
    def nodes(self) -> Growing:
        """[n], their nodes of the tokenizer's `Spelling`."""
        self._name()
        return self._nodes

    @property
    def codes(self) -> Growing:
        """[n], codes of all that is written before them."""
        self._name()
        return self._codes

    def _name(self) -> None:
        """When a batch asks: preparing data never does."""
        written = [targets[:-1] for targets in self._unnamed]  # all names before anything changes: they stay in step
        hashes = list(chain.from_iterable(suffix_hashes_along(w, self._digits) for w in written))
        nodes = list(chain.from_iterable(map(self.tokenizer.spelling.along, written)))
        codes = np.array(list(chain.from_iterable(map(codes_along, written))), np.uint64).view(np.int64)
        self._unnamed.clear()
        self._hashes.extend(hashes)
        self._nodes.extend(nodes)
        self._codes.extend(codes)

    def indices(self, blocks: Iterable[str]) -> npt.NDArray[np.int32]:
        """Look up blocks, adding the new ones; [n] int32."""
        blocks = list(blocks)
        found = list(map(self.index.get, blocks))
        if None in found:
            new = [text for text in dict.fromkeys(blocks) if text not in self.index]
            entries = list(map(self._entry, new))  # before anything changes: a lone surrogate raises here
            self.index.update(zip(new, range(len(self), len(self) + len(new)), strict=True))
            self._append(entries)
            found = list(map(self.index.get, blocks))
        return np.array(found, np.int32)

    def unfinished(self, written: Sequence[int]) -> int:
        """Index of a new block of which only these units are written, and which nothing can read yet.

        It may end inside a character, so it has no text; the target of its last step is of no account.
        """
        self._append([("", (), (), (*written, self.tokenizer.eob_id), self.tokenizer.bos_id)])
        return len(self) - 1

    def _entry(self, text: str) -> _Entry:
        block = self.tokenizer.encode_block(text)
        return text, block.tokens, block.places, (*block.units[::-1], self.tokenizer.eob_id), block.tokens[-1]

    def _append(self, entries: Iterable[_Entry]) -> None:
        texts, tokens, places, targets, last_tokens = zip(*entries, strict=True)
        self.texts += texts
        self.n_bytes.extend([len(text.encode()) for text in texts])
        self.n_chars.extend(list(map(len, texts)))
        self.token_start.extend(self.tokens.n + np.cumsum([len(t) for t in tokens]))
        self.target_start.extend(self.targets.n + np.cumsum([len(t) for t in targets]))
        self.tokens.extend(list(chain.from_iterable(tokens)))
        self.places.extend(list(chain.from_iterable(places)))
        self.targets.extend(list(chain.from_iterable(targets)))
        self._unnamed += filter(None, targets)
        self.last_token.extend(last_tokens)


@dataclass(frozen=True, slots=True)
class Passage:
    """A document, or a window of one: block indices [n] with its BOS_BLOCK first, an EOS_BLOCK last if it ends. They
    mean nothing in another table than the one that gave them."""

    blocks: npt.NDArray[np.int32]
    supervise_from: int = 1
    """Index of the first block that is learnt; those before it are a prompt."""
    place_offset: int = 0
    position_scale: float = 1.0
    """Training may stretch distances, to prepare for longer ones; decoding does not."""
    read_only: tuple[int, ...] = ()
    """Indices of blocks after the prompt that are read, but not learnt: the beginnings of blocks that were cut."""
    n_stray: int = 0
    """This many blocks after BOS_BLOCK are a distractor (--elsewhere), moved by `stray_offset`, not `place_offset`."""
    stray_offset: int = 0

    @property
    def supervised(self) -> npt.NDArray[np.bool_]:
        """Which blocks [n] are learnt."""
        learnt = np.arange(len(self.blocks)) >= self.supervise_from
        learnt[list(self.read_only)] = False
        return learnt


def passage(table: BlockTable, prompt: str, completion: str, *, ends: bool = True, place_offset: int = 0) -> Passage:
    """Split a prompt (unsupervised) and its completion into one passage, exactly as the decoder will.

    Raises ValueError on lone surrogates.
    """
    before, after = table.tokenizer.split(prompt), table.tokenizer.split(completion)
    return joined(table, before, after, ends=ends, place_offset=place_offset)


def joined(table: BlockTable, before: Sequence[str], after: Sequence[str], *, ends: bool = True,
           place_offset: int = 0) -> Passage:  # fmt: skip
    """A passage of the blocks of a prompt and of its completion."""
    last = [EOS_BLOCK] if ends else []
    blocks = np.concatenate([[BOS_BLOCK], table.indices([*before, *after]), last]).astype(np.int32)
    return Passage(blocks, 1 + len(before), place_offset)


def windows(p: Passage, table: BlockTable, reader_budget: int, writer_budget: int,
            overlap: int = 0) -> list[Passage]:  # fmt: skip
    """Cut a passage that is over a budget into windows, each opened by BOS_BLOCK, in order.

    Every supervised block is supervised in exactly one window. With `overlap`, windows after the first begin with up to
    that many reader tokens of the text before them, unsupervised, as context. Without, only the first has such context:
    the end of the prompt, as much as fits beside the supervised blocks, or half a window if that is more. Windows
    without supervised blocks are left out.

    Raises ValueError for a passage with `read_only` blocks, since boundary dropout comes after, or with strays.
    """
    if p.read_only or p.n_stray:
        raise ValueError(f"blocks {p.read_only} are read only and {p.n_stray} are strays; cut windows before that")
    body, n_prompt = p.blocks[1:], p.supervise_from - 1
    n_tokens, n_steps = table.n_tokens(body), table.n_targets(body)
    n_steps[:n_prompt] = 0
    if 1 + n_tokens.sum() <= reader_budget and n_steps.sum() <= writer_budget:
        return [p]
    if not overlap:
        left_out = too_early(n_tokens[: n_prompt + reader_budget], n_prompt, reader_budget)
        body, n_tokens, n_steps = body[left_out:], n_tokens[left_out:], n_steps[left_out:]
        p = dataclasses.replace(p, supervise_from=p.supervise_from - left_out)
    cut = []
    for start, first, end in spans(n_tokens, n_steps, reader_budget, writer_budget, overlap):
        supervise_from = max(first + 1, p.supervise_from) - start
        if end + 1 - start > supervise_from:
            blocks = np.concatenate([[BOS_BLOCK], body[start:end]]).astype(np.int32)
            cut.append(dataclasses.replace(p, blocks=blocks, supervise_from=supervise_from))
    return cut


def too_early(n_tokens: Ints, n_prompt: int, reader_budget: int) -> int:
    """How many of a prompt's first blocks the first window leaves out, for want of room. `n_tokens` [n] are of its
    blocks and of the first `reader_budget` (or all) of those after it.
    """
    room = max(reader_budget - 1 - int(n_tokens[n_prompt:].sum()), reader_budget // 2)
    return n_prompt - int((np.cumsum(n_tokens[:n_prompt][::-1]) <= room).sum())


def spans(n_tokens: Ints, n_steps: Ints, reader_budget: int, writer_budget: int,
          overlap: int = 0) -> Iterator[tuple[int, int, int]]:  # fmt: skip
    """How `windows` cuts blocks of these numbers of tokens and writer steps, [n] each: (start, first, end) in order.

    A span reads blocks [start, end) after a BOS_BLOCK; [first, end) were in none before it. Without `overlap`, start
    is first, and a span depends on nothing before it: a long document can be cut piece by piece.
    """
    n_read = np.concatenate([[1], 1 + np.cumsum(n_tokens)])  # tokens up to block i, <bos> included
    n_written = np.concatenate([[0], np.cumsum(n_steps)])
    start, end = 0, 0
    while end < len(n_tokens):
        least = max(n_read[end] - overlap, n_read[end + 1] + 1 - reader_budget)  # room for the next block
        start = min(int(np.searchsorted(n_read, least)), end)
        by_reader = np.searchsorted(n_read, n_read[start] - 1 + reader_budget, side="right") - 1
        by_writer = np.searchsorted(n_written, n_written[end] + writer_budget, side="right") - 1
        first, end = end, max(int(min(by_reader, by_writer)), end + 1)
        yield start, first, end


def share_rows(sizes: Ints, reader_budget: int, writer_budget: int) -> tuple[Ints, Ints]:
    """How passages of these sizes ([n, 2]: reader tokens, writer steps) share rows: their order [n], and where in it
    each row begins [rows].

    A row takes the longest passages that are left, one after the other, until the next one does not fit, then likewise
    the shortest. A passage over a budget on its own gets a row of its own. Of equally long ones the first comes first.
    """
    tokens, steps = sizes.T.tolist()
    left = deque(np.argsort(-sizes[:, 0], kind="stable").tolist())
    order: list[int] = []
    starts: list[int] = []
    while left:
        starts.append(len(order))
        order.append(i := left.popleft())
        n_tokens, n_steps = tokens[i], steps[i]
        for end, take in ((0, left.popleft), (-1, left.pop)):
            while left and (n_tokens + tokens[left[end]] <= reader_budget
                            and n_steps + steps[left[end]] <= writer_budget):  # fmt: skip
                order.append(i := take())
                n_tokens, n_steps = n_tokens + tokens[i], n_steps + steps[i]
    return np.array(order, np.int64), np.array(starts, np.int64)
