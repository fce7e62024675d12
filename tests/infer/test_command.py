"""`python -m tidal.infer`: which completion is traced, precision, memory that runs out, conversations."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Ran, assert_refused, objects
from tests.strategies import SHAPES, tiny
from tidal.infer import __main__ as module
from tidal.infer import engine, load
from tidal.infer.decoder import Decoder
from tidal.infer.trace import visible

Command = Callable[..., Ran]


@pytest.fixture
def infer(trained: Path, command: Command) -> Command:
    """The command, with a trained run."""
    return lambda *flags: command("infer", "--checkpoint", str(trained / "runs/addition"), *flags)


SAMPLED = ("--temperature", "1", "--seed", "3", "--max-new-units", "60")


# ------------------------------------------------------------------------------------------------------ traces


def test_any_completion_of_a_command_can_be_traced(infer: Command) -> None:
    flags = ("--prompt", "1 + 1 =", "2 + 2 =", "--num-samples", "2", *SAMPLED)
    answers = [answer["completion"] for answer in objects(infer(*flags, "--json").lines)]
    assert len(set(answers)) == 4
    for number in (0, 1, 3):
        done = infer(*flags, "--trace", "-", "--trace-number", str(number))
        found = dict(re.findall(r"^(prompt|completion) +(.*)$", done.out, re.MULTILINE))
        assert found == {"prompt": ("1␣+␣1␣=", "2␣+␣2␣=")[number // 2], "completion": visible(str(answers[number]))}
        assert f"seed (3, {number})" in done.out


# ----------------------------------------------------------------------------------------------------- prompts


def test_prompts_of_jsonl_may_have_line_breaks(infer: Command, tmp_path: Path) -> None:
    """So the held-out pairs of a run can be asked as they are."""
    prompts = ["1 + 1 =", "2 + 2 =\n3 + 3 =", "", "４ + 4 ="]
    lines = [json.dumps({"prompt": prompt, "completion": " 2\n"}) for prompt in prompts]
    (path := tmp_path / "asked.JSONL").write_text("\ufeff" + "\r\n".join([*lines[:2], " ", *lines[2:], ""]))
    done = infer("--prompt-file", str(path), "--json", "--max-new-units", "2")
    assert done.code == 0, done.err
    assert [answer["prompt"] for answer in objects(done.lines)] == prompts


@pytest.mark.parametrize(("line", "said"), [
    ("1 + 1 =", " is not JSON: Extra data at column 3"),
    ('["1 + 1 ="]', " has no prompt that is a string"),
    ('{"text": "1 + 1 ="}', " has no prompt that is a string"),
    ('{"prompt": 2}', " has no prompt that is a string"),
    (r'{"prompt": "\ud800"}', ": lone surrogate U+D800 at offset 0 is not text"),
])  # fmt: skip
def test_a_line_of_jsonl_without_a_prompt(line: str, said: str, infer: Command, tmp_path: Path) -> None:
    (path := tmp_path / "asked.jsonl").write_text(f'{{"prompt": "1 + 1 ="}}\n\n{line}\n')
    assert_refused(infer("--prompt-file", str(path)), "infer", re.escape(f"{path}:3{said}"))


# --------------------------------------------------------------------------------------------------- precision


def test_a_long_prompt_is_said_to_take_long(infer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_PROMPT", 9)
    long, usual = (infer("--prompt", prompt, "--max-new-units", "2").err for prompt in ("1 + 11 + 1 =", "1 + 1 ="))
    assert "a prompt has 12 characters; the time to read them grows with their square" in long
    assert "characters" not in usual


def test_in_bfloat16(infer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, real = list[Any](), load.load_with_trainer
    monkeypatch.setattr(load, "load_with_trainer", lambda *args, **how: loaded.append(real(*args, **how)) or loaded[-1])
    texts = [infer("--prompt", "1 + 1 =", *SAMPLED, "--json", "--precision", name) for name in ("bf16", "float32")]
    assert [{p.dtype for p in model.parameters()} for model, *_ in loaded] == [{torch.bfloat16}, {torch.float32}]
    short, exact = (objects(done.lines)[0] for done in texts)
    assert short["completion"]
    assert short["log_prob"] != exact["log_prob"]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_bfloat16_leaves_alone(shape: str) -> None:
    """Positions, of which it would tell apart 256, and running sums."""
    model, tokenizer = tiny("english", shape, torch.bfloat16)
    blocks = [tokenizer.encode_block(text) for text in tokenizer.split("the light and 12 + 345 = " * 30)]
    decoder = Decoder(model, tokenizer, 1)
    with torch.inference_mode():
        decoder.read([0], [blocks])
        decoder.step([0], [[]])
    n, before = decoder.builders[0].n_read, decoder.n_block
    assert n > 400
    assert decoder.positions[0, before : before + n].tolist() == list(range(n))
    assert (decoder.positions.dtype, decoder.sums.dtype) == (torch.float32, torch.float64)
    assert {cache.data.dtype for cache in (*decoder.reader_caches, *decoder.writer_caches)} == {torch.bfloat16}
    if model.foretold:
        assert (decoder.sums != decoder.sums.float()).any()
    log_probs = engine.generate(model, tokenizer, ["the light"], max_new_units=30)[0].log_probs
    assert any(x != torch.tensor(x).bfloat16().item() for x in log_probs)


# ------------------------------------------------------------------------------------------------------ memory


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB.\nSee the manual")


@pytest.mark.parametrize("flags", [(), ("--json",), ("--trace", "-"), ("--num-beams", "2")], ids=" ".join)
def test_no_memory_is_said_in_one_line(flags: tuple[str, ...], infer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "read", no_memory)
    size, what = ("--batch-size", "7"), "what is written side by side; --batch-size is 7: try a smaller one, "
    if "--trace" in flags:
        size, what = (), "what is traced; try "
    done = infer("--prompt", "1 + 1 =", *size, *flags)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[1:] == [
        "tidal.infer: error: out of memory (CUDA out of memory. Tried to allocate 6.00 GiB.) for "
        f"{what}shorter prompts, or --precision bf16"
    ]


def test_no_memory_for_the_model(infer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load_with_trainer", no_memory)
    assert_refused(infer("--prompt", "1 + 1 ="), "infer", r"^out of memory \(.*\) for the model; try .* bf16$")


def test_a_device_without_float64(infer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.zeros

    def zeros(*size: Any, **how: Any) -> torch.Tensor:
        if how.get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return real(*size, **how)

    monkeypatch.setattr(torch, "zeros", zeros)
    done = infer("--prompt", "1 + 1 =", "--device", "cpu")
    assert_refused(done, "infer", "^device 'cpu' has no float64, .*; give --device cpu or cuda$")


# ----------------------------------------------------------------------------------------------- conversations


class Typed(io.StringIO):
    """What a person types; then Ctrl-D."""

    def isatty(self) -> bool:
        return True


def test_turns_draw_as_the_prompts_of_a_file(infer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the same prompt again gets another answer, and the same conversation the same."""
    prompts = ["1 + 1 =", "1 + 1 =", "2 + 2 ="]
    flags = ("--num-samples", "2", "--json", *SAMPLED)
    wanted = [answer["completion"] for answer in objects(infer("--prompt", *prompts, *flags).lines)]
    assert len(set(wanted)) == 6
    monkeypatch.setattr(sys, "stdin", Typed("\n".join(prompts) + "\n"))
    done = infer(*flags)
    assert done.code == 0, done.err
    assert [answer["completion"] for answer in objects(done.lines)] == wanted
    monkeypatch.setattr(sys, "stdin", Typed("\n".join(prompts) + "\n"))
    traces = infer("--num-samples", "2", *SAMPLED, "--trace", "-", "--trace-number", "1").out
    assert re.findall(r"^completion +(.*)$", traces, re.MULTILINE) == [visible(str(text)) for text in wanted[1::2]]


