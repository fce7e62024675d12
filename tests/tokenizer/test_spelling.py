"""The trie of spellings against the tokens themselves."""

from __future__ import annotations

import pytest

from tests.strategies import TOKENIZERS, tokenizers
from tidal.tokenizer import NO_NODE, ROOT, MixedTokenizer, Spelling


def spelled(tokenizer: MixedTokenizer) -> dict[int, list[int]]:
    """Token → all that is written for it, last character first, and `<eob>` or `<eos>`."""
    words = {i: tokenizer.id_bytes[i].decode() for i in range(258, tokenizer.vocab_size) if tokenizer.id_bytes[i]}
    return {tokenizer.eos_id: [tokenizer.eos_id],
            **{i: [*tokenizer.write_units(word), tokenizer.eob_id] for i, word in words.items()}}  # fmt: skip


def problem(spelling: Spelling, tokenizer: MixedTokenizer) -> str | None:
    """What is wrong with a spelling, going through all nodes and all tokens."""
    tokens = spelled(tokenizer)
    if sorted(spelling.order.tolist()) != sorted(tokens):
        return "tokens are missing, or twice"
    starts = {tuple(units[:n]) for units in tokens.values() for n in range(len(units))}
    if starts | {(tokenizer.eos_id,)} != set(spelling.nodes):
        return "nodes are not what can be written"
    for written, node in spelling.nodes.items():
        n = len(written)
        here = {token for token, units in tokens.items() if tuple(units[:n]) == written}
        if here != set(spelling.order[spelling.node_from[node] : spelling.node_to[node]].tolist()):
            return f"tokens of {written}"
        after: dict[int, set[int]] = {}
        for token in here:
            if len(tokens[token]) > n:
                after.setdefault(tokens[token][n], set()).add(token)
        children = slice(spelling.first_child[node], spelling.first_child[node + 1])
        given = zip(spelling.child_unit[children].tolist(), spelling.child_from[children].tolist(),
                    spelling.child_to[children].tolist(), strict=True)  # fmt: skip
        if {unit: set(spelling.order[start:end].tolist()) for unit, start, end in given} != after:
            return f"children of {written}"
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nodes_have_the_tokens_that_end_with_what_is_written(name: str) -> None:
    tokenizer = tokenizers()[name]
    assert problem(tokenizer.spelling, tokenizer) is None


def test_planted_bugs() -> None:
    tokenizer = tokenizers()["english"]
    pairs = [(token, tuple(units[: -1 if len(units) > 1 else None])) for token, units in spelled(tokenizer).items()]
    forward = Spelling([(token, units[::-1]) for token, units in pairs], tokenizer.eob_id, tokenizer.eos_id)
    lacking = Spelling(pairs[:-1], tokenizer.eob_id, tokenizer.eos_id)
    ends_with_eos = Spelling(pairs, tokenizer.eos_id, tokenizer.eos_id)
    assert problem(Spelling(pairs, tokenizer.eob_id, tokenizer.eos_id), tokenizer) is None
    assert problem(forward, tokenizer) == "nodes are not what can be written"
    assert problem(lacking, tokenizer) == "tokens are missing, or twice"
    assert str(problem(ends_with_eos, tokenizer)).startswith("children of")


def test_nodes_along_a_block() -> None:
    spelling = tokenizers()["english"].spelling
    longest = max(spelling.nodes, key=len)
    nodes = spelling.along([*longest, longest[-1], longest[0]])
    assert nodes[0] == ROOT
    assert nodes[: len(longest) + 1] == [spelling.node(longest[:t]) for t in range(len(longest) + 1)]
    assert nodes[-1] == NO_NODE
    assert [spelling.nodes[longest[:t]] for t in range(len(longest) + 1)] == nodes[: len(longest) + 1]
