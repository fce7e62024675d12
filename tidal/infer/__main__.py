"""`python -m tidal.infer`: continue prompts with a trained model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tidal.cli import UserError, check_least, flag_of, main, note, parse

if TYPE_CHECKING:
    from tidal.infer.beam import Hypothesis
    from tidal.infer.engine import Completion
    from tidal.model import TidalTransformer
    from tidal.tokenizer import MixedTokenizer

DESCRIPTION = """Continue prompts with a trained model. Prompts come from --prompt, from --prompt-file, from the lines
of standard input, or, on a terminal, from you."""

LONG_PROMPT = 20_000  # characters, a few seconds of reading on a CPU


@dataclass(frozen=True)
class Infer:
    """Settings of `python -m tidal.infer`."""

    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompt_file: str | None = None
    """A file with one prompt a line, or .jsonl with {"prompt"}; - is standard input."""
    checkpoint: str | None = None
    """A run folder (its best checkpoint) or a checkpoint folder; none: the newest run under runs/."""
    temperature: float | None = None
    """0 takes the likeliest unit; none: 0 for recipes with one right answer, else 0.8."""
    top_k: int = 0
    """Sample among the k likeliest units; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest units that together reach this probability."""
    min_p: float = 0.0
    """Sample among the units at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the odds of each unit, after the first, that would spell a block of the completion again; 1: none."""
    seed: int | None = None
    """Of the samples; none: 0. In a conversation each turn draws anew."""
    max_new_units: int = 256
    """Stop after this many written units (characters and block ends)."""
    max_new_blocks: int = 0
    """Stop after this many blocks; 0: no limit."""
    stop: tuple[str, ...] = ()
    """End the completion before any of these strings."""
    num_samples: int = 1
    """Completions of each prompt."""
    num_beams: int = 0
    """Beam search with so many beams instead of sampling; 0: none."""
    length_penalty: float = 1.0
    """Beams are ranked by log-probability / units ** this; 0: by log-probability alone."""
    batch_size: int = 64
    """Completions, or beams, written side by side."""
    json: bool = False
    """Print one JSON object a line: `index` numbers the prompts, `sample` the completions of each, if several."""
    log_probs: bool = False
    """With --json: also the name and log-probability of every unit, in the order of writing."""
    stream: bool = False
    """Print each block as soon as it is finished (on a terminal always): of one completion, or with --json of all."""
    trace: str | None = None
    """Show how a prompt is continued, step by step: on a page (FILE.html), or printed (-)."""
    trace_number: int | None = None
    """Which completion --trace shows, where there are several: counted from 0, as the lines of --json."""
    cuda_graphs: bool = False
    """On a GPU: record a step of the writer once as a CUDA graph, and replay it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of weights, cache and products; bf16 takes half the memory, and tensor cores where a GPU has them."""


def run(argv: list[str]) -> None:
    """Parse the flags, load the model, answer."""
    settings = parse(Infer, argv, "tidal.infer", DESCRIPTION)
    _check(settings)
    check_least(settings, num_samples=1, max_new_units=1, seed=0, num_beams=0, batch_size=1, trace_number=0)
    prompts = _prompts(settings)
    completions = settings.num_samples * (1 if prompts is None else len(prompts))
    if settings.stream and not settings.json and completions > 1:
        raise UserError(f"--stream does nothing with {completions} completions; leave it out, or give --json, too")
    if settings.trace and settings.trace_number is None and completions > 1:
        raise UserError(f"--trace shows one of {completions} completions; choose it with --trace-number, from 0 to "
                        f"{completions - 1}")  # fmt: skip
    if settings.trace_number is not None and settings.trace_number >= completions:
        raise UserError(f"--trace-number is {settings.trace_number}; it must be at most {completions - 1}")
    import torch

    from tidal import checkpoint
    from tidal.device import pick_device, set_threads
    from tidal.infer.beam import as_length_penalty
    from tidal.infer.engine import Limits
    from tidal.infer.load import load_with_trainer
    from tidal.infer.sampling import Sampling
    from tidal.train.memory import memory_for
    from tidal.train.presets import GREEDY

    try:  # before the model is loaded
        Sampling(settings.temperature or 0.0, settings.top_k, settings.top_p, settings.min_p,
                 settings.repetition_penalty)  # fmt: skip
        Limits(settings.max_new_units, settings.max_new_blocks, settings.stop)
        as_length_penalty(settings.length_penalty)
    except ValueError as error:
        raise UserError(str(error)) from error
    device = pick_device(settings.device)
    if settings.cuda_graphs and device.type != "cuda":  # before the model is loaded, too
        raise UserError(f"--cuda-graphs needs a CUDA device, not {device}; leave it out")
    folder = checkpoint.resolve(settings.checkpoint)
    with memory_for("the model; try another --device, or --precision bf16"):
        model, tokenizer, trainer = load_with_trainer(
            folder, device=device, dtype=torch.bfloat16 if settings.precision == "bf16" else None)  # fmt: skip
    set_threads(model.config.shape.d_model)
    note(f"using {folder}")
    greedy = trainer.get("settings", {}).get("recipe") in GREEDY
    temperature = settings.temperature if settings.temperature is not None else 0.0 if greedy else 0.8
    settings = dataclasses.replace(settings, temperature=temperature)
    _check_greedy(settings, "--temperature 0, which this recipe is asked with")
    if prompts is not None:
        _answer(model, tokenizer, prompts, settings)
        return
    _converse(model, tokenizer, settings)


def _converse(model: TidalTransformer, tokenizer: MixedTokenizer, settings: Infer) -> None:
    """Answer what a person types, until they end it; turns draw what the prompts of a file would."""
    note("type a prompt; Ctrl-D ends")
    for turn in itertools.count():
        print("> ", end="", file=sys.stderr, flush=True)  # stdout is for results
        try:
            prompt = input()
        except EOFError:
            note("")
            return
        except UnicodeDecodeError as error:
            note(f"not UTF-8 text: {error}")
            continue
        try:
            _answer(model, tokenizer, [prompt], settings, turn)
        except UserError as error:  # one bad prompt does not end the conversation
            note(str(error))
        except KeyboardInterrupt:  # nor does an answer that is not wanted; while asked for a prompt, it does
            note("\ninterrupted")


def _check(settings: Infer) -> None:
    """Raise UserError for flags of which one would do nothing beside another."""
    given = {f.name for f in dataclasses.fields(Infer) if getattr(settings, f.name) != f.default}
    sampling = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    alone = {
        "num_beams": (*sampling, "seed", "stop", "max_new_blocks", "log_probs", "stream", "trace", "cuda_graphs"),
        "trace": ("json", "log_probs", "stream", "cuda_graphs", "batch_size"),
    }
    for flag, others in alone.items():
        if flag in given and (found := [name for name in others if name in given]):
            raise UserError(f"{flag_of(found[0])} does nothing with {flag_of(flag)}; leave out one of them")
    _check_greedy(settings, "--temperature 0")
    if "trace_number" in given and "trace" not in given:
        raise UserError("--trace-number does nothing without --trace")
    if "length_penalty" in given and "num_beams" not in given:
        raise UserError("--length-penalty does nothing without --num-beams")
    if settings.log_probs and not settings.json:
        raise UserError("--log-probs does nothing without --json")
    if 0 < settings.num_beams < settings.num_samples:
        raise UserError(f"--num-samples is {settings.num_samples}; of {settings.num_beams} beams there are no more")
    if settings.trace not in (None, "-") and not str(settings.trace).endswith(".html"):
        raise UserError(f"--trace is {settings.trace!r}; give a file that ends in .html, or - to print it")


def _check_greedy(settings: Infer, why: str) -> None:
    """Raise UserError for flags that shape samples, where the likeliest unit is taken."""
    if settings.temperature != 0 or settings.num_beams:
        return
    for name in ("num_samples", "top_k", "top_p", "min_p", "seed"):
        if getattr(settings, name) != getattr(Infer(), name):
            raise UserError(f"{flag_of(name)} does nothing with {why}; leave it out, or give a higher --temperature")


def _prompts(settings: Infer) -> list[str] | None:
    """All prompts; None where a person is to be asked."""
    if settings.prompt and settings.prompt_file:
        raise UserError(f"both --prompt and --prompt-file {settings.prompt_file!r} are given; choose one")
    if settings.prompt:
        from tidal.tokenizer.split import utf8

        for prompt in settings.prompt:
            try:
                utf8(prompt)
            except ValueError as error:  # bytes of the command line that are no UTF-8 arrive as these
                raise UserError(f"--prompt {prompt!r}: {error}") from error
        return list(settings.prompt)
    if settings.prompt_file is None and sys.stdin.isatty():
        return None
    from tidal.infer.prompts import read_prompts

    return read_prompts(settings.prompt_file)


def _answer(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: list[str], settings: Infer,
            first: int = 0) -> None:  # fmt: skip
    """Continue the prompts, the number of the first of which is `first`, and print what comes, in their order."""
    from tidal.train.memory import memory_for

    if (longest := max(map(len, prompts))) > LONG_PROMPT:
        note(f"a prompt has {longest:,} characters; the time to read them grows with their square")
    smaller = f"what is written side by side; --batch-size is {settings.batch_size}: try a smaller one, "
    with memory_for(("what is traced; try " if settings.trace else smaller) + "shorter prompts, or --precision bf16"):
        try:
            if settings.num_beams:
                _search(model, tokenizer, prompts, settings)
            elif settings.trace:
                _trace(model, tokenizer, prompts, settings, first)
            else:
                _write(model, tokenizer, prompts, settings, first)
        except UnicodeEncodeError:
            raise  # of the output, not of the prompts
        except ValueError as error:
            raise UserError(str(error)) from error


def _how(settings: Infer) -> dict[str, Any]:
    """The settings that shape a completion, by their names."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_units", "max_new_blocks", "stop")
    return {name: getattr(settings, name) for name in names}