def test_ctrl_c_tears_no_line(infer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        """Ctrl-C as soon as anything is written."""

        def write(self, text: str) -> int:
            super().write(text)
            raise KeyboardInterrupt

    for flags in (["--json"], ["--json", "--stream"], []):
        monkeypatch.setattr(sys, "stdin", Typed("1 + 1 =\n2 + 2 =\n"))
        monkeypatch.setattr(sys, "stdout", out := Interrupted())
        assert infer(*flags, "--num-samples", "2", *SAMPLED).code == 0
        assert out.getvalue().endswith("\n")
        assert not flags or [answer["index"] for answer in objects(out.getvalue().splitlines())] == [0, 0]


def test_a_failed_answer_does_not_end_the_conversation(infer: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a prompt is waited for does."""
    real, errors = engine.stream, iter([KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory.")])

    def stream(*args: Any, **how: Any) -> Any:
        if error := next(errors, None):
            raise error
        return real(*args, **how)

    class Impatient(Typed):
        def readline(self, *_: Any) -> str:
            if line := super().readline():
                return line
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "stream", stream)
    monkeypatch.setattr(sys, "stdin", Impatient("1 + 1 =\n2 + 2 =\n3 + 3 =\n"))
    done = infer("--json", *SAMPLED)
    assert [answer["prompt"] for answer in objects(done.lines)] == ["3 + 3 ="]
    assert done.code == 130
    interrupted, memory, end = done.err.replace("> ", "").splitlines()[3:]
    assert (interrupted, end) == ("interrupted", "tidal.infer: interrupted")
    assert memory.startswith("out of memory (CUDA out of memory.)")
