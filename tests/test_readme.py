"""What README.md shows is run, and what it and CONTRIBUTING.md name exists."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, Ran, run

from tests.train.runs import short_samples
from tidal.cli import parse
from tidal.config import Train
from tidal.infer.__main__ import Infer
from tidal.train.__main__ import _recipe
from tidal.train.presets import PRESETS

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"}

ADAPTED = {
    r"\bFILE\b": "file.txt",
    r"\bOTHER_FILE\b": "other.txt",
    r"(-m tidal\.train\b(?!.*--help).*)": r"\1 --max-steps 4 --rows 4",
    r"(-m tidal\.train --recipe text .*)": r"\1 --no-doctor --d-model 32 --suffix-rows 500 --vocab-size 320",
    r"(-m tidal\.(infer|evaluate samples) .*)": r"\1 --max-new-units 12",
    r"(-m tidal\.train --init-from .*)": r"\1 --no-doctor",
    r"--count 1000": "--count 50",
    r"(-m tidal\.evaluate (boundary|samples) .*)": r"\1 --count 10",
    r"(python -m tidal\.doctor .*)": r"\1 --quick --checks 1 19",
}
"""All that is changed in a command before it is run: names in capitals, how long it trains and writes, the size of the
model of a text, how many answers are counted, that the doctor looks at one of the runs (most of its checks have just
been made before the first training), and that what has been learnt in that time is not judged."""
ADAPTED_PYTHON = ('["54663 + 132 ="])', '["54663 + 132 ="], max_new_units=12)')
"""The same in Python: a model that has learnt nothing does not end a text."""

CHECKED_ELSEWHERE = {
    "make demo": "would install; see test_make_demo_is_the_same_by_hand",
    "python -m tidal.sizes": "tests/test_sizes.py",
    "torchrun --nproc-per-node 2 -m tidal.train --recipe text --data FILE --out runs/two --parallel fsdp":
        "tests/train/test_parallel.py: torchrun with fsdp, and a text by two processes",
}  # fmt: skip
"""Commands that are not run here, and why."""


def fences(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    """Inline code; a line break inside it is a space."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text))]


def commands_of(text: str) -> list[str]:
    """What a reader is told to type: `$ ` lines of console blocks, and inline commands; each once, in order."""
    shown = [line[2:] for block in fences("console", text) for line in block.splitlines() if line.startswith("$ ")]
    inline = [span for span in code_spans(text) if re.match(r"python -m tidal\.\w+ ", span)]
    return list(dict.fromkeys(shown + inline))


COMMANDS = [command for command in commands_of(README) if command not in CHECKED_ELSEWHERE]
FIRST = {shlex.split(command)[2]: command for command in reversed(COMMANDS) if command.startswith("python -m ")}
"""The first command of each module."""


def in_a_process(command: str) -> bool:
    """Whether it is run as the reader runs it: what is more than one program, and each module once, but for those that
    tests/test_commands.py runs so."""
    module = shlex.split(command)[2]
    once = command == FIRST.get(module) and module not in ("tidal.train", "tidal.infer")
    return once or not command.startswith("python -m ")


def test_there_is_something_to_run() -> None:
    programs = {re.sub(r".*(make|python -m [\w.]+).*", r"\1", command) for command in commands_of(README)}
    assert {"make", "python -m tidal.train", "python -m tidal.infer", "python -m tidal.evaluate"} <= programs
    assert fences("python")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, and `python` as the reader has it."""
    home = tmp_path_factory.mktemp("home")
    (home / "file.txt").write_text("Once upon a time there was a sea, and the sea came in and went out.\n" * 150)
    (home / "other.txt").write_text("Once upon a time the sea went out, and never came in.\n" * 90)
    (home / "bin").mkdir()
    (home / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (home / "bin/python").chmod(0o755)
    return home


@pytest.mark.parametrize("shown", COMMANDS)
def test_the_command_runs(shown: str, home: Path, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order: each finds what those before it have left."""
    adapted = shown
    for pattern, replacement in ADAPTED.items():
        adapted = re.sub(pattern, replacement, adapted)
    if in_a_process(shown):
        done = run(["sh", "-c", f'PATH="$PWD/bin:$PATH"; {adapted}'], home)
    else:
        monkeypatch.chdir(home)
        _, _, module, *arguments = shlex.split(adapted)
        with short_samples():
            done = command(module.removeprefix("tidal."), *arguments)
    assert done.code == 0, done.err
    traced = "--trace trace.html" in shown
    silent = ("tidal.train" in shown and "--help" not in shown) or traced
    assert bool(done.out) == (not silent)
    assert not traced or (home / "trace.html").stat().st_size > 1000


