"""What the reader foretells: both forms are the same. tests/test_model.py has the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.strategies import tokenizers
from tidal.config import Shape, TidalConfig
from tidal.foretold import Foretold
from tidal.infer.engine import generate
from tidal.model import TidalTransformer
from tidal.tokenizer import NO_NODE, ROOT, Spelling

SHAPE = Shape(d_model=8, n_heads=1, n_kv_heads=1, foretell=True)


def both_ways(spelling: Spelling, n_vocab: int, n_head: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Hints for every node, and for none, of several distributions."""
    torch.manual_seed(0)
    foretold = Foretold(TidalConfig(n_vocab, n_head, n_head, 16, "", SHAPE), spelling).to(dtype)
    sums = foretold.sums(torch.randn(3, n_vocab, dtype=dtype).mul(4).log_softmax(-1))
    nodes = torch.arange(NO_NODE, len(spelling.nodes)).repeat(2, 1)  # [2, nodes], as rows of steps
    which = torch.randint(3, nodes.shape)
    counted = foretold(sums, which, nodes), foretold.fixed(sums, which, nodes)
    n_children = len(spelling.child_unit) - int(spelling.n_children[ROOT])  # of the nodes that are not the root
    assert torch.equal(foretold(sums, which, nodes, n_begun=2, n_children=2 * n_children), counted[0])
    return counted


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("language", ["english", "chinese"])
def test_both_forms_tell_the_same(language: str, dtype: torch.dtype, tolerance: float) -> None:
    tokenizer = tokenizers()[language]
    one, other = both_ways(tokenizer.spelling, tokenizer.vocab_size, tokenizer.n_head, dtype)
    assert one.shape == other.shape
    torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_rare_tokens_keep_their_digits_next_to_a_likely_one(dtype: torch.dtype, tolerance: float) -> None:
    """By hand, every sum for itself; also where tokens are so rare that their probability is 0."""
    tokenizer = tokenizers()["english"]
    spelling, generator = tokenizer.spelling, torch.Generator().manual_seed(0)
    foretold = Foretold(TidalConfig(tokenizer.vocab_size, 64, 64, 16, "", SHAPE), spelling).to(dtype)
    foretold.embedding = torch.nn.Embedding.from_pretrained(torch.eye(tokenizer.n_head, dtype=dtype))
    logits = torch.randn(tokenizer.vocab_size, dtype=dtype, generator=generator)
    logits[spelling.order[0]] = 20.0
    logits[spelling.order[len(spelling.order) // 2 :]] = -math.inf
    log_probs = logits.log_softmax(-1)
    p = log_probs.double().exp()[spelling.order].tolist()
    nodes = torch.arange(len(spelling.nodes))
    told = foretold(foretold.sums(log_probs[None]), torch.zeros_like(nodes), nodes)
    for node, weights in enumerate(told):
        wanted = torch.zeros_like(weights)
        of_node = math.fsum(p[spelling.node_from[node] : spelling.node_to[node]])
        for child in range(spelling.first_child[node], spelling.first_child[node + 1]):
            share = math.fsum(p[spelling.child_from[child] : spelling.child_to[child]]) / (of_node + 1e-6)
            wanted[spelling.child_unit[child]] = math.log(1 + share / 1e-3) / math.log(1 + 1 / 1e-3)
        torch.testing.assert_close(weights, wanted, rtol=tolerance, atol=tolerance)


def test_the_reader_does_not_learn_from_what_the_writer_is_told() -> None:
    tokenizer = tokenizers()["english"]
    foretold = TidalTransformer.of(tokenizer, SHAPE).foretold
    assert foretold is not None
    log_probs = torch.randn(1, tokenizer.vocab_size).log_softmax(-1).requires_grad_()
    nodes = torch.arange(9)
    foretold(foretold.sums(log_probs), torch.zeros_like(nodes), nodes).sum().backward()
    assert log_probs.grad is None
    assert foretold.embedding.weight.grad is not None


def test_without_a_spelling_it_says_what_is_missing() -> None:
    tokenizer = tokenizers()["english"]
    model = TidalTransformer(TidalTransformer.of(tokenizer, SHAPE).config)
    with pytest.raises(RuntimeError, match="make it with the spelling of its tokenizer"):
        generate(model, tokenizer, ["the"])


def test_a_node_with_more_children_than_the_root() -> None:
    """ab, cb, db and eb, which all end with b: the root has one child, b has four."""
    letters = {letter: 2 + i for i, letter in enumerate("abcde")}
    spelled = [(token, (letters["b"], letters[first])) for token, first in enumerate("acde", 2)]
    spelling = Spelling(spelled, eob_id=0, eos_id=1)
    assert np.diff(spelling.first_child).tolist()[:2] == [1, 4]
    one, other = both_ways(spelling, 8, 8, torch.float64)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    assert (other[:, 2] != 0).all(), "b is told what comes before it"
    assert (other[:, 0] == 0).all(), "nothing is told where there is no node"
