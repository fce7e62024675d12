"""Addition: how few samples it is learnt from, whether ten digits are ever wrong, how far beyond the trained it goes.

    python -m benchmarks.addition --parts samples exact length --seeds 0 1 2 3 4 --picture addition.png
    python -m benchmarks.addition --parts samples --samples 2000 10000 --seeds 0 1 --contrasts

`samples`   a finite set of different sums of numbers of up to three digits, lengths in proportion to themselves; exact
            match on sums that are not in it, numbers below 1000 each as often. The comparison is Lee et al. 2023,
            "Teaching Arithmetic to Small Transformers", who balance lengths, too.
`exact`     operands of up to ten digits; random pairs of numbers below 10^10, and cases chosen to be hard.
`length`    operands of up to ten digits; sums of both shorter and longer ones.

A contrast is trained on the same sums in the same order: `forward` writes the first character first, its places then
count from a block's beginning; `no places` has all places 0. What a contrast answers is found without decoding, in one
packed pass: greedy decoding gives the right answer if, and only if, each of its units is the likeliest one after the
right ones before it. Results are added to a JSON file after every run; what is there already is not measured again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks import record
from benchmarks.addition_results import Run, draw, markdown
from tidal.allocator import keep_memory
from tidal.cli import UserError, main, note, parse
from tidal.config import Lengths, Train
from tidal.train.presets import PRESETS

if TYPE_CHECKING:
    from benchmarks.switches import Switches
    from tidal.model import TidalTransformer
    from tidal.train.recipes.addition import AdditionRecipe, Problem, Sum

PLAIN = "backward"
CONTRASTS = ("forward", "no places")
MOST_DIGITS = 18
"""of a number drawn from all below 10^digits, as the parts `samples` and `exact` draw theirs: 64 bits hold these"""


@dataclass(frozen=True)
class Settings:
    """Settings of `python -m benchmarks.addition`."""

    parts: tuple[Literal["samples", "exact", "length"], ...] = ("samples", "exact", "length")
    """What to measure."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of weights, data and order."""
    contrasts: bool = False
    """Also train and measure the contrasts, with the first two seeds."""
    samples: tuple[int, ...] = (1000, 2000, 3000, 4000, 5000, 10000)
    """Sizes of the finite sets."""
    sample_digits: int = 3
    """Most digits of an operand in the finite sets."""
    sample_lengths: Lengths = "rising"
    """--lengths of the first part's training."""
    sample_steps: int = 3000
    """Steps of a run of the first part."""
    digits: int = 10
    """Most digits of an operand in training, for the second part."""
    exact_steps: int = 6000
    """Steps of a run of the second part."""
    pairs: int = 10_000
    """Random pairs to ask for in the second part."""
    length_digits: int = 10
    """Most digits of an operand in training, for the third part."""
    length_steps: int = 12_000
    """Steps of a run of the third part."""
    lengths: tuple[int, ...] = (10, 12, 15, 20, 30, 50, 100)
    """Digits of both operands to ask for in the third part."""
    count: int = 1000
    """Sums to ask for in the first part, and at every length in the third."""
    set: tuple[str, ...] = ()
    """KEY=VALUE …: flags of python -m tidal.train for all runs, without their dashes, such as rows=32 lr=2e-3."""
    out: str = "benchmarks/results/addition.json"
    """Results are added to this file."""
    picture: str | None = None
    """Draw exact match by length into this PNG, needs the extra `plot`."""
    table: bool = False
    """Only print the tables of what is in the file, as Markdown, and draw the picture."""


def run(argv: list[str]) -> None:
    """Measure what is missing, print the tables and one JSON line."""
    settings = parse(Settings, argv, "python -m benchmarks.addition", __doc__)
    keep_memory()  # as training does
    if min(settings.samples, default=0) < 1 or min(settings.lengths, default=0) < 1 or not settings.seeds:
        raise UserError("--samples, --lengths and --seeds must each name something, of at least 1")
    if min(settings.pairs, settings.count) < 1:
        raise UserError("--pairs and --count must be at least 1")
    out = Path(settings.out)
    runs: list[Run] = json.loads(out.read_text()) if out.exists() else []
    if not settings.table:
        for wanted in planned(settings):
            if any(wanted.items() <= r.items() for r in runs):
                continue
            runs.append({**wanted, **measure(wanted), **record.machine()})
            record.save(out, runs)
    print(markdown(runs))
    if settings.picture:
        draw([r for r in runs if r["part"] == "length"], Path(settings.picture))
    print(json.dumps({"benchmark": "addition", "out": str(out), "runs": len(runs), **record.machine()}))


