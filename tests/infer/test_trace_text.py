"""A trace as text, to the last character. That it tells what happened: tests/infer/test_trace.py."""

from __future__ import annotations

from tidal.infer.trace import Runner, Trace, TracedBlock, TracedStep
from tidal.infer.trace_text import render_text
from tidal.tokenizer import NO_PLACE


def test_a_terminal_shows_this() -> None:
    """Columns in line whatever the names, what is least sure, what was forbidden, and no settings that do nothing."""

    def step(t: int, name: str, log_prob: float, forced: bool = False) -> TracedStep:
        return TracedStep(t, t, 3.0, "<bob>", 9, name, ("e", "", "好"), log_prob, 1, (Runner("d", 0.25, False),), 0.25,
                          forced)  # fmt: skip

    first = (step(0, "好", -0.0), step(1, "<eob>", -0.0, forced=True))
    second = (step(0, "⟨U+200D⟩", -2.0), step(1, "<eob>", -1.0))
    blocks = (TracedBlock(first, "好", (7, 8), ("0xE5", "好"), (NO_PLACE, 0)),
              TracedBlock(second, "\u200d", (5,), ("⟨U+200D⟩",), (0,)))  # fmt: skip
    how = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0,
           "max_new_units": 9, "max_new_blocks": 2, "stop": ()}  # fmt: skip
    prompt = "the" * 700
    text = render_text(Trace(prompt, (("t", ("t",)),) * 201, blocks, (), "好\u200d", "block_limit", how))
    tokens = "  t             t\n" * 200
    assert text == f"""\
prompt          … {prompt[-2000:]}
completion      好⟨U+200D⟩
stopped by      block_limit: max_new_blocks 2 reached
units           4 in 2 blocks
log-probability -3 nats
bits per byte   0.7213
least sure      ⟨U+200D⟩ at 13.53%: block 2, step 0
settings        temperature 0.0, seed 0, max_new_units 9, max_new_blocks 2

Prompt blocks and their tokens (1 earlier ones left out)
{tokens}
Block 1  好  0 nats
  step place position  fed     recalled          wrote   p                         forbidden runners-up (x: forbidden)
  0   0     3         <bob>   e – 好            好      100%    rank 1            25.00%    x d 25.00%
  1   1     3         <bob>   e – 好            <eob>   100%    rank 1, forced    25.00%    x d 25.00%
  turned round  好
  read as       0xE5 · 好 @0   (@: place)

Block 2  ⟨U+200D⟩  -3 nats
  step place position  fed     recalled          wrote   p                         forbidden runners-up (x: forbidden)
  0   0     3         <bob>   e – 好            ⟨U+200D⟩ 13.53%  rank 1            25.00%    x d 25.00%
  1   1     3         <bob>   e – 好            <eob>   36.79%  rank 1            25.00%    x d 25.00%
  turned round  ⟨U+200D⟩
  read as       ⟨U+200D⟩ @0   (@: place)
"""  # fmt: skip