def _write(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: list[str], settings: Infer,
           first: int) -> None:  # fmt: skip
    """Greedy or sampled completions, of a single one its blocks as they come."""
    from tidal.infer.engine import stream

    began = time.perf_counter()
    asked = [prompt for prompt in prompts for _ in range(settings.num_samples)]
    seeds: Any = [(settings.seed or 0, first * settings.num_samples + i) for i in range(len(asked))]
    by_block = settings.stream or (sys.stdout.isatty() and not settings.json)
    live = by_block and not settings.json and len(asked) == 1
    text, shown = "", 0  # of the one completion that is shown as it is written
    if live:
        print(asked[0], end="", flush=True)
    done: dict[int, Completion] = {}
    n_printed = n_units = 0
    for i, event in stream(model, tokenizer, asked, batch_size=settings.batch_size, seed=seeds,
                           cuda_graphs=settings.cuda_graphs, **_how(settings)):  # fmt: skip
        if isinstance(event, str):
            if live:
                text += event
                end = max(shown, _before(text, settings.stop))
                print(text[shown:end], end="", flush=True)
                shown = end
            elif by_block and settings.json:
                _write_line(json.dumps({**_number(i, settings), "block": event}, ensure_ascii=False))
            continue
        done[i], n_units = event, n_units + event.units
        while n_printed in done:
            _print(done.pop(n_printed), n_printed, settings, len(asked[0]) + shown if live else 0)
            n_printed += 1
    if by_block:
        seconds = time.perf_counter() - began
        note(f"{n_units} units in {seconds:.2f} s, {n_units / seconds:.0f} units/s")


