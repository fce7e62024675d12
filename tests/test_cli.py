"""The command line: errors of one line, exit codes, help without torch, progress."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from tidal import cli, config
from tidal.cli import UserError, main, note, parse, progress


@dataclass(frozen=True)
class Inner:
    """The inner part."""

    d_model: int = 128
    """How wide."""
    kind: Literal["memory", "block"] = "block"
    """Which one."""

    def __post_init__(self) -> None:
        if self.d_model < 1:
            raise ValueError(f"d_model is {self.d_model};\nit must be at least 1")


@dataclass(frozen=True)
class Outer:
    """The outer part."""

    data: tuple[str, ...] = ()
    """What to read."""
    max_steps: int = 100
    """How many steps."""
    lr: float = 1e-3
    """How fast."""
    fast: bool = False
    """Whether to hurry."""
    inner: Inner = field(default_factory=Inner)
    seed: int | None = None
    """A number."""
    heat: float | None = None
    """How hot."""
    checks: tuple[int, ...] = ()
    """Which ones."""


@dataclass(frozen=True)
class Needy:
    """A field without a default."""

    run: str
    """Where it is."""


def outer(*argv: str) -> Outer:
    return parse(Outer, argv, "tidal.train", "Train.")


def test_parse_reads_flags() -> None:
    argv = ("--max-steps", "7", "--data", "a", "b c", "--d-model=64", "--fast", "--lr", "1e-4")
    assert outer(*argv) == Outer(("a", "b c"), 7, 1e-4, True, Inner(64))
    assert outer() == Outer()
    assert parse(Outer, ["--lr", "2"], "x", default=Outer(max_steps=3)) == Outer(max_steps=3, lr=2.0)
    assert outer("--data=--a=b", "c", "--d-model=32") == Outer(("--a=b", "c"), inner=Inner(32))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-step", "5"], "unknown flag '--max-step'; did you mean '--max-steps'?"),
        (["--max_step=5"], "unknown flag '--max-step'; did you mean '--max-steps'?"),
        (["--d-modl", "5"], "unknown flag '--d-modl'; did you mean '--d-model'?"),
        (["--zzz"], "unknown flag '--zzz'; see --help for all flags"),
        (["--data", "a", "-q"], "unknown flag '-q'; see --help for all flags"),
        (["stray"], "unexpected argument 'stray'; every value needs its flag before it, see --help"),
        (["--fast=3"], "--fast takes no value, but was given '3'; see --help"),
        (["--max-steps", "x"], "--max-steps needs a whole number, not 'x'; see --help"),
        (["--max-steps", "1.5"], "--max-steps needs a whole number, not '1.5'; see --help"),
        (["--max-steps", "x" * 150], f"--max-steps needs a whole number, not '{'x' * 150}'; see --help"),
        (["--lr", "slow"], "--lr needs a number, not 'slow'; see --help"),
        (["--seed", "x"], "--seed needs a whole number, not 'x'; see --help"),
        (["--heat", "0,8"], "--heat needs a number, not '0,8'; see --help"),
        (["--checks", "1", "b"], "--checks cannot take '1', 'b'; see --help"),
        (["--max-steps"], "--max-steps needs a value; see --help"),
        (["--kind", "c"], "--kind must be one of 'memory', 'block', not 'c'; see --help"),
        (["--data", "a", "--fast", "--data=b"], "--data is given twice; give all its values after one --data"),
        (["--d-model", "0"], "inner: d_model is 0; it must be at least 1; see --help"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_parse_errors_are_one_clear_line(
    argv: Sequence[str],
    message: str,
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as raised:
        outer(*argv)
    assert str(raised.value) == message
    assert capfd.readouterr() == ("", "")


def test_help_texts_have_one_line() -> None:
    """In one of two tyro keeps the break, since the second is indented, and wraps each by itself."""
    modules = [importlib.import_module(f"tidal.{name}.__main__") for name in ("infer", "evaluate", "doctor", "prepare")]
    for cls in {cls for module in (config, *modules) for cls in vars(module).values() if dataclasses.is_dataclass(cls)}:
        body = ast.parse(inspect.getsource(cls)).body[0]
        assert isinstance(body, ast.ClassDef)
        texts = [x.value.value for x in body.body[1:] if isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)]
        assert [text for text in texts if "\n" in str(text)] == []


def test_missing_and_unknown_flags() -> None:
    with pytest.raises(UserError, match=r"^--run is required; see --help$"):
        parse(Needy, [], "x")
    with pytest.raises(UserError, match=r"^unknown flag '--ruin'; did you mean '--run'\?$"):
        parse(Needy, ["--ruin", "a"], "x")


@pytest.mark.parametrize(
    ("message", "line"), [("a\nb", "a b"), ("a\r\nb\n", "a b"), ("a\u2028b", "a b"), ("a\x0bb\x85c", "a b c")]
)
def test_user_errors_have_one_line(message: str, line: str) -> None:
    assert str(UserError(message)) == line


def exit_code(run: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(run, "tidal.x", [])  # type: ignore[arg-type]
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_triton_without_a_compiler(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What Triton does at the first launch of a kernel on a GPU, in earnest."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    if missing == "headers":  # gcc gives up
        monkeypatch.setenv("CC", shutil.which("false", path="/bin:/usr/bin") or "false")
    assert exit_code(lambda argv: build.compile_module_from_src(src="#include <Python.h>", name="driver")) == 2
    assert capfd.readouterr() == ("", (
        "tidal.x: error: Triton cannot compile C, which it needs on a GPU: install gcc and Python's headers "
        "(python3-dev), or set TIDAL_ATTENTION_BACKEND=reference, which is slow\n"
    ))  # fmt: skip


def raiser(error: BaseException) -> object:
    def run(_argv: list[str]) -> None:
        raise error

    return run


def test_main_turns_errors_into_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda argv: None) == 0
    assert exit_code(lambda argv: 3) == 3
    assert capsys.readouterr() == ("", "")
    assert exit_code(raiser(UserError("x is 3;\nmake it 4"))) == 2
    assert capsys.readouterr() == ("", "tidal.x: error: x is 3; make it 4\n")
    assert exit_code(raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "tidal.x: interrupted\n")
    with pytest.raises(ZeroDivisionError):
        main(raiser(ZeroDivisionError()), "tidal.x", [])  # type: ignore[arg-type]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the disk that is always full")
def test_what_takes_no_output_is_named() -> None:
    script = "from tidal.cli import main\nmain(lambda argv: print('ü'), 'tidal.x')"
    for environment, said in (
        ({"PYTHONUTF8": "1"}, "cannot write the output: No space left on device"),
        ({"PYTHONIOENCODING": "ascii"}, r"'\xfc' cannot be written in ascii; set PYTHONIOENCODING=utf-8"),
    ):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, **environment}, check=False)  # fmt: skip
        assert (done.returncode, done.stderr) == (2, f"tidal.x: error: {said}\n")


def test_closed_streams_are_empty_ones() -> None:
    script = ("import sys\nfrom tidal.cli import main, note\n"
              "main(lambda argv: print(note(sys.stdin.read()), sys.stdout.isatty()), 'tidal.x')")  # fmt: skip
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', script], check=False)
    assert done.returncode == 0


SCRIPT = """
import sys
from tidal.cli import main, parse
from tidal.config import Train
def run(argv):
    config = parse(Train, argv, "tidal.train", "Train a model.")
