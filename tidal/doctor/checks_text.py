"""Checks 1 to 4: text, blocks, ids, and the way round they are written."""

from __future__ import annotations

import copy
from functools import partial

from tidal.doctor.patient import Document, Patient
from tidal.doctor.registry import DECODED, ORACLE, TRAINED, check
from tidal.doctor.report import Meter, Where
from tidal.doctor.tape import Tape
from tidal.doctor.texts import CONTROLS, HOSTILE, long_prompt


def _cut_inside(patient: Patient, document: Document) -> Document:
    """The same text behind a prompt that ends inside the longest block of the first hundred."""
    blocks = patient.tokenizer.split(document.text[:2000])[:100]
    longest = max(range(len(blocks)), key=lambda i: len(blocks[i]))
    at = sum(map(len, blocks[:longest])) + len(blocks[longest]) // 2
    return Document(document.text[:at], document.text[at:], document.ends)


@check(1, "the same ids",
       "tokenization in training is not the one in decoding: prompts stripped, tokenized whole, or cached wrongly")
def same_ids(patient: Patient, meter: Meter) -> None:
    """Text survives every round trip; a tokenizer without a past gives the same ids; training reads what decoding does.

    Prompts go through the engine, which is asked for one unit; what its reader is fed is compared.
    """
    tokenizer = patient.tokenizer
    fresh = copy.deepcopy(tokenizer)
    meter.same("fingerprints", tokenizer.fingerprint, fresh.fingerprint, Where(), ("tokenizer", "made anew"))
    for text in [*(d.text for d in patient.documents), *HOSTILE]:
        ids, sides = tokenizer.encode(text), ("text", "round trip")
        meter.same("text of blocks", text, "".join(tokenizer.split(text)), Where(text), sides)
        meter.same("decoded ids", text, tokenizer.decode(ids), Where(text), sides)
        meter.same("token ids", ids, fresh.encode(text), Where(text), ("tokenizer", "made anew"))
        for block in tokenizer.split(text):
            n = len(patient.oracle.spell(block))
            meter.holds(0 < n <= tokenizer.max_block_units,
                        f"a block has {n} units, not 1 to {tokenizer.max_block_units}", Where(text, block))  # fmt: skip
    cut = (_cut_inside(patient, d) for d in patient.documents if d.text)
    for document in [*patient.documents, *cut, long_prompt(patient)]:
        layout, tape = patient.layout(document), Tape(patient.exact)
        wanted = [token.id for token in layout.tokens]
        trained = patient.pack([[document]]).reader_ids[0]
        at = partial(patient.where_read, document)
        meter.same("token ids", wanted, trained, at, (ORACLE, TRAINED))
        n_prompt = sum(token.block < layout.steps[0].block for token in layout.tokens) if layout.steps else len(wanted)
        patient.forced(tape.model, document, [tokenizer.eos_id])
        meter.same("token ids of the prompt", wanted[:n_prompt], tape.row()["reader ids"], at, (ORACLE, DECODED))


@check(2, "turned round once", "blocks are turned round twice or not at all; palindromes hide it")
def turned_round(patient: Patient, meter: Meter) -> None:
    """Training asks for each block's last unit first; a model that knows a text by heart writes exactly that text.

    "By heart" means logits that name the next unit of the definition's script; engine, grammar, decoder and tokenizer
    are the real ones.
    """
    tokenizer, tells = patient.tokenizer, False
    for text in (*HOSTILE, *(document.completion for document in patient.documents)):
        for block in tokenizer.split(text):
            units, back = patient.oracle.spell(block)[::-1], tokenizer.unreverse(tokenizer.write_units(block))
            meter.same("units as written", units, tokenizer.write_units(block), Where(text, block),
                       (ORACLE, "tokenizer"))  # fmt: skip
            meter.same("text read back", block, back, Where(text, block), ("text", "round trip"))
    for document in patient.documents:
        layout = patient.layout(document)
        script = [step.target for step in layout.steps]
        trained = patient.pack([[document]]).targets[0]
        meter.same("targets", script, trained[trained >= 0],
                   partial(patient.where, document), (ORACLE, TRAINED))  # fmt: skip
        if not script:
            continue
        first = layout.steps[0].block
        blocks = [block for block in layout.blocks[first:] if block]
        done = patient.forced(patient.exact, document, script)
        for wanted, got in zip(blocks, [*done.blocks, *[""] * len(blocks)], strict=False):
            meter.same("blocks", wanted, got, Where(document.text, wanted), ("text", DECODED))
        meter.same("completions", document.completion, done.completion, Where(document.text), ("text", DECODED))
        tells |= any((units := patient.oracle.spell(block)) != units[::-1] for block in blocks)
    meter.holds(tells, "all blocks of the texts are palindromes, which read the same both ways; give other texts")


@check(3, "read back as trained", "what was generated is re-tokenized differently than the training text was")
def read_back(patient: Patient, meter: Meter) -> None:
    """retokenize(write_units(block)) = the tokens and places of training, for every block; the engine reads just those.

    Its reader is recorded while a model writes the document by heart.
    """
    tokenizer, sides = patient.tokenizer, (TRAINED, DECODED)
    first_with: dict[str, Document] = {}
    for document in patient.documents:
        for block in filter(None, patient.layout(document).blocks):
            first_with.setdefault(block, document)
    for block, document in first_with.items():
        known = tokenizer.encode_block(block)
        again = tokenizer.retokenize(tokenizer.write_units(block))
        here = Where(document.text, block)
        meter.same("text read back", block, again.text, here, sides)
        meter.same("token ids", list(known.tokens), list(again.tokens), here, sides)
        meter.same("places", list(known.places), list(again.places), here, sides)
    for document in patient.documents:
        layout = patient.layout(document)
        script, tape = [step.target for step in layout.steps], Tape(patient.exact)
        if not script:
            continue
        patient.forced(tape.model, document, script)
        n = len(layout.tokens)
        if not document.ends:  # nothing was asked after the last block, so it was not read
            n = sum(token.block < layout.steps[-1].block for token in layout.tokens)
        batch = patient.pack([[document]])
        for name, fed in (("reader ids", batch.reader_ids), ("reader places", batch.reader_places)):
            meter.same(name, fed[0, :n], tape.row()[name],
                       partial(patient.where_read, document), sides)  # fmt: skip


@check(4, "text is never control", "user text such as <eob> or </s> turns into control ids")
def text_is_text(patient: Patient, meter: Meter) -> None:
    """Literal control strings, in the middle of a prompt too, are spelled; the only control id read is `<bos>`."""
    tokenizer = patient.tokenizer
    controls = {i for i in range(tokenizer.vocab_size) if not tokenizer.id_bytes[i]}
    named = [tokenizer.piece_name(i) for i in sorted(controls)]
    for text in (*CONTROLS, *named, f"a{named[0]} {named[-1]}b"):
        ids = tokenizer.encode(text)
        meter.same("control ids", [], [i for i in ids if i in controls], Where(text), ("allowed", "found"))
        meter.same("text read back", text, tokenizer.decode(ids), Where(text), ("text", "round trip"))
    for text in (" ".join(named), "".join(CONTROLS)):
        tape = Tape(patient.exact)
        patient.forced(tape.model, Document(text, ""), [tokenizer.eos_id])
        read = tape.row()["reader ids"].tolist()
        meter.same("control ids read", [tokenizer.bos_id], [i for i in read if i in controls], Where(text),
                   ("allowed", DECODED))  # fmt: skip
        meter.same("text read", text, tokenizer.decode([i for i in read if i not in controls]), Where(text),
                   ("text", DECODED))  # fmt: skip