def planned(settings: Settings) -> list[Run]:
    """What identifies each run: part, variant, seed, how it is trained and what it is asked. Raises UserError."""
    base = parse(Train, [f"--{flag}" for flag in settings.set], "--set", default=PRESETS["addition"])
    variants = [(PLAIN, seed) for seed in settings.seeds]
    if settings.contrasts:
        variants += [(contrast, seed) for contrast in CONTRASTS for seed in settings.seeds[:2]]
    found: list[Run] = []
    for part in settings.parts:
        kinds = {
            "samples": (settings.sample_steps, settings.sample_digits, settings.samples, {"count": settings.count}),
            "exact": (settings.exact_steps, settings.digits, (0,), {"pairs": settings.pairs}),
            "length": (settings.length_steps, settings.length_digits, (0,),
                       {"count": settings.count, "lengths": list(settings.lengths)}),
        }  # fmt: skip
        steps, digits, sizes, asked = kinds[part]
        if part != "length" and digits > MOST_DIGITS:
            raise UserError(f"the part {part} asks for numbers of at most {MOST_DIGITS} digits, not {digits}")
        longest = max([digits, *(settings.lengths if part == "length" else [])])
        lengths = settings.sample_lengths if part == "samples" else base.addition.lengths
        for size in sizes:
            own = replace(base.addition, digits=digits, samples=size, lengths=lengths,
                          max_block_units=max(base.addition.max_block_units, longest + 4))  # fmt: skip
            shape = replace(base.model, place_jitter=max(base.model.place_jitter, longest))
            for variant, seed in variants:
                train = replace(base, addition=own, model=shape, max_steps=steps, seed=seed)
                found.append({"part": part, "variant": variant, "seed": seed, "samples": size,
                              "train": json.loads(json.dumps(asdict(train))), "asked": asked})  # fmt: skip
    return found


def measure(wanted: Run) -> Run:
    """Train one model and ask it."""
    import numpy as np

    from benchmarks.switches import Switches
    from tidal.device import set_threads
    from tidal.train.recipes.addition import answer_of, prompt_of, random_sums

    train, asked = Train.from_dict(wanted["train"]), wanted["asked"]
    set_threads(train.model.d_model, train.threads)
    switches = {PLAIN: Switches(), "forward": Switches(write_order="forward"), "no places": Switches(places="off")}
    name = f"{wanted['part']}, {wanted['variant']}, {wanted['samples'] or 'endless'} samples, seed {wanted['seed']}"
    recipe = recipe_of(train, switches[wanted["variant"]])
    model, trained = learn(train, recipe, name)

    def share(sums: Sequence[Sum]) -> tuple[float, list[str]]:
        problems = [(prompt_of(*s), answer_of(*s)) for s in sums]
        return ask(model, recipe, problems, decode=wanted["variant"] == PLAIN)

    rng, digits = np.random.default_rng([wanted["seed"], 99]), train.addition.digits
    found: Run = {}
    if wanted["part"] == "samples":
        known = set(recipe.samples)
        sums: dict[Sum, None] = {}
        while len(sums) < asked["count"]:
            a, b = (int(n) for n in rng.integers(0, 10**digits, 2))
            if (prompt_of(a, b), answer_of(a, b)) not in known:
                sums[a, b] = None
        found["exact_match"], wrong = share(list(sums))
    elif wanted["part"] == "exact":
        pairs = [(int(a), int(b)) for a, b in rng.integers(0, 10**digits, (asked["pairs"], 2))]
        found["exact_match"], wrong = share(pairs)
        cases = edge_cases(digits)
        found["edge_cases"], wrong_cases = share(cases)
        found |= {"wrong_edge_cases": wrong_cases[:20], "n_edge_cases": len(cases)}
    else:
        by_length, wrong = {}, []
        for n in asked["lengths"]:
            by_length[str(n)], some = share(random_sums(rng, n, asked["count"]))
            wrong += some[:3]
        found["exact_match"] = by_length
    note(f"{name}: {found['exact_match']} {found.get('edge_cases', '')}")
    return {**trained, **found, "wrong": wrong[:20], "parameters": model.n_parameters()["total"]}