try:
    main(run, "tidal.train")
finally:
    print(sorted({"torch", "numpy"} & sys.modules.keys()), file=sys.stderr)
"""


def test_help_is_readable_and_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == "[]\n"
    assert "usage: python -m tidal.train" in done.stdout
    assert "Train a model." in done.stdout
    assert "--max-steps INT" in done.stdout
    assert "(default: 1000)" in done.stdout
    assert "Optimizer steps" in done.stdout


@pytest.mark.parametrize(
    "body", ['while True: print("y" * 1000)', 'sys.stdin.read(); print("y")'], ids=["much", "little"]
)
def test_a_closed_pipe_ends_quietly(body: str) -> None:
    script = f"import sys\nfrom tidal.cli import main\ndef run(argv):\n    {body}\nmain(run, 'tidal.train')"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")


def test_plain_progress_prints_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "LINE_EVERY_S", math.inf)
    with progress(1000, "train", done=200) as bar:
        for _ in range(799):
            bar.update(loss=2.34567)
        bar.update(loss=1.0, step="x")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train 1000/1000 steps  loss 1 step x  ")
    monkeypatch.setattr(cli, "LINE_EVERY_S", 0.0)
    with progress(None, "read", unit="files") as bar:
        bar.update(2)
        note("between")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["read 2 files", "between"], "the last line is not said again"


def test_terminal_progress_is_a_bar_that_notes_do_not_break(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(4, "train", done=2) as bar:
        bar.update(loss=2.5)
        note("a note")
        bar.update(loss=1.5)
    written = terminal.getvalue()
    assert "a note\n" in written
    assert "4/4" in written
    assert "loss 1.5" in written

    def refused(*args: object, **values: object) -> None:
        raise AssertionError("without a bar tqdm, which torch imports, is left alone")

    monkeypatch.setattr(tqdm, "write", refused)
    note("afterwards")
    assert terminal.getvalue().endswith("\nafterwards\n")
