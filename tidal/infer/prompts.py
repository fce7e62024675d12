"""Prompts from a file, or from standard input."""

from __future__ import annotations

import sys

from tidal.cli import UserError
from tidal.prepare.reading import OF_LINES, from_json
from tidal.tokenizer.split import utf8

WANT = '{"prompt": "…"}'


def read_prompts(path: str | None) -> list[str]:
    """One prompt a line; None and "-" are standard input.

    A line of .jsonl or .ndjson is {"prompt": …} (other keys are ignored), so that a prompt may have line breaks, and
    the data of training can be asked; empty lines are none there.

    Raises:
        UserError: a file that cannot be read, is not UTF-8 text or has no prompts; a line of .jsonl that is none.
    """
    try:
        if path in (None, "-"):
            data, source = sys.stdin.buffer.read(), "standard input"
        else:
            source = str(path)
            with open(source, "rb") as file:
                data = file.read()
        lines = [line.rstrip("\r") for line in data.decode("utf-8-sig").split("\n")]  # as training reads files
    except OSError as error:
        raise UserError(f"cannot read prompts from {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        at = error.start + len(data) - len(error.object)  # which is without the byte order mark
        raise UserError(f"{source} is not UTF-8 text: byte {at} is 0x{data[at]:02x}") from error
    if lines[-1] == "":
        lines.pop()
    if source.lower().endswith(OF_LINES):
        lines = [_prompt(line, f"{source}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not lines:
        raise UserError(f"no prompts in {source}; give one a line, or use --prompt")
    return lines


def _prompt(line: str, source: str) -> str:
    values = from_json(line, source)
    prompt = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f"{source} has no prompt that is a string; a line is {WANT}")
    try:
        utf8(prompt)
    except ValueError as error:  # JSON can name lone surrogates
        raise UserError(f"{source}: {error}; remove it") from error
    return prompt
