"""`python -m tidal.infer`: continue prompts with a trained model."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tidal.cli import UserError, main, note, parse

if TYPE_CHECKING:
    from tidal.infer.engine import Completion
    from tidal.model import TidalTransformer
    from tidal.tokenizer import MixedTokenizer

DESCRIPTION = """Continue prompts with a trained model. Prompts come from --prompt, from --prompt-file, from the lines
of standard input, or, on a terminal, from you."""


@dataclass(frozen=True)
class Infer:
    """Settings of `python -m tidal.infer`."""

    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompt_file: str | None = None
    """A file with one prompt a line; - is standard input."""
    checkpoint: str | None = None
    """A run folder (its best checkpoint) or a checkpoint folder; none: the newest run under runs/."""
    temperature: float | None = None
    """0 takes the likeliest unit; none: 0 for recipes with one right answer, else 0.8."""
    top_k: int = 0
    """Sample among the k likeliest units; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest units that together reach this probability."""
    seed: int = 0
    """Of the samples."""
    max_new_units: int = 256
    """Stop after this many written units (characters and block ends)."""
    num_samples: int = 1
    """Completions of each prompt."""
    json: bool = False
    """Print one JSON object a line."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""


def run(argv: list[str]) -> None:
    """Parse the flags, load the model, answer."""
    settings = parse(Infer, argv, "tidal.infer", DESCRIPTION)
    for name, least in (("num_samples", 1), ("max_new_units", 1), ("seed", 0)):
        if (value := getattr(settings, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    prompts = _prompts(settings)
    from tidal import checkpoint  # torch comes with these
    from tidal.device import pick_device, set_threads
    from tidal.infer.load import load_with_trainer
    from tidal.infer.sampling import Sampling
    from tidal.train.presets import GREEDY

    try:
        Sampling(settings.temperature or 0.0, settings.top_k, settings.top_p)
    except ValueError as error:
        raise UserError(str(error)) from error
    device = pick_device(settings.device)
    folder = checkpoint.resolve(Path(settings.checkpoint) if settings.checkpoint else None)
    model, tokenizer, trainer = load_with_trainer(folder, device=device)
    set_threads(model.config.shape.d_model)
    note(f"using {folder}")
    greedy = trainer.get("settings", {}).get("recipe") in GREEDY
    temperature = settings.temperature if settings.temperature is not None else 0.0 if greedy else 0.8
    if prompts is not None:
        _answer(model, tokenizer, prompts, settings, temperature)
        return
    note("type a prompt; Ctrl-D ends")
    while True:
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
            _answer(model, tokenizer, [prompt], settings, temperature)
        except UserError as error:  # one bad prompt does not end the conversation
            note(str(error))


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
    try:
        if settings.prompt_file in (None, "-"):
            data, source = sys.stdin.buffer.read(), "standard input"
        else:
            source = str(settings.prompt_file)
            with open(source, "rb") as file:
                data = file.read()
        lines = [line.rstrip("\r") for line in data.decode().split("\n")]
    except OSError as error:
        raise UserError(f"cannot read prompts from {settings.prompt_file!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from error
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise UserError(f"no prompts in {source}; give one a line, or use --prompt")
    return lines


def _answer(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: list[str], settings: Infer,
            temperature: float) -> None:  # fmt: skip
    from tidal.infer.engine import generate

    asked = [prompt for prompt in prompts for _ in range(settings.num_samples)]
    try:
        completions = generate(
            model, tokenizer, asked, temperature=temperature, top_k=settings.top_k, top_p=settings.top_p,
            seed=settings.seed, max_new_units=settings.max_new_units,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    for completion in completions:
        _print(completion, settings.json)


def _print(completion: Completion, as_json: bool) -> None:
    if as_json:
        print(json.dumps(completion.to_dict(), ensure_ascii=False), flush=True)
    else:
        print(completion.text, end="" if completion.text.endswith("\n") else "\n", flush=True)


if __name__ == "__main__":
    main(run, "tidal.infer")
