"""The command line: one-line errors, flags from dataclasses, progress that suits terminals and log files.

Nothing here imports torch, and tyro and tqdm are imported only when they are used, so `--help` stays fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import math
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

NO_C_COMPILER = re.compile(r"Failed to find C compiler|'-O3', '-shared', '-fPIC'")
"""What Triton says where it finds no compiler, and the command that fails where there are no headers."""
LINE_EVERY_S = 5.0
"""Without a terminal, progress prints at most one line in this many seconds."""
_bars: list[Any] = []
"""The bars that are on the terminal now."""


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, with which value, and what to do about it."""

    def __init__(self, message: str) -> None:
        """Line breaks in `message` (they come in with file names and parsers' messages) become spaces."""
        super().__init__(" ".join(message.splitlines()))


def main(run: Callable[[list[str]], int | None], prog: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: the whole of `if __name__ == "__main__"` in every `python -m tidal.X`.

    `run` is given the arguments and returns an exit code or None. A `UserError` becomes one line on stderr
    and code 2, Ctrl-C one line and code 130, a reader that closed the pipe (`| head`) a silent 141, a full disk, an
    encoding that lacks a character or a missing C compiler one line and code 2. Every other exception is a bug and
    keeps its traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    try:
        code = run(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
    except UserError as error:
        note(f"{prog}: error: {error}")
        code = 2
    except KeyboardInterrupt:
        note(f"{prog}: interrupted")
        code = 130
    except BrokenPipeError:
        code = 141
    except UnicodeEncodeError as error:
        note(f"{prog}: error: {error.object[error.start]!a} cannot be written in {error.encoding}; "
             "set PYTHONIOENCODING=utf-8")  # fmt: skip
        code = 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        note(f"{prog}: error: cannot write {error.filename or 'the output'}: {error.strerror}")
        code = 2
    except Exception as error:
        if not NO_C_COMPILER.search(str(error)):
            raise
        note(f"{prog}: error: Triton cannot compile C, which it needs on a GPU: install gcc and Python's headers "
             "(python3-dev), or set TIDAL_ATTENTION_BACKEND=reference, which is slow")  # fmt: skip
        code = 2
    try:
        sys.stdout.flush()
    except OSError:  # what is left in the buffer would be tried again, and fail with a traceback, at the very end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def parse(
    config_type: type[T],
    argv: Sequence[str],
    prog: str,
    description: str | None = None,
    default: T | None = None,
) -> T:
    """Make a `config_type` out of flags such as `--max-steps 100` or `--d-model 64`.

    `default` replaces the defaults of the dataclass. Field docstrings are the help texts. `--help` prints
    to stdout and exits with code 0.

    Raises:
        UserError: an unknown flag (the nearest known one is suggested), a value that does not fit, a
            missing one, or a flag of several values given twice.
    """
    import tyro

    def cli(arguments: Sequence[str]) -> tuple[T, list[str]]:
        given: dict[str, Any] = {} if default is None else {"default": default}
        usage = f"python -m {prog}" if prog.startswith("tidal") else prog
        parsed: tuple[T, list[str]] = tyro.cli(
            config_type,
            prog=usage,
            description=description,
            args=list(arguments),
            use_underscores=False,
            config=(tyro.conf.OmitArgPrefixes,),
            return_unknown_args=True,
            **given,
        )
        return parsed

    if "--" in argv:
        raise UserError("'--' is no flag; a value that begins with a dash is given as --flag=VALUE")
    flags, several = [_spelling(a) for a in argv if a.startswith("--")], _variadic(config_type)
    for flag in flags:
        if flag in several and flags.count(flag) > 1:  # only the last one's values would be taken
            raise UserError(f"{flag} is given twice; give all its values after one {flag}")
    try:
        with _captured(width=9999) as said:
            config, unknown = cli(argv)
    except SystemExit as stop:
        if not stop.code:
            cli(argv)  # --help: once more, to the real stdout
        text = said.getvalue()
        known = _known_flags(cli) if "nrecognized" in text else []
        unknown = [flag for flag in flags if flag not in known] if known else []
        raise UserError(_unknown(unknown, argv, known) if unknown else _one_line(text)) from None
    if unknown:
        raise UserError(_unknown(unknown, argv, _known_flags(cli)))
    return config


def flag_of(name: str) -> str:
    """The flag of a setting: `--max-steps` for `max_steps`."""
    return f"--{name.replace('_', '-')}"


def check_least(settings: object, **least: int) -> None:
    """Raise UserError for a setting that is below its least value; what is None, or no setting, is passed over."""
    for name, lowest in least.items():
        if (value := getattr(settings, name, None)) is not None and value < lowest:
            raise UserError(f"{flag_of(name)} is {value}; it must be at least {lowest}")


def _variadic(config_type: type) -> set[str]:
    """The flags that take several values."""
    flags = set()
    for name, hint in typing.get_type_hints(config_type).items():
        if dataclasses.is_dataclass(hint):
            flags |= _variadic(typing.cast(type, hint))
        elif typing.get_origin(hint) is tuple:
            flags.add(flag_of(name))
    return flags


@contextlib.contextmanager
def _captured(width: int) -> Iterator[io.StringIO]:
    """Collect what tyro prints. Into a StringIO it draws no boxes, and at this width it breaks no lines."""
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _spelling(flag: str) -> str:
    """A flag as the help spells it, without its value."""
    return flag.partition("=")[0].replace("_", "-")


def _known_flags(cli: Callable[[Sequence[str]], object]) -> list[str]:
    """Every flag, read off the help: its lines that begin with a dash."""
    with _captured(width=80) as said, contextlib.suppress(SystemExit):
        cli(["--help"])
    lines = [line for line in _plain(said.getvalue()) if line.startswith("-")]
    return [flag for line in lines for flag in re.findall(r"(?:^|, )(--[a-z][\w.-]*)", line)]


def _plain(text: str) -> list[str]:
    """The lines that are not empty, without colours and indentation."""
    return [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines() if line.strip()]


def _unknown(unknown: Sequence[str], argv: Sequence[str], known: Sequence[str]) -> str:
    """What to say about arguments that nothing asked for: the first flag among them, else the first."""
    token = next((argument for argument in unknown if argument.startswith("--")), unknown[0])
    if not token.startswith("-"):
        whole = next((argument for argument in argv if argument.endswith(f"={token}")), None)
        if whole is not None:
            return f"{_spelling(whole)} takes no value, but was given {token!r}; see --help"
        return f"unexpected argument {token!r}; every value needs its flag before it, see --help"
    flag = _spelling(token)
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    return f"unknown flag {flag!r}; " + (f"did you mean {near[0]!r}?" if near else "see --help for all flags")


def _one_line(said: str) -> str:
    """Tyro's complaint (title, rule, message, rule, advice) as one line, in plainer words."""
    sections = re.split(r"\n-+\n", "\n".join(_plain(said)))
    text = " ".join(sections[min(1, len(sections) - 1)].split("\n")).rstrip(".")
    for pattern, words in (
        (
            r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)",
            r"\1 needs a whole number, not \2",
        ),
        (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 needs a number, not \2"),
        (
            r"Error parsing (\S+): no type matching \{None\}\|INT .*? from \[(.*?)\]\. Got .*",
            r"\1 needs a whole number, not \2",
        ),
        (
            r"Error parsing (\S+): no type matching \{None\}\|FLOAT .*? from \[(.*?)\]\. Got .*",
            r"\1 needs a number, not \2",
        ),
        (r"Error parsing (\S+): Could not find valid parse for arguments: \[(.*)\]", r"\1 cannot take \2"),
        (r"Error parsing (\S+): (.*)", r"\1: \2"),
        (r"Missing value for argument '(.*)'\. Expected 1 values", r"\1 needs a value"),
        (r"Missing value for argument '(.*)'\. Expected (\d+) values", r"\1 needs \2 values"),
        (
            r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)",
            r"\2 must be one of \3, not \1",
        ),
        (r"Missing from .*?: (--\S+).*", r"\1 is required"),
    ):
        text, found = re.subn(f"^{pattern}$", words, text)
        if found:
            break
    return f"{text or 'cannot read these arguments'}; see --help"