def recipe_of(train: Train, switches: Switches) -> AdditionRecipe:
    """The recipe, whose batches are as these switches feed them."""
    from benchmarks.switches import ForwardTable
    from tidal.streams import Batch
    from tidal.train.recipes.addition import AdditionRecipe, Asked

    class Switched(AdditionRecipe):
        def packed(self, rows: Sequence[Sequence[Asked]]) -> Batch:
            return switches.on_batch(super().packed(rows))

    recipe = Switched(train)
    if switches.write_order == "forward":
        recipe.table = ForwardTable(recipe.tokenizer)
    return recipe


def learn(train: Train, recipe: AdditionRecipe, name: str) -> tuple[TidalTransformer, Run]:
    """Train as `python -m tidal.train` does, but for checkpoints and validation."""
    import torch

    from tidal.cli import progress
    from tidal.device import pick_device
    from tidal.train.gradient import gradients
    from tidal.train.loop import model_for
    from tidal.train.optim import Optimizer, learning_rate

    device = pick_device(train.device)
    model = model_for(train, recipe.tokenizer).to(device)
    optimizer = Optimizer(model, train.optim)
    wall, cpu, losses = time.perf_counter(), time.process_time(), list[float]()
    with progress(train.max_steps, name) as bar:
        for step in range(train.max_steps):
            losses.append(gradients(model, optimizer, recipe, step, train, device)["loss"])
            optimizer.step(learning_rate(step, train.max_steps, train.optim))
            bar.update(loss=losses[-1])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return model, {"steps": train.max_steps, "loss": statistics.fmean(losses[-10:]), "device": str(device),
                   "cpu_seconds": round(time.process_time() - cpu, 2),
                   "wall_seconds": round(time.perf_counter() - wall, 2)}  # fmt: skip


def ask(model: TidalTransformer, recipe: AdditionRecipe, problems: Sequence[Problem], *, decode: bool,
        rows: int = 250) -> tuple[float, list[str]]:  # fmt: skip
    """Share of problems that greedy decoding answers exactly, and the others with what was written instead.

    Without `decode`, in packed passes (see the top), and what was written is not known.
    """
    import torch

    from tidal.blocks import NOTHING
    from tidal.train.recipes import wrong_answers
    from tidal.train.recipes.addition import Asked

    wrong: list[str] = []
    if decode:
        wrong = [c.text for c in wrong_answers(model, recipe.tokenizer, problems, rows).values()]
    for first in range(0, 0 if decode else len(problems), rows):
        some = problems[first : first + rows]
        batch = recipe.packed([[Asked(*problem)] for problem in some]).to(model.device)
        with torch.inference_mode():
            likeliest = model.head(model.states(batch)[1]).argmax(-1)
        right = ((likeliest == batch.targets) | (batch.targets == NOTHING)).all(1).tolist()
        wrong += [prompt for (prompt, _), good in zip(some, right, strict=True) if not good]
    return (len(problems) - len(wrong)) / len(problems), wrong


def edge_cases(digits: int) -> list[Sum]:
    """Pairs of numbers of up to so many digits that random ones hardly contain: zeros, nines, and carries that run from
    any place to any other."""
    top, pairs = 10**digits - 1, dict[tuple[int, int], None]()

    def both(a: int, b: int) -> None:
        if max(a, b) <= top:
            pairs[a, b] = pairs[b, a] = None

    for n in range(digits + 1):
        for d in range(1, 10):
            both(0, d * 10**n)
            both(d * 10**n, d * 10**n)
            both(top, d * 10**n)
            both(10**n - 1, d)
        both(10**n - 1, 10**n - 1)
        both(top - 10**n, 10**n)  # no carry: all nines come out
        for m in range(n):
            run = 10**n - 10**m  # nines at places m … n − 1
            both(run, 10**m)
            both(run, top)
            both(run, run)
    both(0, 0)
    both(top // 9 * 5, top // 9 * 5)
    both(top // 9 * 4, top // 9 * 5)
    return list(pairs)


if __name__ == "__main__":
    main(run, "benchmarks.addition")