def _before(text: str, stop: tuple[str, ...]) -> int:
    """How much of a completion is surely before any stop string: what may be the beginning of one waits."""
    held = max((len(s) - 1 for s in stop), default=0)
    return max(0, min([len(text) - held, *(at for s in stop if (at := text.find(s)) >= 0)]))


def _trace(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: list[str], settings: Infer,
           first: int) -> None:  # fmt: skip
    """Show how one of the prompts is continued, on a page or as text."""
    from tidal.infer.trace import trace
    from tidal.infer.trace_page import write_html
    from tidal.infer.trace_text import render_text

    number, where = settings.trace_number or 0, str(settings.trace)
    seed = settings.seed or 0, first * settings.num_samples + number
    traced = trace(model, tokenizer, prompts[number // settings.num_samples], seed=seed, **_how(settings))
    if where == "-":
        print(render_text(traced))
        return
    try:
        write_html(traced, Path(where))
    except OSError as error:
        raise UserError(f"cannot write {where!r}: {error.strerror}; choose another file with --trace") from error
    note(f"wrote {where}")


def _search(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: list[str], settings: Infer) -> None:
    """Beam search: print the best hypotheses of each prompt, as many as samples are asked for, batch by batch."""
    from tidal.infer.beam import beam_search

    at_once = max(1, settings.batch_size // settings.num_beams)
    for first in range(0, len(prompts), at_once):
        found = beam_search(model, tokenizer, prompts[first : first + at_once], num_beams=settings.num_beams,
                            wanted=settings.num_samples, batch_size=at_once, length_penalty=settings.length_penalty,
                            max_new_units=settings.max_new_units)  # fmt: skip
        for index, best in enumerate(found, first):
            for rank, hypothesis in enumerate(best):
                _print(hypothesis, settings.num_samples * index + rank, settings)


def _number(i: int, settings: Infer) -> dict[str, int]:
    """Which prompt the completion number `i` of all is of, and which of its completions it is, if it has several."""
    index, sample = divmod(i, settings.num_samples)
    return {"index": index, "sample": sample} if settings.num_samples > 1 else {"index": index}


def _print(completion: Completion | Hypothesis, i: int, settings: Infer, shown: int = 0) -> None:
    """Completion number `i`; of its text what comes after the characters that are `shown`, and the end of its line."""
    if settings.json:
        values = {**_number(i, settings), **completion.to_dict(per_unit=settings.log_probs)}
        _write_line(json.dumps(values, ensure_ascii=False))
    else:
        _write_line(completion.text[shown:], end="" if completion.text.endswith("\n") else "\n")


def _write_line(text: str, end: str = "\n") -> None:
    """Print at one go: Ctrl-C during `print`, which ends a line by a write of its own, would leave half of it."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


if __name__ == "__main__":
    main(run, "tidal.infer")