class Progress:
    """How far a loop has come; made by `progress`."""

    def __init__(self, total: int | None, what: str, unit: str, done: int, bar: Any) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = self._first = done
        self._bar = bar
        self._values = ""
        self._began = self._printed = time.monotonic()
        self._shown: int | None = None  # what the last line said

    def update(self, n: int = 1, **values: object) -> None:
        """`n` more units are done; `values` (such as loss=2.31) are shown beside the count."""
        self.done += n
        if values:
            self._values = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._values, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._printed >= LINE_EVERY_S:
            self._line()

    def close(self) -> None:
        """Finish the bar, or print the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown != self.done:
            self._line()

    def _line(self) -> None:
        self._printed, self._shown = time.monotonic(), self.done
        passed = self._printed - self._began
        rate = (self.done - self._first) / max(passed, 1e-9)
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        parts = [
            f"{self.what} {count} {self.unit}",
            self._values,
            f"{rate:.3g} {self.unit}/s",
            f"{passed:.0f} s",
        ]
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(total: int | None, what: str, unit: str = "steps", done: int = 0, *,
             last_line: bool = True) -> Iterator[Progress]:  # fmt: skip
    """Show a loop's progress on stderr: a bar on a terminal, elsewhere a plain line now and then.

        with progress(1000, "train", done=200) as bar:
            bar.update(loss=2.31)

    `done` is where a resumed loop begins. In plain form there is at most one line every `LINE_EVERY_S`
    seconds, and, with `last_line`, one at the end.
    """
    bar = None
    if sys.stderr.isatty():
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        bar = tqdm(total=total, desc=what, unit=f" {unit}", initial=done, dynamic_ncols=True, file=sys.stderr)
        _bars.append(bar)
    shown = Progress(total, what, unit, done, bar)
    try:
        yield shown
    finally:
        if bar is not None:
            _bars.remove(bar)
        if last_line or bar is not None:
            shown.close()


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures for JSON, which has no word for what is not finite but null."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in figures.items()}


def note(message: str) -> None:
    """Write a line to stderr, above the progress bar if there is one.

    Only then by way of tqdm (which torch imports, too): at its first use it makes a lock, and a signal in the midst of
    that becomes an AttributeError.
    """
    if _bars:
        _bars[-1].write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)