@pytest.mark.parametrize("number", range(len(fences("python"))))
def test_the_python_runs(number: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; tests/test_docs_python.py has one of its own."""
    monkeypatch.chdir(home)
    exec(fences("python")[number].replace(*ADAPTED_PYTHON), {})


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_demo_is_the_same_by_hand() -> None:
    """The commands of `make demo` are the first two of the README, but for the run's name."""
    done = run(["make", "-n", "demo"], ROOT)
    assert done.code == 0, done.err
    pattern = r"python -m tidal\.(train|infer)\b(.*)"
    demo = re.findall(pattern, done.out)
    by_hand = re.findall(pattern, "\n".join(commands_of(README)))[:2]
    assert [module for module, _ in demo] == [module for module, _ in by_hand] == ["train", "infer"]
    (train, asked), (its_train, its_asked) = (
        [shlex.split(flags) for _, flags in commands] for commands in (demo, by_hand)
    )
    settings, same = (
        dataclasses.replace(parse(Train, argv, "tidal.train", default=PRESETS[_recipe(argv)]), out=None)
        for argv in (train, its_train)
    )
    assert settings == same
    assert settings.recipe == "addition"
    wanted = parse(Infer, asked, "tidal.infer")  # by hand of the newest run
    assert dataclasses.replace(wanted, checkpoint=None) == parse(Infer, its_asked, "tidal.infer")
    assert wanted.checkpoint == parse(Train, train, "tidal.train").out


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_paths_exist(name: str) -> None:
    text = DOCUMENTS[name]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    paths = [span for span in code_spans(text) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(py|md|toml|txt|yml)", span)]
    ours = {path.name for folder in ("tidal", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.*")}
    assert {path for path in (*links, *paths) if path not in ours and not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_and_extras_exist(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = [line for block in fences("console", DOCUMENTS[name]) for line in block.splitlines()]
    made = [re.match(r"(?:\$ )?make ([a-z-]+)", code) for code in (*shown, *code_spans(DOCUMENTS[name]))]
    assert {found[1] for found in made if found} <= set(targets)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for some in re.findall(r"\.\[([\w,]+)\]", DOCUMENTS[name]) for extra in some.split(",")}
    assert named <= set(extras)


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Every flag that some command's help names; they are run in this process, since most of them import torch."""
    names = ("train", "infer", "doctor", "corpora", "prepare", "report", "sizes", "kernels.picture")
    commands = [f"tidal.{name}" for name in names]
    commands += [f"tidal.evaluate {figure}" for figure in ("addition", "bits-per-byte", "boundary", "samples")]
    benchmarks = {path.stem for path in ROOT.glob("benchmarks/*.py")} - {"__init__"}
    if importlib.util.find_spec("triton") is None:
        benchmarks -= {"attention_tiles", "kernel_resources"}
    commands += [f"benchmarks.{name}" for name in sorted(benchmarks)]
    ended: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of modules that another test has imported
        for module, *subcommand in map(str.split, commands):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [module, *subcommand, "--help"])
                try:
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
                except SystemExit as stop:
                    ended[module] = stop.code
    assert not any(ended.values()), ended
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out.getvalue()))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_exist(name: str, known_flags: set[str]) -> None:
    """Every flag that is mentioned is in the help of a command; those of other people's programs are not ours."""
    theirs = r"\b(pip3?|pytest|git|ruff|mypy|uv)\b[^`\n]*|\btorchrun --nproc-per-node\b"
    lines = [re.sub(theirs, "", line) for line in DOCUMENTS[name].splitlines()]
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(lines)))
    assert mentioned <= known_flags | {"--help"}
