"""Random generations that must not be garbage: random weights, hot samples, hostile prompts.

    python -m benchmarks.fuzz [--count 10000] [--seed 0]

Every block is checked while it is written: its units are writable, and those that the tokenizer itself spells it in.
Every completion: valid text, no empty block, no block over the cap, finite log-probabilities, one for each unit. Stops
at the first failure; ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from benchmarks import record
from tidal.cli import progress
from tidal.config import Shape
from tidal.infer.engine import Completion, generate
from tidal.model import TidalTransformer
from tidal.tokenizer import Block, MixedTokenizer

CORPORA = {
    "english": ["the cat sat on the mat, and the dog did not. " * 20, "Don't panic! It's 1234 o'clock.\n"],
    "chinese": ["我们在学校学习中文。今天天气很好，我们去公园。" * 20],
    "digits": ["12 + 34 = 46\n" * 20],
    "nothing": [""],
}
PROMPTS = ["", " ", "\n\n", "   \t", "the ca", "the cat ", "<bob>", "<eos><eob>", "<0x41>", "\u2581", "\x00", "\ufffd",
           "中文测试", "👩‍👩‍👧‍👦 family", "e\u0301clair", "สวัสดี", "नमस्ते", "\r\n", "1" * 50, "\U0010ffff", "a" * 300,
           "ﷺ" * 9, "😀" * 20, "\u202eright", "don't",
           "x_y__z", "½ ² Ⅷ", "\u2028\u2029"]  # fmt: skip


def random_model(tokenizer: MixedTokenizer, rng: np.random.Generator) -> TidalTransformer:
    """A small model of random shape and weights of random size."""
    heads = int(rng.choice([1, 2, 4]))
    attention: list[Literal["memory", "block", "none"]] = ["memory", "block", "none"]
    shape = Shape(
        d_model=16 * heads, n_heads=heads, n_kv_heads=1, reader_layers=int(rng.integers(1, 3)),
        writer_layers=int(rng.integers(1, 3)), reader_ff=32, writer_ff=32, suffix_rows=int(rng.choice([0, 64])),
        writer_attention=attention[rng.integers(3)], qk_norm=bool(rng.integers(2)),
        foretell=bool(rng.integers(2)), recall=bool(rng.integers(2)),
    )  # fmt: skip
    model = TidalTransformer.of(tokenizer, shape)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=float(rng.choice([0.02, 0.3, 3.0])))
    return model.eval()


def watched(tokenizer: MixedTokenizer) -> MixedTokenizer:
    """Let the tokenizer refuse to read back units that are not its own spelling, as training never saw such."""
    read_back = tokenizer.retokenize

    def retokenize(units: Sequence[int]) -> Block:
        block = read_back(units)
        assert list(units) == tokenizer.write_units(block.text), f"{units} is not the spelling of {block.text!r}"
        return block

    tokenizer.retokenize = retokenize  # type: ignore[method-assign]
    return tokenizer


def check(completion: Completion, tokenizer: MixedTokenizer) -> None:
    """Raise AssertionError unless this is text, and has a log-probability for each of its units."""
    completion.text.encode()  # no lone surrogates
    assert all(completion.blocks), f"empty block in {completion}"
    spelled = [len(tokenizer.write_units(block)) for block in completion.blocks]
    assert max(spelled, default=0) <= tokenizer.max_block_units, f"block over the cap in {completion}"
    n_ends = len(spelled) + (completion.stop_reason == "eos")  # an <eob> each, and <eos>
    assert len(completion.log_probs) == sum(spelled) + n_ends, completion
    assert all(math.isfinite(x) for x in completion.log_probs), completion


def main() -> None:
    """Generate, check, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="generations (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of models, prompts and samples (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizers = {
        name: watched(MixedTokenizer.train(texts, vocab_size=400, max_block_units=int(rng.integers(4, 20))))
        for name, texts in CORPORA.items()
    }
    began, done = time.perf_counter(), 0
    reasons: Counter[str] = Counter()
    with progress(args.count, "fuzz", "generations") as bar:
        while done < args.count:
            tokenizer = tokenizers[str(rng.choice(list(tokenizers)))]
            n = min(100, args.count - done)
            prompts = [PROMPTS[i] for i in rng.integers(0, len(PROMPTS), n)]
            completions = generate(
                random_model(tokenizer, rng), tokenizer, prompts, temperature=float(rng.uniform(1, 100)),
                top_k=int(rng.choice([0, 5])), top_p=float(rng.choice([0.5, 1.0])), min_p=float(rng.choice([0.0, 0.1])),
                repetition_penalty=float(rng.choice([1.0, 2.0])), seed=int(rng.integers(1 << 30)), max_new_units=60,
                batch_size=int(rng.choice([1, 7, 64])), max_new_blocks=int(rng.choice([0, 3])),
            )  # fmt: skip
            for completion in completions:
                check(completion, tokenizer)
                reasons[completion.stop_reason] += 1
            done += n
            bar.update(n)
    print(json.dumps({"benchmark": "fuzz", "generations": done, "failures": 0, "stop_reasons": reasons,
                      "seconds": round(time.perf_counter() - began, 1), "seed": args.seed,
                      **record.machine()}))  # fmt: skip


if __name__ == "__main__":
    main()
