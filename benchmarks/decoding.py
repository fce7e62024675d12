"""Tidal's decoder against a byte and a token transformer: characters per second, layer passes, cache bytes.

    python -m benchmarks.decoding [--batch 1 8 64] [--context 256 1024 4096] [--models token]

Same machine, same run, same number of parameters, the same layers (benchmarks/baselines/causal.py), random weights,
alternating. Weights at random would write gibberish, whose blocks are unlike words, so every model is led along the
same real text: the very code that generates runs, up to and including the choice of the next unit, and the true unit
is put in the place of the chosen one. The clock runs from the first choice, before which CUDA graphs are recorded, to
the last. Refuses to time anything unless log-probabilities on the way (of a few rows) equal a full forward pass's.

English prose: the docstrings of Python's standard library; the tokenizer learns from another part of them than is
timed, and from those of the installed packages.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.baselines import cached, causal
from benchmarks.baselines.causal import BYTES, CausalConfig, CausalTransformer, Coder, Document, coder_of
from tidal.config import Shape
from tidal.infer import engine
from tidal.infer.sampling import Sampling
from tidal.infer.score import score
from tidal.layers import Layer
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer
from tidal.train.presets import PRESETS

TEXT = PRESETS["text"].model
MODELS = ("tidal", "byte", "token")
CHECKED_ROWS = 4  # at most, compared with a full forward pass before anything is timed
CACHED_CHARS = 100_000  # of the timed text, over which cache bytes are averaged
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}  # of log-probabilities; width 256 in bfloat16 came to 0.03


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="rows side by side")
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024, 4096], help="characters of the prompts")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=MODELS, help="to time; tidal always is")
    parser.add_argument("--d-model", type=int, default=512, help="width of all models (default: 512)")
    parser.add_argument("--layers", type=int, default=10, help="of all; two of Tidal's are writers (default: 10)")
    parser.add_argument("--writer-ff", type=int, default=0, help="of Tidal's writers (default: the width)")
    parser.add_argument("--writer-attention", choices=("memory", "block", "none"), default=TEXT.writer_attention,
                        help=f"of Tidal's writers (default: as --recipe text, {TEXT.writer_attention})")  # fmt: skip
    parser.add_argument("--suffix-rows", type=int, default=Shape().suffix_rows, help="of Tidal's table of suffixes")
    parser.add_argument("--vocab-size", type=int, default=16384, help="largest vocabulary (default: 16384)")
    parser.add_argument("--new-chars", type=int, default=128, help="characters written a row (default: 128)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats, fewer when slow (default: 5)")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="no batch and context is begun later")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="float32", help="of all models")
    parser.add_argument("--cuda-graphs", action="store_true", help="record steps as CUDA graphs, of all models")
    parser.add_argument("--text", type=Path, help="English text to use in place of the docstrings")
    parser.add_argument("--quick", action="store_true", help="batch 1 and 8, context 256, 2 repeats")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file, too")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.context, args.repeats = [1, 8], [256], 2
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    started = time.monotonic()
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu --quick shows that the benchmark works")
    if args.cuda_graphs and args.device.type != "cuda":
        parser.error(f"--cuda-graphs needs --device cuda, not {args.device}")

    text = args.text.read_text() if args.text else english(Path(sysconfig.get_path("stdlib")))
    half = len(text) // 2
    more = "" if args.text else english(Path(sysconfig.get_path("purelib")))
    tokenizer = MixedTokenizer.train([text[:half], more], args.vocab_size)
    runners = build(args, tokenizer)
    for runner in runners:
        runner.model.to(DTYPES[args.precision])
    print("  ".join(f"{r.name}: {r.parameters:,} parameters" for r in runners))
    line: dict[str, Any] = {
        "benchmark": "decoding", "results": [], "d_model": args.d_model, "layers": args.layers,
        "models": {r.name: {"parameters": r.parameters, "d_ff": r.d_ff} for r in runners},
        "vocabulary": tokenizer.vocab_size, "new_chars": args.new_chars,
        "device": record.device_name(str(args.device)), "precision": args.precision, "cuda_graphs": args.cuda_graphs,
        **record.machine(), "left_out": []}  # fmt: skip
    for context, batch in itertools.product(args.context, args.batch):
        if time.monotonic() - started > args.budget_s:
            line["left_out"].append(f"batch {batch} context {context}")
            continue
        texts = cut(text[half:], tokenizer, batch, context, args.new_chars)
        figures = measure(runners, texts, text[half : half + CACHED_CHARS], args.repeats, args.cuda_graphs)
        here = {"batch": batch, "context": context, "load": round(os.getloadavg()[0], 2)}
        line["results"].append({**here, **figures})
        print_result(line["results"][-1], header=len(line["results"]) == 1)
        if args.out:  # now: the larger ones take long
            record.save(args.out, line)
    if line["left_out"]:
        print(f"no time left for: {', '.join(line['left_out'])}")
    record.write(line, args.out)


# ----------------------------------------------------------------------------------------------------- text


def english(root: Path) -> str:
    """Paragraphs of prose among the docstrings of the Python files in a folder."""
    paragraphs: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"}.isdisjoint(path.relative_to(root).parts):
            paragraphs += _prose(path)
    return "\n\n".join(dict.fromkeys(paragraphs))


def _prose(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, and tests of parsers
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                lines = paragraph.splitlines()
                if len(paragraph) >= 200 and not any(line.startswith(("  ", ">>>", "-", "*", "|")) for line in lines):
                    yield " ".join(lines)


def cut(text: str, tokenizer: MixedTokenizer, n: int, context: int, new: int) -> list[tuple[str, str]]:
    """So many pairs of a prompt and its continuation, of about these lengths; all ends lie between blocks."""
    blocks = tokenizer.split(text)
    starts = np.cumsum([0, *map(len, blocks)])
    last = int(np.searchsorted(starts, starts[-1] - context - new - 64))
    if last < 1:
        raise SystemExit(f"the text has {starts[-1]} characters, too few for a context of {context}")
    pairs = []
    for first in np.linspace(0, last - 1, n).astype(int).tolist():
        ends = np.searchsorted(starts, starts[first] + np.array([context, context + new])).tolist()
        pairs.append(("".join(blocks[first : ends[0]]), "".join(blocks[ends[0] : ends[1]])))
    return pairs


# -------------------------------------------------------------------------------------------------- models


@dataclass
class Runner:
    """One model with all that differs between them."""

    name: str
    model: nn.Module
    d_ff: int
    module: Any
    """whose `choose` is called at every step"""
    encode: Callable[[str], list[int]]
    """Text → what is written, step by step, `<eos>` at the end."""
    generate: Callable[[Sequence[str], int, list[Any], bool], list[list[float]]]
    """Prompts, the largest number of steps, generators, whether with CUDA graphs → log-probabilities of the steps."""
    full: Callable[[str, str], Tensor]
    """The same log-probabilities from one full forward pass."""
    cache_bytes: Callable[[str], int]

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(p.numel() for p in self.model.parameters())


def build(args: argparse.Namespace, tokenizer: MixedTokenizer) -> list[Runner]:
    """Tidal, and those asked for of the baselines, with the feed-forward width that gives them as many parameters."""
    d, heads = args.d_model, max(4, args.d_model // 64)
    shape = Shape(d_model=d, n_heads=heads, n_kv_heads=heads, reader_layers=args.layers - 2, writer_layers=2,
                  reader_ff=3 * d, writer_ff=args.writer_ff or d, suffix_rows=args.suffix_rows,
                  writer_attention=args.writer_attention, foretell=TEXT.foretell, recall=TEXT.recall)  # fmt: skip
    tidal = TidalTransformer.of(tokenizer, shape).eval().to(args.device)
    if shape.suffix_rows:
        nn.init.normal_(tidal.suffix_embedding.weight, std=0.02)  # trained ones are not zero
    total = tidal.n_parameters()["total"]
    runners = [Runner(
        "tidal", tidal, shape.reader_ff, engine, lambda text: tidal_units(tokenizer, text),
        lambda prompts, steps, seeds, graphs: [c.log_probs for c in engine.generate(
            tidal, tokenizer, prompts, max_new_units=steps, seed=seeds, batch_size=len(prompts), cuda_graphs=graphs)],
        lambda prompt, new: torch.from_numpy(score(tidal, tokenizer, prompt + new, supervise_from=len(prompt))),
        lambda text: tidal.cache_bytes(1 + len(tokenizer.encode(text))),
    )]  # fmt: skip
    coders = {"byte": BYTES, "token": coder_of(tokenizer)}
    for name, coder in coders.items():
        if name not in args.models:
            continue
        plain = CausalConfig.of(coder, d_model=d, n_heads=heads, n_kv_heads=heads, layers=args.layers, d_ff=3 * d)
        runners.append(baseline(name, coder, plain.with_parameters(total), args.device))
    return runners


def baseline(name: str, coder: Coder, config: CausalConfig, device: torch.device) -> Runner:
    """A causal transformer, ready to be timed."""
    model = CausalTransformer(config).eval().to(device)
    return Runner(
        name, model, config.d_ff, cached, lambda text: [*coder.encode(text), coder.eos_id],
        lambda prompts, steps, seeds, graphs: [w.log_probs for w in cached.generate(
            model, [coder.encode(p) for p in prompts], max_new=steps, seed=seeds, batch_size=len(prompts),
            cuda_graphs=graphs)],
        lambda prompt, new: model.log_probs(
            causal.pack([[Document(coder.encode(prompt), coder.encode(new))]], coder).to(device)).cpu(),
        lambda text: model.cache_bytes(1 + len(coder.encode(text))),
    )  # fmt: skip


def tidal_units(tokenizer: MixedTokenizer, text: str) -> list[int]:
    """All that Tidal writes for a text."""
    blocks = tokenizer.split(text)
    return [u for b in blocks for u in (*tokenizer.write_units(b), tokenizer.eob_id)] + [tokenizer.eos_id]


# --------------------------------------------------------------------------------------------------- timing


class Led:
    """Chooses as the model's `choose` does, then puts the true unit of each row in the place of the chosen one.

    Rows are known by their generators. `start` is the time of the first choice, when the prompts have been read;
    `begin` is called then.
    """

    def __init__(self, choose: Callable[..., Tensor], generators: list[Any], truth: list[list[int]],
                 begin: Callable[[], object]) -> None:  # fmt: skip
        self.choose = choose
        self.units = {id(g): iter(units) for g, units in zip(generators, truth, strict=True)}
        self.end = truth[0][-1]
        self.begin, self.start = begin, 0.0

    def __call__(self, logits: Tensor, allowed: Tensor, settings: Sequence[Sampling], generators: Sequence[Any],
                 *rest: Any) -> list[int]:  # fmt: skip
        self.choose(logits, allowed, settings, generators, *rest)
        if not self.start:
            self.begin()
            if logits.is_cuda:  # prompts that are still being read are not part of it
                torch.cuda.synchronize()
            self.start = time.perf_counter()
        return [next(self.units[id(g)], self.end) for g in generators]  # a row that has ended goes on with <eos>


def lead(runner: Runner, texts: Sequence[tuple[str, str]], cuda_graphs: bool,
         begin: Callable[[], object] = lambda: None) -> tuple[float, list[list[float]]]:  # fmt: skip
    """Seconds between the first and the last choice, and the log-probabilities of the true units."""
    generators = [np.random.default_rng(i) for i in range(len(texts))]
    truth = [runner.encode(new) for _, new in texts]
    led = Led(runner.module.choose, generators, truth, begin)
    with mock.patch.object(runner.module, "choose", led):
        log_probs = runner.generate([prompt for prompt, _ in texts], max(map(len, truth)), generators, cuda_graphs)
    seconds = time.perf_counter() - led.start
    if [len(x) for x in log_probs] != [len(x) for x in truth]:
        raise SystemExit(f"{runner.name} did not write the text it was led along")
    return seconds, log_probs


@torch.inference_mode()
def check(runner: Runner, texts: Sequence[tuple[str, str]], cuda_graphs: bool) -> tuple[float, int]:
    """The warm-up. Largest difference between the decoder's and a full pass's log-probabilities (exits if it is too
    large), of a few rows; layers applied while writing, each counted for every token or unit it is applied to."""
    count, handles = 0, list[Any]()

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal count
        count += inputs[0].shape[:2].numel()

    def begin() -> None:
        handles.extend(m.register_forward_pre_hook(hook) for m in runner.model.modules() if isinstance(m, Layer))

    log_probs = lead(runner, texts, False, begin)[1]
    for handle in handles:
        handle.remove()
    if cuda_graphs:  # in a replay no hook is called
        log_probs = lead(runner, texts, True)[1]
    worst, tolerance = 0.0, TOLERANCE[next(runner.model.parameters()).dtype]
    for i in range(0, len(texts), -(-len(texts) // CHECKED_ROWS)):
        full = runner.full(*texts[i])
        differs = (torch.tensor(log_probs[i], dtype=full.dtype) - full).abs().max().item()
        if not differs < tolerance:
            raise SystemExit(f"{runner.name}: cached and full pass differ by {differs}; not timing a wrong result")
        worst = max(worst, differs)
    return worst, count


def measure(runners: Sequence[Runner], texts: Sequence[tuple[str, str]], sample: str, repeats: int,
            cuda_graphs: bool = False) -> dict[str, Any]:  # fmt: skip
    """Medians of alternating runs, after a check of each model; of speeds, the median of the ratios of each round."""
    n_chars = sum(len(new) for _, new in texts)
    seconds: dict[str, list[float]] = {r.name: [] for r in runners}
    figures: dict[str, dict[str, float]] = {}
    for r in runners:
        worst, layer_passes = check(r, texts, cuda_graphs)
        figures[r.name] = {"max_difference": worst, "layer_passes_per_char": layer_passes / n_chars,
                           "cache_bytes_per_char": r.cache_bytes(sample) / len(sample)}  # fmt: skip
    budget = time.perf_counter() + 240
    for _ in range(repeats):
        if all(seconds.values()) and time.perf_counter() > budget:
            break
        for r in runners:
            seconds[r.name].append(lead(r, texts, cuda_graphs)[0])
    for r in runners:
        rate = n_chars / statistics.median(seconds[r.name])
        figures[r.name] |= {"chars_per_second": rate, "repeats": len(seconds[r.name]),
                            "spread": max(seconds[r.name]) / min(seconds[r.name])}  # fmt: skip
    ratios = dict[str, float]()
    for name in [name for name in figures if name != "tidal"]:
        rounds = zip(seconds[name], seconds["tidal"], strict=True)
        ratios[f"speed_against_{name}"] = statistics.median(other / own for other, own in rounds)
        for what, key in (("layer_passes", "layer_passes_per_char"), ("cache", "cache_bytes_per_char")):
            ratios[f"{what}_against_{name}"] = figures[name][key] / figures["tidal"][key]
    rounded = {name: {key: float(f"{value:.5g}") for key, value in f.items()} for name, f in figures.items()}
    return {"models": rounded, "ratios": {key: round(value, 3) for key, value in ratios.items()}}


def print_result(result: dict[str, Any], header: bool) -> None:
    """One line a model, with what Tidal gains against it."""
    if header:
        print(f"{'batch':>5} {'context':>8}  {'model':<6} {'chars/s':>10} {'layers/char':>12} {'cache B/char':>13}"
              f" {'speed ×':>8} {'layers ×':>9} {'cache ×':>8}")  # fmt: skip
    for name, f in result["models"].items():
        ratios = [result["ratios"].get(f"{what}_against_{name}", 1.0) for what in ("speed", "layer_passes", "cache")]
        print(f"{result['batch']:>5} {result['context']:>8}  {name:<6} {f['chars_per_second']:>10,.0f}"
              f" {f['layer_passes_per_char']:>12.2f} {f['cache_bytes_per_char']:>13,.0f}"
              f" {ratios[0]:>8.2f} {ratios[1]:>9.2f} {ratios[2]:>8.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
