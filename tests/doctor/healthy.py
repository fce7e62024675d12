"""Random configurations and texts without a bug: `python -m tests.doctor.healthy --count 200` wants no findings."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np
import torch

from tests.strategies import TOKENIZERS, random_model, tokenizers
from tests.tokenizer.strategies import HOSTILE
from tidal.cli import main, note, parse
from tidal.config import Shape
from tidal.doctor import Document, Report, run
from tidal.doctor.patient import Precision
from tidal.doctor.registry import CHECKS

WORDS = ("the", "light", "night", "and", "land", "said", "let", "be", "fox", "dogs", "'tis", "don't", "12", "345",
         "54663", "今天", "天气", "é", "naïve")  # fmt: skip


def random_shape(r: random.Random) -> Shape:
    heads = r.choice((1, 2, 3, 4, 6, 12))
    kv_heads = r.choice([n for n in (1, 2, 3, 4, 6, 12) if heads % n == 0])
    width = r.choice([n for n in (2, 4, 7, 16) if n >= heads // kv_heads] or [16])
    return Shape(
        d_model=heads * width, n_heads=heads, rotary_places=width % 4 == 0 and r.random() < 0.5,
        n_kv_heads=kv_heads, reader_layers=r.randint(1, 3), writer_layers=r.randint(1, 3), reader_ff=r.randint(4, 40),
        writer_ff=r.randint(4, 40), suffix_rows=r.choice((0, 1, 7, 61, 1000)),
        foretell=r.random() < 0.5,
        recall=r.random() < 0.5,
        writer_attention=r.choice(("memory", "memory", "block", "none")), qk_norm=r.random() < 0.5,
        place_jitter=r.choice((0, 0, 1, 20)), step_stride=r.choice((0.0, 0.0, 0.3, 0.375, 1.0)),
        step_window=r.choice((0, 0, 1, 2, 5)),
    )  # fmt: skip


def random_text(r: random.Random) -> str:
    parts = [r.choice(HOSTILE) if r.random() < 0.2 else r.choice(WORDS) for _ in range(r.randint(0, 9))]
    return r.choice(("", " ")).join(parts) if r.random() < 0.3 else " ".join(parts)


def examine(seed: int) -> Report:
    """One random model, tokenizer, texts; every fourth in float64, every fourth in bfloat16; of the others, every
    second is trained with autocast. The model is left as it was.
    """
    r = random.Random(seed)
    tokenizer = tokenizers()[r.choice(TOKENIZERS)]
    dtype = (torch.float32, torch.float64, torch.float32, torch.bfloat16)[seed % 4]
    model = random_model(tokenizer, random_shape(r), dtype, seed)
    texts = [Document(random_text(r), random_text(r)) for _ in range(3)]
    precision: Precision = "bf16" if seed % 4 == 2 else "float32"
    model.train()
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.random.get_rng_state()
    said: list[int] = []
    report = run(model, tokenizer, texts=texts, quick=True, precision=precision,
                 subject=f"seed {seed}: {tokenizer.fingerprint[:6]}, {dtype}, {precision}, {model.config.shape}",
                 tell=lambda check: said.append(check.number))  # fmt: skip
    assert [r.number for r in report.results] == said == sorted(CHECKS)
    assert [r.number for r in report.results if r.verdict == "skipped"][-3:] == [20, 21, 22]
    assert all(r.compared for r in report.results if r.verdict == "well")
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    assert torch.equal(state, torch.random.get_rng_state())
    return report


@dataclass(frozen=True)
class Healthy:
    """Settings of `python -m tests.doctor.healthy`."""

    count: int = 200
    """How many."""
    first: int = 0
    """The first seed."""


def command(argv: list[str]) -> int:
    settings = parse(Healthy, argv, "tests.doctor.healthy", "False alarms of the doctor over random configurations.")
    torch.set_num_threads(1)
    alarms, seconds, began = 0, [], time.perf_counter()
    for seed in range(settings.first, settings.first + settings.count):
        report = examine(seed)
        seconds.append(report.seconds)
        if not report.ok:
            alarms += 1
            print(report.subject, report.table(), sep="\n", flush=True)
        if seed % 10 == 9:
            note(f"{seed + 1}: {alarms} false alarms")
    passed = time.perf_counter() - began
    print(f"{alarms} of {settings.count} false alarms; {np.mean(seconds):.2f} s each, {passed:.0f} s")
    return int(alarms > 0)


if __name__ == "__main__":
    main(command, "tests.doctor.healthy")
